"""Reads files of arrays: Keras' and MedMNIST's .npz, Kaggle's train.csv."""

import pathlib
import re
import warnings

from absl import logging
import ml_collections
import numpy as np

from machine import errors
from sources import arrays
from sources import image_folder

FILES = "a .npz with x_train and y_train or a train.csv with a column `label`"
_NAMES = (("x_{}", "y_{}"), ("X_{}", "y_{}"), ("{}_images", "{}_labels"))
_SPLIT = "|".join(image_folder.SPLITS)
_FILE = re.compile(rf"(?:.+[-_])?({_SPLIT})\.csv|.+\.npz", re.IGNORECASE)


def find(manual_dir: pathlib.Path, dataset: str) -> dict[str, pathlib.Path]:
  """Returns the files of "arrays", or those of "arrays/NAME": NAME*."""
  name = dataset.partition("/")[2]
  paths = sorted(manual_dir.glob(f"{name}*"), reverse=True)
  # MedMNIST has pathmnist.npz and pathmnist_64.npz.
  paths = [path for path in paths if path.stem == name] or paths
  return {path.name: path for path in paths if _FILE.fullmatch(path.name)}


def read(
  paths: dict[str, pathlib.Path], config: ml_collections.ConfigDict
) -> arrays.Source:
  """Reads the files of a data set; a UserError names one that is wrong."""
  del config  # Only the files say what they hold.
  splits: dict[str, arrays.Examples] = {}
  for path in paths.values():
    try:
      is_csv = path.suffix.lower() == ".csv"
      found = _read_csv(path) if is_csv else _read_npz(path)
      if not found and not splits:
        raise ValueError("has no column `label`")
      if found.keys() & splits:
        raise ValueError(f"is another set; pick one by arrays/{path.name}")
      splits |= {split: _checked(*pair) for split, pair in found.items()}
      if len({images.shape[1:] for images, _ in splits.values()}) > 1:
        raise ValueError("has images of several sizes; all must have one")
    except Exception as error:  # NumPy may raise anything.
      raise errors.UserError(f"{path}: {error}") from error
  return arrays.from_values(splits)


def _read_npz(path):
  found = {}
  with np.load(path, allow_pickle=False) as file:
    for split, name in image_folder.SPLITS.items():
      for x, y in _NAMES:
        if x.format(split) in file and y.format(split) in file:
          found[name] = file[x.format(split)], file[y.format(split)]
    if not found:
      raise ValueError(f"has {', '.join(file)}, but not x_train and y_train")
  return found


def _read_csv(path):
  with open(path, encoding="utf-8-sig") as file:
    header = [cell.strip('" \n') for cell in file.readline().split(",")]
  split = image_folder.SPLITS[_FILE.fullmatch(path.name)[1].lower()]
  if "label" not in header:
    logging.info("%s: passed over, because it has no column `label`", path)
    return {}
  label = header.index("label")
  with warnings.catch_warnings(action="error"):  # It may have no rows.
    values = np.loadtxt(path, np.uint8, delimiter=",", skiprows=1, ndmin=2)
  return {split: (np.delete(values, label, axis=1), values[:, label])}


def _checked(images, labels):
  """Returns images as uint8 [n, height, width, channels], and labels as [n]."""
  found = f"has {images.dtype} {images.shape}, {labels.dtype} {labels.shape}"
  if images.ndim == 2 and (side := images.shape[1] ** 0.5).is_integer():
    images = images.reshape(len(images), int(side), int(side))
  if images.ndim == 3:
    images = images[..., np.newaxis]
  valid = images.dtype == np.uint8 and images.shape[3:] in ((1,), (3,))
  valid &= images.size > 0
  if not (valid and labels.dtype.kind in "ui" and labels.size == len(images)):
    raise ValueError(
      f"{found}; must be uint8 (n, height, width[, 3]) and n integers, n > 0"
    )
  return arrays.Examples(images, labels.ravel())
