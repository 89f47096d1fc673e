import functools
import importlib.util
import json
import os
import pathlib
import re
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
import tensorflow_datasets as tfds

import augmentation
import input_pipeline
from input_pipeline import next_indices
from input_pipeline import order_at
from machine import errors
from sources import arrays

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
    " incompatible with 40 examples; percentages, such as train[10%:] and"
    " train[:10%], fit any size"
  )


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


class Trap:
  def __reduce__(self):
    return pytest.fail, ("it was unpickled",)


def arrays_file(config):
  (path,) = pathlib.Path(config.data_dir).rglob("test.arrays.npz")
  return path


@pytest.fixture
def prepared_set(tiny_builder, tiny_set_config, monkeypatch):
  """The tiny set's builder, its config, and the splits read from records."""
  input_pipeline.load(tiny_set_config)
  reads = []
  read_records = arrays.read_records

  def counted(builder, split):
    reads.append(split)
    return read_records(builder, split)

  monkeypatch.setattr(arrays, "read_records", counted)
  return tiny_builder, tiny_set_config, reads


def test_the_arrays_are_cached(prepared_set):
  _, config, reads = prepared_set
  input_pipeline.load(config)
  assert not reads


@pytest.mark.parametrize(
  "damage",
  [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:-100]),
    lambda path: path.write_bytes(path.read_bytes()[:100]),
    lambda path: path.write_bytes(
      path.read_bytes().replace(bytes([7] * 144), bytes([8] * 144))
    ),
    lambda path: np.savez(path, images=np.zeros(3)),
    lambda path: np.savez(path, source=np.array([Trap()])),
    lambda path: path.write_bytes(b"not a zip file"),
  ],
)
def test_damaged_arrays_are_rebuilt(prepared_set, damage):
  _, config, reads = prepared_set
  damage(arrays_file(config))
  expected = np.repeat(np.arange(12), 144).reshape(12, 8, 6, 3)
  data = input_pipeline.load(config)
  np.testing.assert_array_equal(pixels(data.test), expected)
  assert reads == ["test"]
  input_pipeline.load(config)
  assert reads == ["test"]


def remove(path):
  path.unlink()


def truncate(path):
  os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [remove, truncate])
def test_the_error_for_damaged_records_names_them(
  tiny_builder, tiny_set_config, damage
):
  (records,) = tiny_builder.info.splits["test"].filepaths
  damage(pathlib.Path(records))
  with pytest.raises(errors.UserError, match="tiny_set/2.0.0") as error:
    input_pipeline.load(tiny_set_config)
  assert not list(pathlib.Path(tiny_set_config.data_dir).rglob("test.*.npz"))
  assert "test" in str(error.value)


def test_outdated_arrays_are_rebuilt(prepared_set):
  builder, config, reads = prepared_set
  (records,) = builder.info.splits["test"].filepaths
  os.utime(records, ns=(0, 0))  # As if prepared at another time.
  input_pipeline.load(config)
  assert reads == ["test"]


def test_loading_works_even_if_the_arrays_cannot_be_written(
  tiny_builder, tiny_set_config, monkeypatch
):
  del tiny_builder

  def no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np, "savez", no_space)
  data = input_pipeline.load(tiny_set_config)
  assert data.test.labels.shape == (12,)


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


def test_windows_users_are_told_to_use_wsl2(default_config, monkeypatch):
  # On Windows, requirements.txt does not install array_record.
  monkeypatch.setattr(importlib.util, "find_spec", {}.get)
  with pytest.raises(errors.UserError, match="array_record.*on Windows.*WSL2"):
    input_pipeline.load(default_config)


NONE = augmentation.Limits(0, 0, 0, 0, 0)


def augmented(images, seed=0, **limits):
  limits = NONE._replace(**limits)
  return np.asarray(augmentation.augment(jax.random.key(seed), images, limits))


def bars(count):
  """Returns images of one upright bar each, 4 pixels wide and 20 high."""
  images = np.zeros((count, 28, 28, 1), np.float32)
  images[:, 4:24, 12:16] = 1
  return images


def moments(images):
  """Returns the centers (row, column), the angles in degrees and the sizes.

  An image's angle is that of its long axis; its sizes are the standard
  deviations of its rows and columns.
  """
  rows, columns = np.indices(images.shape[1:3])
  weights = images[..., 0] / images.sum(axis=(1, 2, 3))[:, None, None]

  def mean(values):
    return (weights * values).sum(axis=(1, 2))

  row, column = mean(rows), mean(columns)
  rows = rows - row[:, None, None]
  columns = columns - column[:, None, None]
  angle = np.arctan2(2 * mean(rows * columns), mean(rows**2) - mean(columns**2))
  sizes = np.sqrt([mean(rows**2), mean(columns**2)])
  return np.stack([row, column]), np.degrees(angle) / 2, sizes


def test_no_deformation_changes_nothing(mnist):
  images = input_pipeline.to_float(pixels(mnist.train)[:5])
  np.testing.assert_allclose(augmented(images), images, atol=1e-5)


def test_images_are_shifted_within_the_limit():
  centers, angles, sizes = moments(augmented(bars(300), shift=2))
  offsets = centers - 13.5
  assert 1.9 < offsets.max() < 2.001
  assert -2.001 < offsets.min() < -1.9
  assert abs(np.corrcoef(offsets)[0, 1]) < 0.2
  np.testing.assert_allclose(angles, 0, atol=0.1)


def test_images_are_rotated_within_the_limit():
  centers, angles, _ = moments(augmented(bars(300), rotation=12))
  assert 11 < angles.max() < 12.5
  assert -12.5 < angles.min() < -11
  np.testing.assert_allclose(centers, 13.5, atol=0.05)


def test_images_are_scaled_within_the_limit():
  square = np.zeros((1, 28, 28, 1), np.float32)
  square[:, 6:22, 6:22] = 1
  _, _, before = moments(square)
  _, _, sizes = moments(augmented(np.tile(square, (300, 1, 1, 1)), scale=0.1))
  factors = sizes / before  # Interpolation adds about 0.005.
  assert ((factors > 1 / 1.11) & (factors < 1.11)).all()
  assert (factors.max(axis=1) > 1.09).all()
  assert (factors.min(axis=1) < 0.93).all()
  # Height and width are scaled independently.
  assert abs(np.corrcoef(factors)[0, 1]) < 0.2


def test_images_are_sheared_within_the_limit():
  """The rows move sideways, by up to the limit per row."""
  result = augmented(bars(300), shear=0.2)[..., 0]
  columns = (result * np.arange(28)).sum(axis=2) / result.sum(axis=2).clip(1e-9)
  slopes, _ = np.polyfit(np.arange(5, 23), columns[:, 5:23].T, 1)
  assert 0.18 < abs(slopes).max() < 0.201
  assert slopes.max() > 0.15 and slopes.min() < -0.15


def test_an_elastic_deformation_bends_a_bar():
  images = bars(50)
  result = augmented(images, elastic=8)
  assert result.shape == images.shape
  assert (abs(result - images).max(axis=(1, 2, 3)) > 0.1).all()
  # Neighbors move together, so the inside of the bar stays in one piece.
  np.testing.assert_array_equal(result[:, 10:18, 13:15] > 0.9, True)
  centers, _, _ = moments(result)
  assert abs(centers - 13.5).max() < 2


def test_deformed_images_stay_sharp(mnist):
  images = np.asarray(input_pipeline.to_float(pixels(mnist.train)[:300]))

  def contrast(images):
    return (np.diff(images[..., 0], axis=2) ** 2).mean()

  # Interpolating linearly in the original images would leave 0.67 and 0.70.
  assert contrast(augmented(images, shift=2)) > 0.8 * contrast(images)
  assert contrast(augmented(images, rotation=12)) > 0.8 * contrast(images)


def test_a_tpu_interpolates_to_the_same_values():
  rng = np.random.default_rng(0)
  image = np.float32(rng.random((12, 9, 3)))
  sources = np.float32(rng.uniform(-3, 14, (2, 20, 10)))  # Some are outside.
  sources[:, 0, :9] = np.arange(9)  # These are exactly on pixels.
  by_products = augmentation._interpolate_by_products(image, sources)
  np.testing.assert_allclose(by_products[0, :9], image.diagonal().T[:9])
  np.testing.assert_allclose(
    by_products,
    augmentation._interpolate_by_gathers(image, sources),
    atol=1e-5,
  )


def test_only_a_tpu_interpolates_by_products():
  images = jnp.zeros((2, 28, 28, 1))
  limits = NONE._replace(shift=2)
  lowered = jax.jit(functools.partial(augmentation.augment, limits=limits))
  traced = lowered.trace(jax.random.key(0), images)

  def count(operation, platform):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return len(re.findall(rf"= \"?stablehlo\.{operation}", text))

  gathers = [count("gather", name) for name in ("cpu", "cuda", "tpu")]
  assert gathers == [4, 4, 0]
  assert count("dot_general", "tpu") == count("dot_general", "cpu") + 1


def test_deformations_depend_only_on_the_key(mnist):
  images = input_pipeline.to_float(pixels(mnist.train)[:5])
  limits = dict(rotation=10, scale=0.1, shear=0.1, shift=2, elastic=8)
  first = augmented(images, **limits)
  np.testing.assert_array_equal(first, augmented(images, **limits))
  assert (
    (first != augmented(images, seed=1, **limits)).any(axis=(1, 2, 3)).all()
  )
  assert first.min() >= 0 and first.max() <= 1
  # All channels of an image are deformed alike; different images are not.
  same = np.tile(images[:1], (5, 1, 1, 3))
  result = augmented(same, **limits)
  np.testing.assert_array_equal(result[..., 0], result[..., 2])
  assert (result[0] != result[1]).any()


def test_augmentation_is_off_if_all_limits_are_0(default_config):
  config = default_config.copy_and_resolve_references()
  assert augmentation.from_config(config) is None
  config.augment_shear = 0.5
  assert augmentation.from_config(config) == NONE._replace(shear=0.5)
  config.clean_steps = 1000
  assert augmentation.from_config(config).num_steps == 19000
