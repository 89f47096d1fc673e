import platform
import pwd
import subprocess
import sys
from unittest import mock

from conftest import PROJECT
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import input_pipeline
from machine import compiling
import predict
from rundir import runs
import steps
import train


def test_unknown_compiler_options_are_skipped(monkeypatch):
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
      monkeypatch.setitem(compiling._OPTIONS, "cpu", candidates)
      compiling.compiler_options.cache_clear()
      assert compiling.compiler_options() == expected
  finally:
    compiling.compiler_options.cache_clear()


def test_jit_loop_applies_the_step_the_given_number_of_times():
  run = compiling.jit_loop(lambda carry, x: (carry[0] + 1, carry[1] * x))
  for num_steps in (0, 1, 5):
    count, product = run((jnp.int32(0), jnp.float32(1)), num_steps, 2.0)
    assert (count, product) == (num_steps, 2.0**num_steps)


def test_each_jax_release_gets_the_options_measured_for_it():
  expected = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}
  if jax.__version_info__ < (0, 8):
    expected = {"xla_cpu_use_xnnpack": False}
  assert compiling.compiler_options() == expected


def test_a_gpu_is_told_to_be_deterministic_with_an_option_that_xla_knows(
  monkeypatch,
):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  compiling.compiler_options.cache_clear()
  try:
    assert compiling.compiler_options() == {"xla_gpu_deterministic_ops": True}
  finally:
    compiling.compiler_options.cache_clear()


@pytest.mark.parametrize("path", ["train", "evaluate", "predict"])
def test_every_program_compiles_the_network_with_the_options(
  path, tiny_run, tiny_config, tmp_path, monkeypatch
):
  """XLA raises an error wherever an unknown option reaches it."""
  monkeypatch.setattr(
    compiling, "compiler_options", lambda: {"xla_unknown": True}
  )
  run = runs.open_run(tiny_run)
  images = np.zeros((1, 28, 28, 1), np.uint8)
  examples = input_pipeline.Examples(images.reshape(1, -1), np.zeros(1, int))
  with pytest.raises(jax.errors.JaxRuntimeError, match="xla_unknown"):
    if path == "predict":
      predict.predictor(run)(images)
    elif path == "evaluate":
      steps.evaluator(examples, 1)(run.state)
    else:
      train.train_and_evaluate(tiny_config, tmp_path)


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="only glibc has the setting"
)
def test_freed_memory_is_kept():
  """A large block stays in the heap when it is freed."""
  code = """if True:
    import ctypes, sys
    from machine import compiling

    if sys.argv[1] == "kept":
      compiling.keep_freed_memory()
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
  """Otherwise a progress bar would count steps that are still queued."""
  waited_for = []
  monkeypatch.setattr(jax, "block_until_ready", waited_for.append)
  assert compiling.jit_loop(lambda carry: carry + 1)(jnp.int32(0), 5) == 5
  assert waited_for == [0, 1, 2, 3, 4]


def test_the_users_compilation_cache_takes_precedence(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  names = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
  )
  before = [getattr(jax.config, name) for name in names]
  ours = str(tmp_path / ".cache/jax" / platform.node())
  try:
    for given, expected in (
      (("/their/cache", 7.0), ("/their/cache", 7.0)),
      ((None, 7.0), (ours, 0.1)),
    ):
      for name, value in zip(names, given, strict=True):
        jax.config.update(name, value)
      compiling.cache_compilations()
      assert tuple(getattr(jax.config, name) for name in names) == expected
  finally:
    for name, value in zip(names, before, strict=True):
      jax.config.update(name, value)


def test_without_home_nothing_is_cached_and_a_warning_says_so(
  monkeypatch, caplog
):
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.delenv("HOME")
  monkeypatch.setattr(pwd, "getpwuid", mock.Mock(side_effect=KeyError))
  jax.config.update("jax_compilation_cache_dir", None)
  try:
    compiling.cache_compilations()
    assert jax.config.jax_compilation_cache_dir is None
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
  assert caplog.messages == [
    "HOME is not set: every start compiles again unless"
    " JAX_COMPILATION_CACHE_DIR names a directory"
  ]
