"""Reads a folder of images with one subfolder per class: `train/cat/1.png`.

TFDS's own `ImageFolder` needs TensorFlow to list and read the files.
"""

import collections
import pathlib
import random

import numpy as np
from PIL import Image
from PIL import ImageOps
import tqdm

from machine import errors
from sources import image_files
from sources import own_images

_SPLITS = ("train", "validation", "valid", "val", "test")


def find(manual_dir: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns the path of each image by its name, such as "train/cat/1.png".

  If no subfolder is named after a split, the subfolders are the classes, and
  all images belong to "train".
  """
  formats = image_files.supported_formats()
  extensions = Image.registered_extensions()
  has_splits = any((manual_dir / split).is_dir() for split in _SPLITS)
  found = {}
  for path in sorted(manual_dir.glob("*/*/*" if has_splits else "*/*")):
    parts = path.relative_to(manual_dir).parts
    *before, label, name = parts
    split = before[0] if before else "train"
    if (
      split in _SPLITS
      and extensions.get(path.suffix.lower()) in formats
      # Skip the hidden files and folders that macOS and Jupyter leave.
      and not any(part.startswith((".", "__MACOSX")) for part in parts)
    ):
      found[f"{split}/{label}/{name}"] = path
  return found


def read(paths: dict[str, pathlib.Path]) -> own_images.Source:
  """Reads the images that `find` returned.

  Raises:
    errors.UserError: if an image cannot be read; the message names it.
  """
  class_names = sorted({name.split("/")[1] for name in paths})
  for label in class_names:
    if not label.isprintable():
      raise errors.UserError(
        f"{label!r}: the name of a class must be printable"
      )
  first = next(iter(paths.values()))
  image_shape = _read(first).shape
  splits = collections.defaultdict(list)
  for name, path in paths.items():
    split, label, _ = name.split("/")
    splits[split].append((path, class_names.index(label)))

  with tqdm.tqdm(
    desc="Reading images", total=len(paths), disable=None
  ) as progress:

    def read_split(files):
      # Shuffle, so that a slice of a split, such as train[:10%], has all
      # classes.
      random.Random(0).shuffle(files)
      images = np.empty((len(files), *image_shape), np.uint8)
      for index, (path, _) in enumerate(files):
        image = _read(path)
        if image.shape != image_shape:
          raise errors.UserError(
            f"{path}: is {_describe(image.shape)}, but {first} is"
            f" {_describe(image_shape)}; all must have one size, and be all"
            " gray or all RGB: convert a copy of the folder, for example with"
            " ImageMagick"
          )
        images[index] = image
        progress.update()
      return images, np.array([label for _, label in files])

    return own_images.Source(
      image_shape,
      tuple(class_names),
      {split: read_split(files) for split, files in splits.items()},
    )


def _read(path: pathlib.Path) -> np.ndarray:
  """Returns an image as uint8 [height, width, 1 or 3]."""
  try:
    with Image.open(path, formats=image_files.supported_formats()) as opened:
      image = ImageOps.exif_transpose(opened)
    if image.mode in ("LA", "RGBA") and image.getextrema()[-1] == (255, 255):
      image = image.convert(image.mode[:-1])  # The whole image is opaque.
    mode = {"1": "L", "P": "RGB"}.get(image.mode, image.mode)
    if mode not in ("L", "RGB") or image.has_transparency_data:
      raise ValueError(
        f"its mode is {image.mode}; must be opaque 8-bit gray or RGB"
      )
    pixels = np.asarray(image.convert(mode))
  except Exception as error:  # Pillow's decoders may raise anything.
    raise errors.UserError(f"{path}: cannot be read: {error}") from error
  return pixels.reshape(*pixels.shape[:2], -1)


def _describe(image_shape: tuple[int, int, int]) -> str:
  height, width, channels = image_shape
  return f"{width}x{height} {'gray' if channels == 1 else 'RGB'}"
