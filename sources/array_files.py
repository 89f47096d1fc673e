"""Reads files of arrays: Keras' and MedMNIST's .npz, Kaggle's train.csv."""

import math
import pathlib
import re

from absl import logging
import numpy as np

from machine import errors
from sources import arrays
from sources import image_folder

FILES = (
  "a .npz file of x_train and y_train or of train_images and train_labels, or a"
  " train.csv with a column `label` and one for each pixel"
)
_NAMES = (("x_{}", "y_{}"), ("X_{}", "y_{}"), ("{}_images", "{}_labels"))
_SPLIT = "|".join(image_folder.SPLITS)
_FILE = re.compile(rf"(?:.+[-_])?({_SPLIT})\.csv|.+\.npz", re.IGNORECASE)


def find(manual_dir: pathlib.Path, dataset: str) -> dict[str, pathlib.Path]:
  """Returns the files of "arrays", or those of "arrays/NAME": NAME*."""
  name = dataset.partition("/")[2]
  paths = sorted(manual_dir.glob(f"{name}*"))
  return {path.name: path for path in paths if _FILE.fullmatch(path.name)}


def read(paths: dict[str, pathlib.Path], dataset: str) -> arrays.Source:
  """Reads the files of a data set; a UserError names one that is wrong."""
  splits: dict[str, tuple] = {}
  for path in paths.values():
    try:
      found = _read_csv(path) if path.suffix == ".csv" else _read_npz(path)
      if found.keys() & splits:
        raise ValueError(f"is another set; pick one by {dataset}/NAME")
      splits |= {split: _checked(*pair) for split, pair in found.items()}
      if len({images.shape[1:] for images, _ in splits.values()}) > 1:
        raise ValueError("has images of several sizes; all must have one")
    except Exception as error:  # NumPy may raise anything.
      raise errors.UserError(f"{path}: {error}") from error
  return arrays.from_values(splits)


def _read_npz(path):
  with np.load(path, allow_pickle=False) as file:
    found = {
      name: (file[x.format(split)], file[y.format(split)])
      for split, name in image_folder.SPLITS.items()
      for x, y in _NAMES
      if {x.format(split), y.format(split)} <= {*file}
    }
    if not found:
      raise ValueError(f"has {', '.join(file)}; must be {FILES}")
  return found


def _read_csv(path):
  with open(path) as file:
    header = [cell.strip('" \n') for cell in file.readline().split(",")]
  split = image_folder.SPLITS[_FILE.fullmatch(path.name)[1].lower()]
  if "label" not in header and split == "test":
    logging.info("%s: passed over, because it has no column `label`", path)
    return {}
  values = np.loadtxt(path, int, delimiter=",", skiprows=1, ndmin=2)
  label = header.index("label")
  return {split: (np.delete(values, label, axis=1), values[:, label])}


def _checked(images, labels):
  """Returns images as uint8 [n, height, width, channels], and labels as [n]."""
  if images.ndim == 2:
    images = images.reshape(-1, *[math.isqrt(images.shape[1])] * 2)
  if images.ndim == 3:
    images = images[..., np.newaxis]
  is_integer = images.dtype.kind in "ui" and labels.dtype.kind in "ui"
  is_image = images.ndim == 4 and images.shape[-1] in (1, 3) and images.size
  if not (is_integer and is_image and labels.size == len(images)) or (
    images.min() < 0 or images.max() > 255
  ):
    raise ValueError(
      f"{images.dtype} {list(images.shape)} and {labels.dtype}"
      f" {list(labels.shape)}; must be integers from 0 to 255, [n, height,"
      " width] or [n, height, width, 3], and n integers"
    )
  return images.astype(np.uint8), labels.ravel()
