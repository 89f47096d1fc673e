"""Reads a folder of images with one subfolder per class: `train/cat/1.png`.

TFDS's own `ImageFolder` needs TensorFlow to list and read the files.
"""

import collections
import math
import pathlib
import random

from absl import logging
import ml_collections
import numpy as np
import tqdm

from machine import devices
from machine import errors
from sources import arrays
from sources import image_files

FILES = "a subfolder of images for each class, such as train/cat and test/cat"
SPLITS = {
  **dict.fromkeys(("train", "training"), "train"),
  **dict.fromkeys(("validation", "valid", "val"), "validation"),
  **dict.fromkeys(("test", "testing"), "test"),
}


def find(manual_dir: pathlib.Path, dataset: str) -> dict[str, pathlib.Path]:
  """Returns the path of each image by its name, such as "train/cat/1.png".

  If no subfolder is a split, the subfolders are the classes, and all images
  belong to "train".
  """
  del dataset  # A folder holds only one.
  images, others = image_files.find(manual_dir)
  # A class may be called "train" too, but then its images lie directly in it.
  depths = collections.Counter(
    (path.parts[0], len(path.parts) > 2)
    for path in images
    if len(path.parts) > 1
  )
  tops = {folder for folder, _ in depths}
  splits = {folder for folder in tops if folder.lower() in SPLITS}
  has_splits = splits == tops or any(
    depths[folder, True] > depths[folder, False] for folder in splits
  )
  found: dict[str, pathlib.Path] = {}
  for path in images:
    parts = path.parts
    split = SPLITS.get(parts[0].lower()) if has_splits else "train"
    below = parts[1:] if has_splits else parts
    name = "/".join((split or "", *below))
    is_one = path.suffix.lower() != ".npy"  # An array may be many images.
    if split and len(below) > 1 and name not in found and is_one:
      found[name] = manual_dir / path
    else:
      others.append(path)
  if others:
    logging.info(
      "Passed over %d files in %s that are hidden, are not images or are not in"
      " a class's folder: %s",
      len(others),
      manual_dir,
      ", ".join(map(str, sorted(others)[:3])) + ", ..." * (len(others) > 3),
    )
  return found


def read(
  paths: dict[str, pathlib.Path], config: ml_collections.ConfigDict
) -> arrays.Source:
  """Reads the images that `find` returned.

  If one of them is in color, all become RGB.

  Args:
    paths: the path of each image by its name.
    config: its `image_size` is the height and width to scale and crop them to;
      0 takes them as they are.

  Raises:
    errors.UserError: if an image cannot be used; the message names it.
  """
  class_names = sorted({name.split("/")[1] for name in paths})
  for label in class_names:
    if not label.isprintable():
      raise errors.UserError(
        f"{label!r}: the name of a class must be printable"
      )
  image_size = config.image_size
  first = next(iter(paths.values()))
  shape = (image_size, image_size)
  if not image_size:
    shape = _read(first, 0).shape[:2]
  memory = devices.host_memory()
  each = memory // 6 // len(paths)  # Pixels, if they are RGB and copied once.
  if math.prod(shape) > each:
    raise errors.UserError(
      f"{first} and {len(paths) - 1:,} more images of {_describe(shape)} do not"
      f" fit into this machine's memory of {memory / 1e9:.0f} GB; set"
      f" --config.image_size to at most {math.isqrt(each)}"
    )
  examples = collections.defaultdict(list)
  for name, path in tqdm.tqdm(paths.items(), "Reading images", disable=None):
    image = _read(path, image_size)
    if image.shape[:2] != shape:
      raise errors.UserError(
        f"{path}: is {_describe(image.shape)}, but {first} is"
        f" {_describe(shape)}; set --config.image_size to scale and crop all"
        " images to one size"
      )
    split, label, _ = name.split("/", 2)
    examples[split].append((image, class_names.index(label)))
  is_color = any(image.ndim == 3 for s in examples for image, _ in examples[s])
  splits = {}
  for split, pairs in examples.items():
    # Shuffle, so that a slice of a split, such as train[:10%], has all classes.
    random.Random(0).shuffle(pairs)
    images = np.empty((len(pairs), *shape, 3 if is_color else 1), np.uint8)
    for index, (image, _) in enumerate(pairs):
      images[index] = image.reshape(*shape, -1)
    labels = np.array([label for _, label in pairs])
    splits[split] = arrays.Examples(images, labels)
  return arrays.in_memory(tuple(class_names), splits)


def _read(path: pathlib.Path, image_size: int) -> np.ndarray:
  """Returns an image as uint8 [height, width] or [height, width, 3]."""
  try:
    return next(image_files.read(path, fit=image_size))
  except ValueError as error:
    raise errors.UserError(f"{path}: {error}") from error


def _describe(shape: tuple[int, ...]) -> str:
  return f"{shape[1]}x{shape[0]}"
