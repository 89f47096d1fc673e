"""Loads a TFDS data set onto the device, and decides the order of the examples.

All examples stay on the device as uint8 (MNIST: 55 MB), each image as a flat
row; the jitted step gathers and scales its batch. The order is a function of
(seed, step).
"""

from collections.abc import Sequence
import functools
import importlib
import itertools
from typing import Any
from typing import NamedTuple
import zlib

from absl import logging
from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
import ml_collections
import numpy as np

from machine import devices
from machine import errors
from machine import processes


class Examples(struct.PyTreeNode):
  """Images and their labels.

  Attributes:
    images: uint8 [n, height * width * channels]. They are flat because a TPU
      would lay out [n, height, width, channels] with n as the fastest-varying
      axis, and read 128 images to gather one.
    labels: int32 [n].
    image_shape: (height, width, channels) of one image.
  """

  images: jax.Array
  labels: jax.Array
  image_shape: tuple[int, int, int] = struct.field(
    pytree_node=False, default=(28, 28, 1)
  )

  def unflatten(self, rows: jax.Array) -> jax.Array:
    """Reshapes flat rows to images, [n, height, width, channels]."""
    return rows.reshape(-1, *self.image_shape)


class Data(NamedTuple):
  """The loaded splits of a data set.

  Attributes:
    class_names: the names of the labels.
    crc32: a checksum of each loaded split, by its name.
    splits: each loaded split, by its name: "train", to train on; "validation",
      to watch the training; or "test", for the final score.
  """

  class_names: tuple[str, ...]
  crc32: dict[str, int]
  splits: dict[str, Examples]

  @property
  def train(self) -> Examples:
    return self.splits["train"]

  @property
  def validation(self) -> Examples:
    return self.splits["validation"]

  @property
  def test(self) -> Examples:
    return self.splits["test"]

  def description(self) -> dict[str, Any]:
    """Describes the data for a run's dataset.json."""
    examples = next(iter(self.splits.values()))
    return {
      "image_shape": list(examples.image_shape),
      "class_names": list(self.class_names),
      "crc32": self.crc32,
    }


def load(
  config: ml_collections.ConfigDict,
  splits: Sequence[str] = ("train", "validation", "test"),
) -> Data:
  """Prepares `config.dataset` if necessary, and puts splits on the device.

  Args:
    config: its `dataset`, `*_split`, `*_dir` and `image_size` are read.
    splits: which of the three to load.

  Raises:
    errors.UserError: if a key or a file is wrong; the message names it.
  """
  with processes.first_then_others("load the data"):  # Disks may be shared.
    try:
      class_names, loaded = _load(config, splits)
    except (OSError, RuntimeError) as error:  # pathlib raises the latter.
      raise errors.UserError(
        f"config.data_dir={config.data_dir}: {error}"
      ) from error
  crc32 = {split: _crc32(*pair) for split, pair in loaded.items()}
  if not processes.have_the_same(list(crc32.values())):
    raise errors.UserError(
      f"config.dataset={config.dataset}: not all processes have the same"
      " examples; all hosts must have the same config and the same files"
    )
  examples = {split: _to_device(*pair) for split, pair in loaded.items()}
  return Data(class_names, crc32, examples)


def check_batch_size(config: ml_collections.ConfigDict, data: Data) -> None:
  """Raises errors.UserError unless a batch fits the split and devices."""
  train_size, num_devices = data.train.labels.size, devices.mesh().size
  if config.batch_size > train_size:
    raise errors.UserError(
      f"config.batch_size={config.batch_size}: must be at most {train_size},"
      f" the size of config.train_split={config.train_split}"
    )
  if config.batch_size % num_devices:
    lower = config.batch_size // num_devices * num_devices
    nearest = {max(lower, num_devices), lower + num_devices}
    raise errors.UserError(
      f"config.batch_size={config.batch_size}: must be a multiple of the"
      f" number of devices, {num_devices}; the nearest are {sorted(nearest)}"
    )


def _load(
  config: ml_collections.ConfigDict, splits: Sequence[str]
) -> tuple[tuple[str, ...], dict[str, tuple[np.ndarray, np.ndarray]]]:
  """Returns the names of the classes, and each split's images and labels."""
  builders = _import_builders()
  if config.image_size and config.dataset != "image_folder":
    logging.warning(
      "config.image_size=%d has no effect with config.dataset=%s",
      *(config.image_size, config.dataset),
    )
  prepared = builders.prepared(config)
  # Several of our splits may be parts of one of its splits.
  read_whole = functools.cache(prepared.read)
  class_names = prepared.class_names
  keys = [f"{split}_split" for split in splits]
  parsed = {
    key: builders.parse_split(config, key, prepared.splits) for key in keys
  }
  _warn_of_overlaps(config, parsed)
  loaded = {}
  for split, key in zip(splits, keys, strict=True):
    parts = [
      [array[part.start : part.stop] for array in read_whole(name)]
      for name, part in parsed[key]
    ]
    images, labels = map(np.concatenate, zip(*parts, strict=True))
    if not labels.size:
      raise errors.UserError(f"config.{key}={config[key]}: the split is empty")
    missing = np.setdiff1d(range(len(class_names)), labels)
    if split == "train" and missing.size:  # The files may be sorted by class.
      logging.warning(
        "config.train_split=%s has no examples of %s",
        config.train_split,
        ", ".join(class_names[label] for label in missing),
      )
    loaded[split] = images, labels
  return class_names, loaded


def _warn_of_overlaps(config, parsed: dict[str, list[Any]]) -> None:
  """Warns of splits that share examples."""
  for (key, parts), (other, others) in itertools.combinations(
    parsed.items(), 2
  ):
    shared = sum(
      len(range(max(a.start, b.start), min(a.stop, b.stop)))
      for (name, a), (other_name, b) in itertools.product(parts, others)
      if name == other_name
    )
    if shared:
      logging.warning(
        "config.%s=%s and config.%s=%s share %d examples",
        *(key, config[key], other, config[other], shared),
      )


def _import_builders():
  """Imports sources/builders.py, and with it TFDS.

  Raises:
    errors.UserError: if TFDS cannot be imported; the message says why.
  """
  importlib.import_module("sources")  # Sets a variable that TFDS reads.
  try:
    # TFDS itself only logs what is wrong; its core raises it.
    importlib.import_module("tensorflow_datasets.core")
  except Exception as error:  # Such as protobuf's VersionError.
    raise errors.UserError(
      "TensorFlow Datasets cannot be imported; run `pip install -r"
      f" requirements.txt`: {type(error).__name__}: {error}"
    ) from error
  from sources import builders

  return builders


def _crc32(images: np.ndarray, labels: np.ndarray) -> int:
  checksum = zlib.crc32(repr(images.shape[1:]).encode())
  for array in (images, labels):
    checksum = zlib.crc32(np.ascontiguousarray(array).data, checksum)
  return checksum


def _to_device(images: np.ndarray, labels: np.ndarray) -> Examples:
  rows = images.reshape(len(labels), -1)
  put = functools.partial(jax.device_put, device=devices.replicated())
  return Examples(put(rows), put(labels), images.shape[1:])


def to_float(images: jax.Array) -> jax.Array:
  """Scales uint8 images to float32 in [0, 1]."""
  return images.astype(jnp.float32) / 255


class Order(struct.PyTreeNode):
  """The position of training in an endless sequence of shuffled epochs.

  Attributes:
    epoch: int32 scalar, counted from 0.
    offset: int32 scalar, how many examples of this epoch were taken.
    indices: int32 [2 * n], the order of this epoch and of the next, because a
      batch may span both.
  """

  epoch: jax.Array
  offset: jax.Array
  indices: jax.Array


def epoch_indices(rng: jax.Array, epoch: jax.Array, size: int) -> jax.Array:
  """Returns the order of one epoch, a permutation of range(size), int32."""
  return jax.random.permutation(jax.random.fold_in(rng, epoch), size)


@functools.partial(jax.jit, static_argnames=("size",))
def _order(rng, epoch, offset, size):
  indices = [epoch_indices(rng, epoch + i, size) for i in (0, 1)]
  return Order(epoch, offset, jnp.concatenate(indices))


def order_at(rng: jax.Array, step: int, batch_size: int, size: int) -> Order:
  """Returns the order before a given step without replaying the earlier ones.

  Args:
    rng: the key from which all permutations are derived.
    step: counted from 0.
    batch_size: at most `size`.
    size: the number of examples per epoch.
  """
  epoch, offset = divmod(step * batch_size, size)
  return _order(rng, jnp.int32(epoch), jnp.int32(offset), size)


def next_indices(
  order: Order, rng: jax.Array, batch_size: int
) -> tuple[jax.Array, Order]:
  """Returns the indices of the next batch, int32, and the order after it."""
  size = order.indices.size // 2
  batch = lax.dynamic_slice(order.indices, (order.offset,), (batch_size,))
  order = order.replace(offset=order.offset + batch_size)

  def next_epoch(order):
    after_next = epoch_indices(rng, order.epoch + 2, size)
    return Order(
      epoch=order.epoch + 1,
      offset=order.offset - size,
      indices=jnp.concatenate([order.indices[size:], after_next]),
    )

  return batch, lax.cond(
    order.offset >= size, next_epoch, lambda order: order, order
  )
