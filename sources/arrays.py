"""Reads a prepared data set as arrays, and caches them in its folder."""

import json
import os
import pathlib
import zipfile

from absl import app
from absl import logging
import numpy as np
import tensorflow_datasets as tfds
import tqdm


def read_split(
  builder: tfds.core.DatasetBuilder, split: str
) -> tuple[np.ndarray, np.ndarray]:
  """Reads a split's images, [n, height, width, channels], and its labels.

  They come from the split's array file. If that is missing, outdated or
  damaged, it is rebuilt from the records.
  """
  folder = pathlib.Path(builder.data_dir)
  files = [folder / "dataset_info.json"]
  files += map(pathlib.Path, builder.info.splits[split].filepaths)
  # Fingerprint of the source files; if it changes, the arrays are rebuilt.
  source = json.dumps(
    [
      (file.name, file.stat().st_size, file.stat().st_mtime_ns)
      for file in files
    ]
  )
  path = folder / f"{split}.arrays.npz"
  try:
    # NumPy checks the CRC that the zip format stores for each array.
    with np.load(path, allow_pickle=False) as arrays:
      if arrays["source"].item() == source:
        return arrays["images"], arrays["labels"]
    logging.info("%s is outdated; rebuilding it", path)
  except FileNotFoundError:
    pass
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    logging.warning("%s is damaged (%s); rebuilding it", path, error)
  images, labels = read_records(builder, split)
  temporary = path.with_name(f"{path.name}.{os.getpid()}.incomplete")
  try:
    with open(temporary, "wb") as file:
      np.savez(file, source=source, images=images, labels=labels)
    os.replace(temporary, path)
  except OSError as error:
    temporary.unlink(missing_ok=True)
    logging.warning("cannot write %s (%s); startup will stay slow", path, error)
  return images, labels


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
    raise app.UsageError(
      f"{builder.data_dir}: the records of {split} are damaged: {error};"
      " remove this directory and run again"
    ) from error
  finally:
    progress.close()
  return images, labels
