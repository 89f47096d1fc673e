"""Fixtures and helpers: real MNIST, prepared once, and one short run."""

import atexit
import contextlib
import fcntl
import functools
import json
import os
import pathlib
import platform
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from unittest import mock

from flax import serialization
from hypothesis import strategies as st
import jax
from matplotlib import image
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
import tensorflow_datasets as tfds

from configs import default
import input_pipeline
from machine import compiling
from sources import builders
from sources import idx_dataset
import train

PROJECT = pathlib.Path(__file__).parent.parent

# Compiles with the options that the programs use. Without them, JAX 0.7.2 on a
# CPU may use old weights from the same address; see machine/compiling.py.
jit = functools.partial(jax.jit, compiler_options=compiling.compiler_options())


def pytest_configure(config):
  """Makes a deprecated call in the project's own files fail the tests."""
  modules = {path.stem for path in PROJECT.glob("*.py")}
  packages = {path.parent.name for path in PROJECT.glob("*/__init__.py")}
  names = "|".join({*modules, *packages, "configs"})
  config.addinivalue_line(
    "filterwarnings", rf"error::DeprecationWarning:({names}|test_\w+)([.]|$)"
  )


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory):
  """The folder that all workers of pytest-xdist share."""
  folder = tmp_path_factory.getbasetemp()
  return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@contextlib.contextmanager
def only_one_worker(path):
  """Yields whether `path` is to be made, while the other workers wait."""
  with open(f"{path}.lock", "a") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield lock.tell() == 0
    lock.write("made")


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(pytestconfig):
  """Lets the tests and their subprocesses compile each program once.

  The next run of pytest finds the programs too.
  """
  for name, value in {
    "jax_compilation_cache_dir": str(
      pytestconfig.cache.mkdir(f"jax-{platform.node()}")
    ),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
  }.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)


@pytest.fixture(scope="session")
def default_config(shared_dir):
  """The default config, with a data_dir in which MNIST is prepared."""
  config = default.get_config()
  config.data_dir = str(shared_dir / "tensorflow_datasets")
  with only_one_worker(config.data_dir) as is_first:
    if is_first:
      builders.prepared(config)
  return config


@pytest.fixture(scope="session")
def mnist(default_config):
  """The default config's splits."""
  return input_pipeline.load(default_config)


@pytest.fixture(scope="session")
def _tiny_config(default_config):
  config = default_config.copy_and_resolve_references()
  config.update(
    train_split="train[5000:5100]",
    validation_split="train[:50]",
    test_split="test[:70]",
    batch_size=16,
    eval_batch_size=32,
    num_steps=20,
    learning_rate=0.1,
    log_every_steps=5,
    log_probabilities_every_steps=10,
    eval_every_steps=4,
    checkpoint_every_steps=4,
  )
  return config


@pytest.fixture
def tiny_config(_tiny_config):
  """A config of 20 steps on 100 images, about 3 epochs. Tests may change it."""
  return _tiny_config.copy_and_resolve_references()


@pytest.fixture(scope="session")
def tiny_run(_tiny_config, shared_dir):
  """The complete run of `tiny_config`. Tests must not change it."""
  workdir = shared_dir / "tiny"
  with only_one_worker(workdir) as is_first:
    if is_first:
      train.train_and_evaluate(_tiny_config, workdir)
  return workdir


@pytest.fixture(scope="session")
def averaged_run(_tiny_config, mnist, shared_dir):
  """A run on a .npz file, with averaged parameters. Tests must not change it.

  It is saved every 2 steps and validated every 4, and ends at step 10.
  """
  workdir = shared_dir / "averaged"
  config = _tiny_config.copy_and_resolve_references()
  config.update(
    dataset="arrays",
    data_dir=str(shared_dir / "arrays"),
    manual_dir=str(shared_dir / "own"),
    train_split="train[50:]",
    validation_split="train[:50]",
    test_split="test",
    num_steps=10,
    ema_decay=0.5,
    checkpoint_every_steps=2,
    eval_every_steps=4,
  )
  with only_one_worker(workdir) as is_first:
    if is_first:
      train_images, test_images = pixels(mnist.train), pixels(mnist.test)
      (shared_dir / "own").mkdir()
      np.savez(
        shared_dir / "own/digits.npz",
        x_train=train_images[:150],
        y_train=mnist.train.labels[:150],
        x_test=test_images[100:180],
        y_test=mnist.test.labels[100:180],
      )
      with mock.patch.object(train, "_draw"):  # It takes longer than 10 steps.
        train.train_and_evaluate(config, workdir)
  return workdir


@pytest.fixture
def warnings_fail():
  """Fails the test on a SIGHUP or SIGUSR1 that the code does not handle.

  Otherwise these would end pytest or, under nohup, be ignored.
  """
  numbers = (signal.SIGHUP, signal.SIGUSR1)
  before = [
    signal.signal(n, lambda n, _: pytest.fail(signal.Signals(n).name))
    for n in numbers
  ]
  yield
  for number, handler in zip(numbers, before, strict=True):
    signal.signal(number, handler)


@pytest.fixture
def run(tiny_run, tmp_path):
  """A copy of the tiny run that tests may change."""
  return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def tiny_builder(tmp_path):
  """The builder of a small TFDS data set, prepared in tmp_path."""

  class TinySet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("2.0.0")

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        disable_shuffling=True,
        features=tfds.features.FeaturesDict(
          {
            "image": tfds.features.Tensor(shape=(8, 6, 3), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=4),
          }
        ),
      )

    def _split_generators(self, dl_manager):
      return {
        "train": self._generate_examples(40),
        "test": self._generate_examples(12),
      }

    def _generate_examples(self, size):
      for i in range(size):
        image = np.full((8, 6, 3), i, np.uint8)
        yield i, {"image": image, "label": i % 4}

  builder = TinySet(data_dir=tmp_path)
  builder.download_and_prepare(file_format="array_record")
  return builder


@pytest.fixture
def tiny_set_config(default_config, tmp_path):
  config = default_config.copy_and_resolve_references()
  config.update(
    dataset="tiny_set",
    data_dir=str(tmp_path),
    train_split="train[10:]",
    validation_split="train[:10]",
  )
  return config


def idx_bytes(array):
  array = np.asarray(array)
  header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
  return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def family(tmp_path, monkeypatch):
  """A small IDX data set: (folder, test images, test labels)."""
  sizes = {"train": ("train", 300), "test": ("t10k", 100)}
  monkeypatch.setattr(idx_dataset, "_SPLITS", sizes)
  folder = tmp_path / "family"
  folder.mkdir()
  rng = np.random.default_rng(0)
  for prefix, size in sizes.values():
    images = rng.integers(0, 256, (size, 28, 28))
    labels = rng.integers(0, 10, size)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(images))
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
  return folder, images, labels


def if_meant(update):
  """Returns the message for results that differ from a test's stored values."""
  return (
    "the result differs from the values stored in the tests. If that is"
    f" intended, {update} in the same commit; if not, the code is wrong"
  )


def assert_same_state(a, b):
  """Asserts that two states are identical in all that a checkpoint holds."""
  jax.tree.map(
    np.testing.assert_array_equal,
    serialization.to_state_dict(a),
    serialization.to_state_dict(b),
  )


def read_events(workdir):
  """Returns a run's TensorBoard events, read as TFRecords, oldest first."""
  events = []
  for path in sorted(workdir.glob("events.out.tfevents.*")):
    content = path.read_bytes()
    while content:
      (length,) = struct.unpack("<Q", content[:8])  # Then 4 bytes of checksum.
      events.append(event_pb2.Event.FromString(content[12 : 12 + length]))
      content = content[12 + length + 4 :]
  return events


def read_jsonl(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def temperature(workdir, step):
  """Returns the temperature that a run has logged at a step."""
  records = [each for each in read_jsonl(workdir) if each["step"] == step]
  return next(x["temperature"] for x in records if "temperature" in x)


@functools.cache
def warm_python(project=PROJECT):
  process = subprocess.Popen(
    [sys.executable, str(project / "tests/warm_python.py")],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, "PYTHONUNBUFFERED": ""},  # As for most users.
  )
  atexit.register(process.kill)
  return process


def run_program(
  program, *args, cwd, stdin=b"", is_read=True, project=PROJECT, **environment
):
  """Runs a program as a user would, except that its imports are done already.

  If `is_read` is false, the program's stdout is a pipe whose reader has exited.
  """
  warm = warm_python(project)
  with tempfile.TemporaryDirectory() as folder:
    pipes = {
      name: pathlib.Path(folder, name) for name in ("stdin", "stdout", "stderr")
    }
    for path in pipes.values():
      path.touch()
    pipes["stdin"].write_bytes(stdin)
    argv = [program, *map(str, args)]
    command = {"argv": argv, "cwd": str(cwd), "environment": environment} | {
      name: str(path) for name, path in pipes.items()
    }
    if not is_read:
      command["stdout"] = ""
    print(json.dumps(command), file=warm.stdin, flush=True)
    returncode = int(warm.stdout.readline())
    return subprocess.CompletedProcess(
      argv, returncode, pipes["stdout"].read_text(), pipes["stderr"].read_text()
    )


def train_command(config, workdir):
  """Returns the command that trains with `config`, whatever its keys."""
  defaults = default.get_config()
  return [
    *(sys.executable, str(PROJECT / "train.py"), f"--workdir={workdir}"),
    *(
      f"--config.{key}={value}"
      for key, value in config.items()
      if value != defaults[key]
    ),
  ]


def run_train(*args, cwd, **environment):
  """Runs train.py as a user would."""
  return subprocess.run(
    [sys.executable, str(PROJECT / "train.py"), *map(str, args)],
    capture_output=True,
    text=True,
    cwd=cwd,
    env={**os.environ, **environment},
  )


@contextlib.contextmanager
def files_of_at_most(size):
  """Limits the size of files, in bytes, to simulate a full disk."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@st.composite
def damaged(draw, contents):
  """Draws one of the contents with some bytes replaced by arbitrary ones."""
  content = draw(st.sampled_from(contents))
  begin = draw(st.integers(0, len(content)))
  end = draw(st.integers(begin, len(content)))
  return content[:begin] + draw(st.binary(max_size=30)) + content[end:]


def assert_not_blank(path):
  """Asserts that an image file has more than one color."""
  pixels = image.imread(path)
  assert pixels.std() > 0.03, path


def pixels(examples):
  """Returns the images of Examples, [n, height, width, channels]."""
  return examples.unflatten(examples.images)
