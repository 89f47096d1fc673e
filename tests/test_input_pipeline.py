import json
import os
import pathlib
import subprocess
import sys
from unittest import mock

from absl import logging
from conftest import PROJECT
from conftest import pixels
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import input_pipeline
from input_pipeline import next_indices
from input_pipeline import order_at
from machine import errors
from machine import processes

KEY = jax.random.key(0)
jitted_next_indices = jax.jit(next_indices, static_argnums=2)


def take(order, num_batches, batch_size, rng=KEY):
  """Returns the indices of the next batches, and the order after them."""
  batches = [np.zeros(0, np.int32)]
  for _ in range(num_batches):
    batch, order = jitted_next_indices(order, rng, batch_size)
    batches.append(batch)
  return np.concatenate(batches), order


@pytest.mark.parametrize("batch_size", [1, 30, 100])
def test_every_epoch_has_every_example_exactly_once(batch_size):
  size, epochs = 100, 6
  num_batches = -(-size * epochs // batch_size)
  indices, _ = take(order_at(KEY, 0, batch_size, size), num_batches, batch_size)
  epochs = indices[: size * epochs].reshape(epochs, size)
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(size))
  assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_order_does_not_depend_on_the_batch_size():
  one, _ = take(order_at(KEY, 0, 1, 100), 300, 1)
  many, _ = take(order_at(KEY, 0, 30, 100), 10, 30)
  np.testing.assert_array_equal(one, many)


@pytest.mark.parametrize("step", [0, 1, 6, 7, 8, 29])
def test_order_at_a_step_is_the_order_after_the_steps_before_it(step):
  _, walked = take(order_at(KEY, 0, 30, 100), step, 30)
  jumped = order_at(KEY, step, 30, 100)
  jax.tree.map(np.testing.assert_array_equal, walked, jumped)


def test_order_depends_only_on_the_seed():
  first = order_at(jax.random.key(7), 0, 10, 1000).indices
  again = order_at(jax.random.key(7), 0, 10, 1000).indices
  other = order_at(jax.random.key(8), 0, 10, 1000).indices
  np.testing.assert_array_equal(first, again)
  assert (first != other).mean() > 0.99


def test_order_does_not_overflow_int32():
  step = 10**9
  order = order_at(KEY, step, 1024, 55_000)
  epoch, offset = divmod(step * 1024, 55_000)
  assert (order.epoch, order.offset) == (epoch, offset)


def test_to_float_scales_255_to_one():
  scaled = input_pipeline.to_float(jnp.array([0, 51, 255], jnp.uint8))
  np.testing.assert_allclose(scaled, [0, 0.2, 1], rtol=1e-6)


def test_splits_have_the_syntax_of_tfds(mnist, default_config):
  default_config = default_config.copy_and_resolve_references()
  default_config.update(
    train_split="train[10%:20%]+test[-7:]",
    validation_split="train[59990:]",
    test_split="test[50%:]",
  )
  data = input_pipeline.load(default_config)
  assert data.train.labels.shape == (6007,)
  np.testing.assert_array_equal(
    data.train.labels[:6000], mnist.train.labels[1000:7000]
  )
  np.testing.assert_array_equal(
    data.train.labels[6000:], mnist.test.labels[-7:]
  )
  np.testing.assert_array_equal(
    pixels(data.validation), pixels(mnist.train)[-10:]
  )
  np.testing.assert_array_equal(pixels(data.test), pixels(mnist.test)[5000:])
  assert pixels(mnist.train).dtype == np.uint8
  assert mnist.train.labels.dtype == np.int32
  assert mnist.class_names == tuple("0123456789")


def test_a_prepared_tfds_data_set_is_read(tiny_builder, tiny_set_config):
  del tiny_builder
  for _ in range(2):  # From the records, then from the arrays beside them.
    data = input_pipeline.load(tiny_set_config)
    assert data.class_names == tuple("0123")
    np.testing.assert_array_equal(pixels(data.train)[:, 0, 0, 0], range(10, 40))
    assert pixels(data.test).shape == (12, 8, 6, 3)
    np.testing.assert_array_equal(data.test.labels, np.arange(12) % 4)


def test_the_error_for_a_split_that_is_too_long_suggests_percentages(
  tiny_builder, tiny_set_config
):
  del tiny_builder
  tiny_set_config.train_split = "train[5000:]"
  with pytest.raises(errors.UserError) as error:
    input_pipeline.load(tiny_set_config)
  assert str(error.value) == (
    "config.train_split=train[5000:]: not a split of tiny_set, which has 40"
    " examples in train and 12 examples in test: Requested slice [5000:40]"
    " incompatible with 40 examples; percentages fit any size:"
    " --config.train_split='train[10%:]'"
    " --config.validation_split='train[:10%]'"
  )


@pytest.mark.parametrize(
  "change", ["nothing", "a pixel", "a label", "the order", "the shape"]
)
def test_the_checksum_is_that_of_the_examples(change, default_config, tmp_path):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (20, 6, 4), np.uint8)
  labels = np.arange(20) % 3
  config = default_config.copy_and_resolve_references()
  config.update(dataset="arrays", data_dir=str(tmp_path / "data"))

  def checksums(name):
    (tmp_path / name).mkdir()
    np.savez(tmp_path / name / "a.npz", x_train=images, y_train=labels)
    config.manual_dir = str(tmp_path / name)
    for key in ("train", "validation", "test"):
      config[f"{key}_split"] = f"train[{'10:' if key == 'train' else ':10'}]"
    return input_pipeline.load(config).crc32

  before = checksums("before")
  if change == "a pixel":
    images[15, 2, 3] ^= 1
  elif change == "a label":
    labels[15] = (labels[15] + 1) % 3
  elif change == "the order":
    images[10:], labels[10:] = images[:9:-1].copy(), labels[:9:-1].copy()
  elif change == "the shape":
    images = images.reshape(20, 4, 6)
  after = checksums("after")
  assert (after["train"] == before["train"]) == (change == "nothing")
  assert (after["test"] == before["test"]) == (change != "the shape")
  assert after["validation"] == after["test"]


def test_a_class_without_training_examples_causes_a_warning(
  tiny_builder, tiny_set_config, monkeypatch
):
  del tiny_builder
  warn = mock.Mock()
  monkeypatch.setattr(logging, "warning", warn)
  input_pipeline.load(tiny_set_config)
  warn.assert_not_called()
  tiny_set_config.train_split = "train[4:6]"
  input_pipeline.load(tiny_set_config)
  message, *args = warn.call_args.args
  assert message % tuple(args) == (
    "config.train_split=train[4:6] has no examples of 2, 3"
  )


@pytest.mark.parametrize(
  "train, validation, shared",
  [
    ("train", "train[:10]", 10),
    ("train[5:]", "train[:10]", 5),
    ("train[:10]+train[20:]", "train[8:22]", 4),
    ("train[10:]", "train[:10]", 0),
    ("train", "test[:6]", 6),
  ],
)
def test_splits_that_share_examples_cause_a_warning(
  train, validation, shared, tiny_builder, tiny_set_config, monkeypatch
):
  del tiny_builder
  warn = mock.Mock()
  monkeypatch.setattr(logging, "warning", warn)
  tiny_set_config.update(train_split=train, validation_split=validation)
  input_pipeline.load(tiny_set_config)
  lines = [call.args[0] % call.args[1:] for call in warn.call_args_list]
  one, other = ("train", train), ("validation", validation)
  if validation.startswith("test"):
    one, other = other, ("test", "test")
  expected = (
    f"config.{one[0]}_split={one[1]} and config.{other[0]}_split={other[1]}"
    f" share {shared} examples"
  )
  assert lines == [expected] * bool(shared)


def test_image_size_has_no_effect_on_other_data_sets(
  tiny_builder, tiny_set_config, monkeypatch
):
  del tiny_builder
  warn = mock.Mock()
  monkeypatch.setattr(logging, "warning", warn)
  tiny_set_config.image_size = 4
  data = input_pipeline.load(tiny_set_config)
  assert data.test.image_shape == (8, 6, 3)
  ((message, *args),) = (call.args for call in warn.call_args_list)
  assert message % tuple(args) == (
    "config.image_size=4 has no effect with config.dataset=tiny_set"
  )


def test_the_error_for_another_format_says_how_to_convert_it(
  tiny_builder, tiny_set_config
):
  info = pathlib.Path(tiny_builder.data_dir) / "dataset_info.json"
  content = json.loads(info.read_text())
  info.write_text(json.dumps({**content, "fileFormat": "tfrecord"}))
  with pytest.raises(errors.UserError) as error:
    input_pipeline.load(tiny_set_config)
  assert "tfds build tiny_set --file_format=array_record" in str(error.value)


def test_the_error_for_an_unprepared_data_set_says_how_to_prepare_it(
  tiny_set_config,
):
  tiny_set_config.dataset = "cifar10"
  with pytest.raises(errors.UserError) as error:
    input_pipeline.load(tiny_set_config)
  assert "tfds build cifar10 --file_format=array_record" in str(error.value)
  assert "\n" not in str(error.value)


def test_a_lost_process_is_not_blamed_on_the_data(tiny_config, monkeypatch):
  lost = jax.errors.JaxRuntimeError("a task has failed")
  monkeypatch.setattr(processes, "sync", mock.Mock(side_effect=lost))
  with pytest.raises(jax.errors.JaxRuntimeError):
    input_pipeline.load(tiny_config)


def test_the_error_says_why_tfds_cannot_be_imported(tmp_path):
  """As with a protobuf that is too old: TFDS itself only logs the reason."""
  package = tmp_path / "tensorflow_datasets"
  package.mkdir()
  (package / "__init__.py").touch()
  (package / "core.py").write_text("raise Exception('gencode 6, runtime 5')")
  process = subprocess.run(
    [sys.executable, PROJECT / "train.py", "--workdir=run"],
    cwd=tmp_path,
    env={**os.environ, "PYTHONPATH": str(tmp_path)},
    capture_output=True,
    text=True,
  )
  assert process.returncode == 1
  assert process.stderr == (
    "train.py: TensorFlow Datasets cannot be imported; run `pip install -r"
    " requirements.txt`: Exception: gencode 6, runtime 5\n"
  )
  assert not (tmp_path / "run").exists()
