"""Keeps the images and labels of data sets in files of arrays."""

from collections.abc import Callable
from collections.abc import Mapping
import functools
import os
import pathlib
import types
from typing import Any
from typing import NamedTuple
import zipfile

from absl import logging
import numpy as np
import tensorflow_datasets as tfds
import tqdm

from machine import errors

Examples = tuple[np.ndarray, np.ndarray]


class Source(NamedTuple):
  """The content of a data set.

  Attributes:
    class_names: the names of labels 0, 1, ...
    splits: each split's images, uint8 [n, height, width, channels], and labels,
      integers [n], by the split's name.
  """

  class_names: tuple[str, ...]
  splits: Mapping[str, Examples]


class Prepared(NamedTuple):
  """A data set that is ready to be read.

  Attributes:
    class_names: the names of labels 0, 1, ...
    splits: objects with `num_examples`, by the split's name.
    read: returns the images and labels of a split.
  """

  class_names: tuple[str, ...]
  splits: Mapping[str, Any]
  read: Callable[[str], Examples]


class DamagedError(errors.UserError):
  """Raised if a file cannot be read."""


def from_values(
  splits: Mapping[str, Examples], name: Callable[[int], str] = str
) -> Source:
  """Makes a Source of labels of any values, whose classes `name` names."""
  labels = [labels.astype(np.int64) for _, labels in splits.values()]
  values = np.unique(np.concatenate(labels))
  return Source(
    tuple(map(name, values.tolist())),
    {
      split: (images, np.searchsorted(values, labels))
      for split, (images, labels) in splits.items()
    },
  )


def write(path: pathlib.Path, source: Source) -> None:
  """Writes a file for `open_file`.

  Raises:
    OSError: if it cannot be written; nothing is left of it then.
  """
  arrays: dict[str, Any] = {"class_names": np.array(source.class_names)}
  for split, (images, labels) in source.splits.items():
    arrays[f"{split}_images"] = images
    arrays[f"{split}_labels"] = labels.astype(np.int32)
  temporary = path.with_name(f"{path.name}.{os.getpid()}.incomplete")
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    with open(temporary, "wb") as file:
      np.savez(file, **arrays)
    os.replace(temporary, path)
  except OSError:
    temporary.unlink(missing_ok=True)
    raise


def open_file(path: pathlib.Path) -> Prepared:
  """Opens a file from `write`; images are read when they are asked for."""
  names = [n for n in _read(path) if n.endswith("_labels")]
  class_names, *labels = _read(path, "class_names", *names)
  return Prepared(
    tuple(class_names.tolist()),
    {
      name.removesuffix("_labels"): types.SimpleNamespace(
        num_examples=each.size
      )
      for name, each in zip(names, labels, strict=True)
    },
    lambda split: tuple(_read(path, f"{split}_images", f"{split}_labels")),
  )


def _read(path: pathlib.Path, *names: str) -> list:
  """Returns arrays in a file, or the names of all."""
  try:
    # NumPy checks the CRC that the zip format stores for each array.
    with np.load(path, allow_pickle=False) as arrays:
      return [arrays[name] for name in names] or [*arrays]
  except FileNotFoundError:
    raise
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise DamagedError(
      f"{path}: is damaged; remove it to make it again"
    ) from error


def open_records(builder: tfds.core.DatasetBuilder) -> Prepared:
  """Opens a data set that TFDS has prepared."""
  return Prepared(
    tuple(builder.info.features["label"].names),
    builder.info.splits,
    functools.partial(_read_cached, builder),
  )


def _read_cached(builder: tfds.core.DatasetBuilder, split: str) -> Examples:
  """Reads a split from its array file, which is made from the records."""
  path = pathlib.Path(builder.data_dir) / f"{split}.npz"
  try:
    images, labels = _read(path, f"{split}_images", f"{split}_labels")
    return images, labels
  except FileNotFoundError:  # As at the first start.
    pass
  except DamagedError as error:
    logging.warning("%s: this is done now", error)
  examples = read_records(builder, split)
  try:
    write(path, Source((), {split: examples}))
  except OSError as error:
    logging.warning("cannot write %s (%s); startup will stay slow", path, error)
  return examples


def read_records(builder: tfds.core.DatasetBuilder, split: str) -> Examples:
  """Reads a split's images and labels from its records, which takes seconds."""
  size = builder.info.splits[split].num_examples
  images = np.empty((size, *builder.info.features["image"].shape), np.uint8)
  labels = np.empty(size, np.int32)
  step = 1000  # Twice as fast as one at a time.
  try:
    records = builder.as_data_source(split)
    for start in tqdm.trange(
      0, size, step, desc=f"Reading {split}", disable=None
    ):
      chunk = records.__getitems__(range(start, min(start + step, size)))
      for index, example in enumerate(chunk, start):
        images[index], labels[index] = example["image"], example["label"]
  except Exception as error:  # TFDS and array_record may raise anything.
    raise errors.UserError(
      f"{builder.data_dir}: the records of {split} are damaged: {error};"
      " remove this directory and run again"
    ) from error
  return images, labels
