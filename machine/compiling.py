"""How programs are compiled and run: options, loops, cache and memory."""

from collections.abc import Callable
import ctypes
import functools
import os
import platform
from typing import Any

from absl import logging
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

# Parameters of glibc's mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
# The first of these that the installed JAX accepts is used.
_OPTIONS: dict[str, tuple[dict[str, str | bool], ...]] = {
  "cpu": (
    # Use YNNPACK for dot products only: its convolutions, the default in newer
    # JAX, are 2 to 4 times slower here than the ones that XLA falls back to.
    {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"},
    # JAX 0.7.2 has XNNPACK instead. It caches packed weights by address, so
    # evaluation may read stale weights that were once at the same address.
    {"xla_cpu_use_xnnpack": False},
  ),
  # Otherwise a GPU adds up gradients in a different order in each run, so no
  # run can be repeated or resumed bit for bit.
  "gpu": ({"xla_gpu_deterministic_ops": True},),
}


@functools.cache
def compiler_options() -> dict[str, str | bool]:
  """Returns XLA's options for the backend and JAX release in use."""
  for options in _OPTIONS.get(jax.default_backend(), ()):
    if _are_known(options):
      return options
  if jax.default_backend() == "gpu":
    logging.warning("XLA cannot make the GPU deterministic; runs will differ")
  return {}


def _are_known(options: dict[str, str | bool]) -> bool:
  try:
    jax.jit(jnp.negative, compiler_options=options).lower(0.0).compile()
  except jax.errors.JaxRuntimeError:
    return False
  return True


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
  """Jits a function with `compiler_options`."""
  return jax.jit(function, compiler_options=compiler_options())


def takes_single_steps() -> bool:
  """Returns whether `jit_loop` dispatches steps one at a time."""
  # Inside a loop, XLA's CPU backend loses its fast convolutions and is 18 times
  # slower, while a dispatch costs only a thousandth of a step.
  return jax.default_backend() == "cpu"


def jit_loop(step: Callable[..., Any], **static: Any) -> Callable[..., Any]:
  """Jits `step(carry, *args, **static) -> carry` to run many times.

  Args:
    step: a pure function. On accelerators, all its runs take one dispatch, and
      its carry is donated.
    **static: arguments that are the same in every step.

  Returns:
    `run(carry, num_steps, *args) -> carry`, compiled once for any `num_steps`.
  """
  step = functools.partial(step, **static)
  if takes_single_steps():
    # No donation: a CPU would copy parameters before updating them in place.
    jitted = jit(step)

    def run(carry, num_steps, *args):
      for _ in range(num_steps):
        before, carry = carry, jitted(carry, *args)
        # Otherwise JAX queues dozens of steps and the progress bar runs ahead.
        jax.block_until_ready(before)
      return carry

    return run

  loop = loop_on_device(step)
  return lambda carry, num_steps, *args: loop(
    carry, jax.device_put(np.int32(num_steps)), *args
  )


def loop_on_device(step: Callable[..., Any]) -> jax.stages.Wrapped:
  """Jits `step(carry, *args) -> carry` as a loop that runs on the device.

  Returns:
    `loop(carry, num_steps, *args) -> carry`, which donates its carry;
    `num_steps` is an int32 scalar on the device.
  """

  @functools.partial(
    jax.jit, donate_argnums=0, compiler_options=compiler_options()
  )
  def loop(carry, num_steps, *args):
    return lax.fori_loop(0, num_steps, lambda _, c: step(c, *args), carry)

  return loop


def keep_freed_memory() -> None:
  """Makes glibc keep freed memory instead of returning it to the system.

  Otherwise the system maps and clears the pages of the buffers again in every
  step, which takes a tenth of the step's time on a CPU.
  """
  if platform.libc_ver()[0] == "glibc":
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_MAX, 0)  # Allocate large arrays on the heap too.
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)  # Do not shrink the heap.
    mallopt(_M_TOP_PAD, 2**26)  # Grow it by at least 64 MiB.


def cache_compilations() -> None:
  """Caches compiled programs on disk, so that only the first start compiles.

  Uses the directory that the user configured, if any. The default one is per
  host, because hosts with different CPUs may share a home directory.
  """
  if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
    folder = os.path.expanduser(f"~/.cache/jax/{platform.node()}")
    if folder.startswith("~"):
      logging.warning(
        "HOME is not set: every start compiles again unless"
        " JAX_COMPILATION_CACHE_DIR names a directory"
      )
      return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
