"""Keeps the images and labels of a data set as arrays, in its folder."""

import json
import os
import pathlib
import zipfile

from absl import logging
import numpy as np
import tensorflow_datasets as tfds
import tqdm

from machine import errors


class DamagedError(errors.UserError):
  """Raised if a split's arrays cannot be read, and it has no records."""


def read_split(
  builder: tfds.core.DatasetBuilder, split: str
) -> tuple[np.ndarray, np.ndarray]:
  """Reads a split's images, [n, height, width, channels], and its labels.

  They come from the split's array file. If that is missing, outdated or
  damaged, it is rebuilt from the records.

  Raises:
    DamagedError: if there are no records to rebuild it from.
  """
  folder = pathlib.Path(builder.data_dir)
  source = _fingerprint(builder, split)
  path = _path(folder, split)
  problem = "is missing"
  try:
    # NumPy checks the CRC that the zip format stores for each array.
    with np.load(path, allow_pickle=False) as arrays:
      if arrays["source"].item() == source:
        return arrays["images"], arrays["labels"]
    problem = "is outdated"
  except FileNotFoundError:
    pass
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    problem = f"is damaged ({error})"
  if not source:
    raise DamagedError(f"{path} {problem}")
  if problem != "is missing":  # As it is at the first start.
    logging.warning("%s %s; rebuilding it", path, problem)
  images, labels = read_records(builder, split)
  try:
    write(folder, split, images, labels, source)
  except OSError as error:
    logging.warning("cannot write %s (%s); startup will stay slow", path, error)
  return images, labels


def write(
  folder: pathlib.Path,
  split: str,
  images: np.ndarray,
  labels: np.ndarray,
  source: str = "",
) -> None:
  """Writes the array file of a split.

  Args:
    folder: the folder of the data set.
    split: its name.
    images: uint8 [n, height, width, channels].
    labels: integers [n].
    source: a fingerprint of the records that they were read from, if any.

  Raises:
    OSError: if it cannot be written; nothing is left of it then.
  """
  path = _path(folder, split)
  temporary = path.with_name(f"{path.name}.{os.getpid()}.incomplete")
  try:
    with open(temporary, "wb") as file:
      np.savez(
        file, source=source, images=images, labels=labels.astype(np.int32)
      )
    os.replace(temporary, path)
  except OSError:
    temporary.unlink(missing_ok=True)
    raise


def _path(folder: pathlib.Path, split: str) -> pathlib.Path:
  return folder / f"{split}.arrays.npz"


def _fingerprint(builder: tfds.core.DatasetBuilder, split: str) -> str:
  """Identifies a split's records by names, sizes and times; "" without any."""
  paths = map(pathlib.Path, builder.info.splits[split].filepaths)
  records = [path for path in paths if path.exists()]
  if not records:
    return ""
  info = pathlib.Path(builder.data_dir) / "dataset_info.json"
  stats = [(path.name, path.stat()) for path in (info, *records)]
  return json.dumps([(name, s.st_size, s.st_mtime_ns) for name, s in stats])


def read_records(
  builder: tfds.core.DatasetBuilder, split: str
) -> tuple[np.ndarray, np.ndarray]:
  """Reads a split's images and labels from its records, which takes seconds."""
  size = builder.info.splits[split].num_examples
  images = np.empty((size, *builder.info.features["image"].shape), np.uint8)
  labels = np.empty(size, np.int32)
  progress = tqdm.tqdm(desc=f"Reading {split}", total=size, disable=None)
  try:
    records = builder.as_data_source(split)
    for start in range(0, size, 1000):  # Twice as fast as one at a time.
      chunk = records.__getitems__(range(start, min(start + 1000, size)))
      for index, example in enumerate(chunk, start):
        images[index], labels[index] = example["image"], example["label"]
      progress.update(len(chunk))
  except Exception as error:  # TFDS and array_record may raise anything.
    raise errors.UserError(
      f"{builder.data_dir}: the records of {split} are damaged: {error};"
      " remove this directory and run again"
    ) from error
  finally:
    progress.close()
  return images, labels
