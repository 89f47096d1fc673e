"""A TFDS data set as arrays in memory, and the order that training takes.

All examples are held as uint8 on the device (MNIST: 47 MB), each image a flat
row; a batch is gathered and scaled inside the jitted step. The order is a
function of (seed, step).
"""

from collections.abc import Sequence
import contextlib
import functools
import importlib.util
import json
import math
import os
import pathlib
import sys
from typing import NamedTuple
import zipfile

from absl import app
from absl import logging
from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
import ml_collections
import numpy as np
from scipy import ndimage
import tensorflow_datasets as tfds
import tqdm

from machine import devices
from machine import processes
from sources import idx_dataset

_ELASTIC_SIGMA = 4.0  # Pixels, of the Gaussian that smooths displacements.
_FINENESS = 4  # Pixels for each one of the image that is deformed.
_PROJECT_DATA = pathlib.Path(__file__).parent / "data"


class Examples(struct.PyTreeNode):
  """Images and their labels.

  Attributes:
    images: uint8 [n, height * width * channels]. A TPU stores [n, height,
      width, channels] with n as the fastest axis, and reads 128 images to
      gather one.
    labels: int32 [n].
    image_shape: (height, width, channels) of one image.
  """

  images: jax.Array
  labels: jax.Array
  image_shape: tuple[int, int, int] = struct.field(
    pytree_node=False, default=(28, 28, 1)
  )

  def unflatten(self, rows: jax.Array) -> jax.Array:
    """Returns flat rows as images, [n, height, width, channels]."""
    return rows.reshape(-1, *self.image_shape)


class Data(NamedTuple):
  """The splits that were loaded of a data set, and the names of its classes."""

  class_names: tuple[str, ...]
  train: Examples | None = None
  validation: Examples | None = None
  test: Examples | None = None


def load(
  config: ml_collections.ConfigDict,
  splits: Sequence[str] = ("train", "validation", "test"),
) -> Data:
  """Puts the splits of `config.dataset` on the device, prepared where needed.

  Args:
    config: its `dataset`, `*_split`, `data_dir` and `manual_dir` are read.
    splits: which of the three to load.

  Raises:
    app.UsageError: names the key or the file that is wrong.
  """
  if not importlib.util.find_spec("array_record"):
    raise app.UsageError(
      "array_record, which stores the data sets, is not installed; on Windows,"
      " for which it has no wheels, use WSL2; elsewhere, run"
      " `pip install -r requirements.txt`"
    )
  try:
    with processes.first_goes_first("load the data"):  # From one disk, maybe.
      data = _load(config, splits)
  except OSError as error:
    raise app.UsageError(
      f"config.data_dir={config.data_dir}: {error}"
    ) from error
  if not processes.have_the_same(*jax.tree.leaves(data[1:])):
    raise app.UsageError(
      f"config.dataset={config.dataset}: not all processes have the same"
      " examples; accepted is one config, and the same files on all hosts"
    )
  return data._replace(
    **{split: devices.replicate(getattr(data, split)) for split in splits}
  )


def _load(config: ml_collections.ConfigDict, splits: Sequence[str]) -> Data:
  """The splits as numpy arrays."""
  builder = _builder(config)
  whole = {}

  def read(split):
    key = f"{split}_split"
    spec = config[key]
    try:
      instructions = tfds.core.ReadInstruction.from_spec(spec).to_absolute(
        builder.info.splits
      )
    except (ValueError, KeyError, NotImplementedError, AssertionError) as error:
      reason = " ".join(str(error).strip("'\"").split())
      raise app.UsageError(
        f"config.{key}={spec}: not a split of {config.dataset}: {reason}"
      ) from error
    parts = []
    for part in instructions:
      if part.splitname not in whole:
        whole[part.splitname] = _read_split(builder, part.splitname)
      images, labels = whole[part.splitname]
      parts.append((images[part.from_ : part.to], labels[part.from_ : part.to]))
    images, labels = map(np.concatenate, zip(*parts, strict=True))
    if not labels.size:
      raise app.UsageError(f"config.{key}={spec}: the split is empty")
    flat = images.reshape(len(labels), -1)
    return Examples(flat, labels, images.shape[1:])

  return Data(
    class_names=tuple(builder.info.features["label"].names),
    **{split: read(split) for split in splits},
  )


def _builder(config: ml_collections.ConfigDict) -> tfds.core.DatasetBuilder:
  """The builder of the data set, prepared in a random access format."""
  data_dir = os.path.expanduser(config.data_dir) or None
  if config.dataset in idx_dataset.NAMES:
    return _prepared_idx_builder(config, data_dir)
  try:
    builder = tfds.builder(config.dataset, data_dir=data_dir)
  except Exception as error:  # TFDS raises anything.
    raise app.UsageError(
      f"config.dataset={config.dataset}: neither one of"
      f" {', '.join(idx_dataset.NAMES)} nor a data set that TFDS can build:"
      f" {error}"
    ) from error
  formats = builder.info.available_file_formats()
  if not formats & tfds.core.FileFormat.with_random_access():
    raise app.UsageError(
      f"config.dataset={config.dataset}: not prepared as array_record in"
      f" {builder.data_dir_root}; where TensorFlow is installed, `tfds build"
      f" {config.dataset} --file_format=array_record --data_dir=DIR` prepares"
      " it, and --config.data_dir=DIR then reads it"
    )
  features = builder.info.features
  if not (
    {"image", "label"} <= set(features)
    and isinstance(features["label"], tfds.features.ClassLabel)
    and len(features["image"].shape) == 3
    and None not in features["image"].shape
    and features["image"].np_dtype == np.uint8
  ):
    raise app.UsageError(
      f"config.dataset={config.dataset}: has the features"
      f" {' '.join(str(features).split())}; accepted are data sets with a"
      " class `label` and a uint8 `image` of fixed [height, width, channels]"
    )
  return builder


def _prepared_idx_builder(
  config: ml_collections.ConfigDict, data_dir: str | None
) -> tfds.core.DatasetBuilder:
  manual_dir = _PROJECT_DATA
  if config.manual_dir:
    manual_dir = pathlib.Path(config.manual_dir).expanduser()
  if config.manual_dir and not manual_dir.is_dir():
    raise app.UsageError(
      f"config.manual_dir={config.manual_dir}: not a directory; accepted is one"
      ' with the IDX files, or "" for the project\'s data/'
    )

  def make_builder():
    try:
      return idx_dataset.IdxDataset(
        config=config.dataset, data_dir=data_dir, manual_dir=manual_dir
      )
    except Exception as error:  # TFDS raises anything.
      raise app.UsageError(
        f"config.data_dir={config.data_dir}: the prepared {config.dataset} in"
        f" it is damaged: {error}; remove that and run again"
      ) from error

  builder = make_builder()
  if builder.data_path.exists():
    if not builder.info.splits:
      raise app.UsageError(
        f"{builder.data_dir}: holds no data set, though it has its name;"
        " remove it and run again"
      )
    if config.manual_dir:
      logging.info(
        "%s is prepared in %s: config.manual_dir is not read",
        config.dataset,
        builder.data_dir,
      )
    return builder
  logging.info("Preparing %s in %s", config.dataset, builder.data_dir)
  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(None):  # It says more than we did.
      builder.download_and_prepare(file_format="array_record")
  except FileExistsError:
    return make_builder()  # Another process was faster.
  return builder


def _read_split(
  builder: tfds.core.DatasetBuilder, split: str
) -> tuple[np.ndarray, np.ndarray]:
  """Reads a split's images, [n, height, width, channels], and its labels.

  Takes them from the split's array file, which it writes if it has to.
  """
  folder = pathlib.Path(builder.data_dir)
  files = [folder / "dataset_info.json"]
  files += map(pathlib.Path, builder.info.splits[split].filepaths)
  # What the arrays were made from: other files, other arrays.
  source = json.dumps(
    [
      (file.name, file.stat().st_size, file.stat().st_mtime_ns)
      for file in files
    ]
  )
  path = folder / f"{split}.arrays.npz"
  try:
    # The zip format has a CRC of each array, and reading checks it.
    with np.load(path, allow_pickle=False) as arrays:
      if arrays["source"].item() == source:
        return arrays["images"], arrays["labels"]
    logging.info("%s is outdated and made anew", path)
  except FileNotFoundError:
    pass
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    logging.warning("%s is damaged (%s) and made anew", path, error)
  images, labels = _read_records(builder, split)
  temporary = path.with_name(f"{path.name}.{os.getpid()}.incomplete")
  try:
    with open(temporary, "wb") as file:
      np.savez(file, source=source, images=images, labels=labels)
    os.replace(temporary, path)
  except OSError as error:
    temporary.unlink(missing_ok=True)
    logging.warning("%s cannot be written (%s): starts stay slow", path, error)
  return images, labels


def _read_records(
  builder: tfds.core.DatasetBuilder, split: str
) -> tuple[np.ndarray, np.ndarray]:
  size = builder.info.splits[split].num_examples
  images = np.empty((size, *builder.info.features["image"].shape), np.uint8)
  labels = np.empty(size, np.int32)
  progress = tqdm.tqdm(desc=f"Reading {split}", total=size, disable=None)
  try:
    records = builder.as_data_source(split)
    for start in range(0, size, 1000):  # Twice as fast as one by one.
      chunk = records.__getitems__(range(start, min(start + 1000, size)))
      for index, example in enumerate(chunk, start):
        images[index], labels[index] = example["image"], example["label"]
      progress.update(len(chunk))
  except Exception as error:  # TFDS and array_record raise anything.
    raise app.UsageError(
      f"{builder.data_dir}: the records of {split} are damaged: {error};"
      " remove it and run again"
    ) from error
  finally:
    progress.close()
  return images, labels


def to_float(images: jax.Array) -> jax.Array:
  """Scales uint8 images to float32 in [0, 1]."""
  return images.astype(jnp.float32) / 255


class Augmentation(NamedTuple):
  """The largest random deformations of an image, and how long they last.

  Attributes:
    rotation: in degrees, to either side.
    scale: 0.1 makes it up to 1.1 times as large or as small, in each direction.
    shear: how much a row moves sideways for each row from the centre.
    shift: in pixels, in each direction.
    elastic: in pixels, before the field of random displacements is smoothed.
    num_steps: of training that see deformed images; None is all.
  """

  rotation: float
  scale: float
  shear: float
  shift: float
  elastic: float
  num_steps: int | None = None


def augmentation(config: ml_collections.ConfigDict) -> Augmentation | None:
  """What the config's `augment_*` keys say; None where all are 0."""
  result = Augmentation(
    rotation=config.augment_rotation,
    scale=config.augment_scale,
    shear=config.augment_shear,
    shift=config.augment_shift,
    elastic=config.augment_elastic,
  )
  if not any(result):
    return None
  if not config.clean_steps:
    return result
  return result._replace(num_steps=config.num_steps - config.clean_steps)


def augment(
  rng: jax.Array, images: jax.Array, limits: Augmentation
) -> jax.Array:
  """Deforms each image at random, differently.

  The elastic deformation is that of Simard, Steinkraus and Platt, "Best
  Practices for Convolutional Neural Networks Applied to Visual Document
  Analysis", 2003.

  Args:
    rng: of this batch.
    images: float32 [B, height, width, channels], in [0, 1].
    limits: of the deformations.

  Returns:
    Images of the same shape, interpolated; 0 where there was nothing.
  """
  batch, height, width, channels = images.shape
  rngs = jax.random.split(rng, 5)

  def uniform(rng, shape, limit):
    return jax.random.uniform(rng, (batch, *shape), minval=-limit, maxval=limit)

  angle = uniform(rngs[0], (), math.radians(limits.rotation))
  scale = jnp.exp(uniform(rngs[1], (2,), math.log1p(limits.scale)))
  shear = uniform(rngs[2], (), limits.shear)
  shift = uniform(rngs[3], (2,), limits.shift)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  # Of each pixel, (row, column) from the centre: where its value comes from.
  matrix = scale[:, :, None] * jnp.stack(
    [
      jnp.stack([cos - sin * shear, -sin], axis=-1),
      jnp.stack([sin + cos * shear, cos], axis=-1),
    ],
    axis=1,
  )
  center = np.array([height - 1, width - 1], np.float32)[:, None, None] / 2
  grid = np.indices((height, width), np.float32) - center
  sources = center + shift[:, :, None, None]
  sources += jnp.einsum("bij,jhw->bihw", matrix, grid, precision="highest")
  if limits.elastic:
    # A TPU draws long rows four times as fast as short ones.
    field = uniform(rngs[4], (2 * height * width,), limits.elastic)
    field = lax.optimization_barrier(field).reshape(batch, 2, height, width)
    rows, columns = (
      ndimage.gaussian_filter1d(np.eye(size), _ELASTIC_SIGMA, mode="constant")
      for size in (height, width)
    )
    sources += jnp.einsum("ij,bcjw,vw->bciv", rows, field, columns)

  # Linear interpolation blurs what evaluation will see sharp; between the
  # pixels of a finer image, it hardly does.
  fine = jax.image.scale_and_translate(
    images,
    (batch, _FINENESS * height, _FINENESS * width, channels),
    spatial_dims=(1, 2),
    scale=jnp.full(2, float(_FINENESS)),
    # So that the image's own pixels are among the finer ones.
    translation=jnp.full(2, (1 - _FINENESS) / 2),
    method="lanczos3",
    precision="high",  # A TPU's default, bfloat16, is visibly coarser.
  )

  return _interpolate(jnp.clip(fine, 0, 1), _FINENESS * sources)


def _interpolate(images: jax.Array, sources: jax.Array) -> jax.Array:
  """Interpolates linearly; 0 outside of an image.

  A TPU gathers one number at a time. There the same sums are matrix products,
  which would be slower on a CPU.

  Args:
    images: [B, height, width, channels].
    sources: [B, 2, rows, columns], the (row, column) that each value is at.

  Returns:
    [B, rows, columns, channels].
  """
  return lax.platform_dependent(
    images,
    sources,
    tpu=jax.vmap(_interpolate_by_products),
    default=jax.vmap(_interpolate_by_gathers),
  )


def _interpolate_by_gathers(image, sources):
  def resample(channel):
    return jax.scipy.ndimage.map_coordinates(channel, [*sources], order=1)

  return jax.vmap(resample, in_axes=-1, out_axes=-1)(image)


def _interpolate_by_products(image, sources):
  """Sums all pixels, with weights that fall from 1 to 0 within one pixel."""

  def weights(positions, size):  # [size, values]
    distances = positions.ravel() - jnp.arange(size)[:, None]
    return jnp.maximum(1 - jnp.abs(distances), 0)

  height, width, _ = image.shape
  lines = jnp.einsum(
    "hwc,wv->chv", image, weights(sources[1], width), precision="high"
  )
  values = (lines * weights(sources[0], height)).sum(axis=1)
  return values.T.reshape(*sources.shape[1:], -1)


class Order(struct.PyTreeNode):
  """Where training stands in its endless sequence of shuffled epochs.

  Attributes:
    epoch: int32 scalar, counted from 0.
    offset: int32 scalar, how many examples of the epoch were taken.
    indices: int32 [2 * n], the order of this epoch and of the next: a batch may
      begin in one and end in the other.
  """

  epoch: jax.Array
  offset: jax.Array
  indices: jax.Array


def epoch_indices(rng: jax.Array, epoch: jax.Array, size: int) -> jax.Array:
  """The order of one epoch: a permutation of range(size), int32 [size]."""
  return jax.random.permutation(jax.random.fold_in(rng, epoch), size)


@functools.partial(jax.jit, static_argnames=("size",))
def _order(rng, epoch, offset, size):
  indices = [epoch_indices(rng, epoch + i, size) for i in (0, 1)]
  return Order(epoch, offset, jnp.concatenate(indices))


def order_at(rng: jax.Array, step: int, batch_size: int, size: int) -> Order:
  """The order as it stands before a step; needs nothing of the steps before.

  Args:
    rng: the random key that all epochs' permutations come from.
    step: counted from 0.
    batch_size: at most `size`.
    size: how many examples an epoch has.
  """
  epoch, offset = divmod(step * batch_size, size)
  return _order(rng, jnp.int32(epoch), jnp.int32(offset), size)


def next_indices(
  order: Order, rng: jax.Array, batch_size: int
) -> tuple[jax.Array, Order]:
  """The examples of the next batch, int32 [batch_size], and the order after."""
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
