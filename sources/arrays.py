"""Keeps the images and labels of data sets in files of arrays."""

from collections.abc import Callable
from collections.abc import Mapping
import functools
import os
import pathlib
from typing import Any
from typing import NamedTuple
import zipfile

from absl import logging
import numpy as np
import tensorflow_datasets as tfds
import tqdm

from machine import errors


class Examples(NamedTuple):
  """Images, uint8 [n, height, width, channels], and labels, integers [n]."""

  images: np.ndarray
  labels: np.ndarray

  @property
  def num_examples(self) -> int:
    return len(self.labels)


class Source(NamedTuple):
  """The content of a data set.

  Attributes:
    class_names: the names of labels 0, 1, ...
    splits: objects with `num_examples`, by the split's name.
    read: returns the examples of a split.
  """

  class_names: tuple[str, ...]
  splits: Mapping[str, Any]
  read: Callable[[str], Examples]


def in_memory(
  class_names: tuple[str, ...], splits: Mapping[str, Examples]
) -> Source:
  """Makes a Source of the examples of each split."""
  splits = {
    split: Examples(images, labels.astype(np.int32))
    for split, (images, labels) in splits.items()
  }
  return Source(class_names, splits, splits.__getitem__)


def from_values(
  splits: Mapping[str, Examples], name: Callable[[int], str] = str
) -> Source:
  """Makes a Source of labels of any values, whose classes `name` names."""
  labels = [examples.labels.astype(np.int64) for examples in splits.values()]
  values = np.unique(np.concatenate(labels))
  return in_memory(
    tuple(map(name, values.tolist())),
    {
      split: Examples(images, np.searchsorted(values, labels))
      for split, (images, labels) in splits.items()
    },
  )


def cached(path: pathlib.Path, make: Callable[[], Source]) -> Source:
  """Reads a file of arrays; if it is missing or damaged, makes it again."""
  try:
    return _read(path)
  except FileNotFoundError:
    logging.info("Preparing %s", path)
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    logging.warning("%s is damaged and made again: %s", path, error)
  source = make()
  try:
    _write(path, source)
  except OSError as error:
    logging.warning("cannot write %s (%s); startup will stay slow", path, error)
  return source


def _read(path: pathlib.Path) -> Source:
  # NumPy checks the CRC that the zip format stores for each array.
  with np.load(path, allow_pickle=False) as arrays:
    splits = [
      name.removesuffix("_labels")
      for name in arrays
      if name.endswith("_labels")
    ]
    return in_memory(
      tuple(arrays["class_names"].tolist()),
      {
        split: Examples(arrays[f"{split}_images"], arrays[f"{split}_labels"])
        for split in splits
      },
    )


def _write(path: pathlib.Path, source: Source) -> None:
  """Writes a file; if that fails, nothing is left of it."""
  arrays: dict[str, Any] = {"class_names": np.array(source.class_names)}
  for split in source.splits:
    arrays[f"{split}_images"], arrays[f"{split}_labels"] = source.read(split)
  temporary = path.with_name(f"{path.name}.{os.getpid()}.incomplete")
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    with open(temporary, "wb") as file:
      np.savez(file, **arrays)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def open_records(builder: tfds.core.DatasetBuilder) -> Source:
  """Opens a data set that TFDS has prepared; reads a split when it is asked."""

  def make(split):
    return in_memory((), {split: read_records(builder, split)})

  def read(split):
    path = pathlib.Path(builder.data_dir, f"{split}.npz")
    return cached(path, functools.partial(make, split)).read(split)

  class_names = tuple(builder.info.features["label"].names)
  return Source(class_names, builder.info.splits, read)


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
  return Examples(images, labels)
