import functools
import platform
import subprocess
import sys

from conftest import PROJECT
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ops


@pytest.mark.parametrize("shape", [(3, 8, 6, 5), (2, 7, 5, 3), (1, 3, 3, 1)])
def test_max_pool_is_flaxs_to_the_bit_with_ties(shape):
  rng = np.random.default_rng(0)
  # Four values in windows of four: most windows tie.
  x = jnp.asarray(rng.integers(0, 4, shape), jnp.float32)
  flax_max_pool = functools.partial(
    nn.max_pool, window_shape=(2, 2), strides=(2, 2)
  )
  expected, expected_vjp = jax.vjp(flax_max_pool, x)
  actual, actual_vjp = jax.vjp(ops.max_pool, x)
  np.testing.assert_array_equal(actual, expected)
  dy = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
  np.testing.assert_array_equal(actual_vjp(dy)[0], expected_vjp(dy)[0])


def test_max_pool_sends_the_gradient_of_a_tie_to_the_first_maximum():
  x = jnp.zeros((1, 4, 2, 1)).at[0, 3, :, 0].set(1.0)
  dx = jax.grad(lambda x: ops.max_pool(x).sum())(x)
  np.testing.assert_array_equal(
    dx[0, :, :, 0], [[1, 0], [0, 0], [0, 0], [1, 0]]
  )


def test_unknown_compiler_options_are_left_out(monkeypatch):
  unknown, known = (
    {"xla_no_such_option": "1"},
    {"xla_cpu_enable_fast_math": False},
  )
  try:
    for candidates, expected in (
      ((unknown, known), known),
      ((known, unknown), known),
      ((unknown,), {}),
    ):
      monkeypatch.setattr(ops, "_CPU_OPTIONS", candidates)
      ops.compiler_options.cache_clear()
      assert ops.compiler_options() == expected
  finally:
    ops.compiler_options.cache_clear()


def test_repeated_applies_the_step_so_many_times():
  run = ops.repeated(lambda carry, x: (carry[0] + 1, carry[1] * x))
  for num_steps in (0, 1, 5):
    count, product = run((jnp.int32(0), jnp.float32(1)), num_steps, 2.0)
    assert (count, product) == (num_steps, 2.0**num_steps)


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="glibc has the setting"
)
def test_freed_memory_is_kept():
  """A large array does not leave the heap when it is freed."""
  code = """if True:
    import ctypes, ops, sys

    if sys.argv[1] == "kept":
      ops.keep_freed_memory()
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    block = libc.malloc(ctypes.c_size_t(2**28))
    ctypes.memset(block, 1, 2**28)
    libc.free(ctypes.c_void_p(block))
    (resident,) = [x for x in open("/proc/self/status") if "VmRSS" in x]
    print(resident.split()[1])
  """

  def kibibytes(argument):
    command = [sys.executable, "-c", code, argument]
    return int(subprocess.check_output(command, cwd=PROJECT))

  assert kibibytes("kept") > kibibytes("") + 2**18 - 2**15


def test_at_most_one_step_waits_on_a_cpu(monkeypatch):
  """Else a progress bar would count steps that only wait in a queue."""
  waited_for = []
  monkeypatch.setattr(jax, "block_until_ready", waited_for.append)
  assert ops.repeated(lambda carry: carry + 1)(jnp.int32(0), 5) == 5
  assert waited_for == [0, 1, 2, 3, 4]
