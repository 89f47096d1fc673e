"""Image files to arrays."""

from collections.abc import Iterator
import io
import pathlib
import warnings

import numpy as np
from PIL import Image
from PIL import ImageOps

from sources import photographs

# Formats whose decoders Pillow has itself: others may start other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = tuple(
  ".png .jpg .jpeg .webp .bmp .gif .tif .tiff .pgm .ppm .npy".split()
)
_NPY_MAGIC = b"\x93NUMPY"
_SIDE = 28  # Of MNIST's images, in pixels.
_MAX_GIVEN = 1200  # Larger images, by the longer side, only take memory.


def read(source: pathlib.Path | bytes) -> Iterator[np.ndarray]:
  """Yields the images of a file: one, or those of a .npy array.

  Args:
    source: a path, or the content of a file.

  Yields:
    uint8 [height, width] or [height, width, 3], as a person would see it.

  Raises:
    ValueError: says what is wrong with the file.
  """
  try:
    if isinstance(source, bytes):
      file, head = io.BytesIO(source), source[:6]
    else:
      with open(source, "rb") as opened:
        file, head = source, opened.read(6)
  except IsADirectoryError as error:
    raise ValueError("is a folder without images") from error
  except OSError as error:
    raise ValueError(error.strerror) from error
  if not head:
    raise ValueError("is empty")
  if head == _NPY_MAGIC:
    yield from _read_array(file)
  else:
    yield _read_image(file)


def _read_array(file) -> Iterator[np.ndarray]:
  """The images of a .npy file: [height, width] is one."""
  try:
    # Mapped, so that a header cannot claim more memory than the file has.
    mode = None if isinstance(file, io.BytesIO) else "r"
    with warnings.catch_warnings(action="ignore"):
      array = np.load(file, mmap_mode=mode, allow_pickle=False)
  except Exception as error:  # NumPy's parser of headers raises anything.
    reason = str(error).splitlines()[0]
    raise ValueError(f"is not an array that can be read: {reason}") from error
  shape = array.shape
  if array.ndim == 2 and shape[1] == _SIDE**2:  # Flat ones.
    array = array.reshape(-1, _SIDE, _SIDE)
  elif array.ndim == 2 or (array.ndim == 3 and shape[-1] in (1, 3)):
    array = array[None]  # One image.
  if array.ndim == 4 and array.shape[-1] == 1:
    array = array[..., 0]
  is_image = array.ndim == 3 or (array.ndim == 4 and array.shape[-1] == 3)
  if not is_image or not array.size or array.dtype.kind not in "buif":
    raise ValueError(
      f"is an array of {array.dtype} {list(shape)}; accepted are numbers,"
      f" [height, width] or [height, width, 1 or 3], n such images, or [n,"
      f" {_SIDE**2}]"
    )
  return iter(_to_uint8(array))


def _to_uint8(values: np.ndarray) -> np.ndarray:
  """From values up to 1, to 255 (8 bit) or to 65,535 (16 bit)."""
  largest = np.max(values)
  if not (np.min(values) >= 0 and largest < 2**16):  # Or not a number.
    raise ValueError("has values other than 0 to 1, to 255 or to 65535")
  if values.dtype == np.uint8 and largest > 1:
    return np.asarray(values)
  scale = 255 if largest <= 1 else 1 if largest <= 255 else 1 / 257
  return np.round(np.asarray(values, np.float32) * scale).astype(np.uint8)


def _read_image(file) -> np.ndarray:
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("error", Image.DecompressionBombWarning)
      with Image.open(file, formats=_FORMATS) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):  # 16 bit and more.
          image = image.convert("F" if image.mode == "F" else "I")
          image.thumbnail((_MAX_GIVEN, _MAX_GIVEN), Image.Resampling.BOX)
          return _to_uint8(np.asarray(image))
        mode = "L" if image.mode in ("1", "L") else "RGB"
        if image.has_transparency_data:
          mode = "RGBA"
        if image.mode != mode:
          image = image.convert(mode)
        image.thumbnail((_MAX_GIVEN, _MAX_GIVEN))  # Smaller ones stay.
        if mode == "RGBA":
          return _flatten(np.asarray(image, np.float32))
        return np.asarray(image)
  except Image.UnidentifiedImageError as error:
    raise ValueError(f"is none of {', '.join(_FORMATS)}") from error
  except (
    Image.DecompressionBombWarning,
    Image.DecompressionBombError,
  ) as error:
    raise ValueError(
      f"is larger than {Image.MAX_IMAGE_PIXELS:,} pixels"
    ) from error
  except Exception as error:  # Pillow's decoders raise anything.
    raise ValueError(f"cannot be decoded: {error}") from error


def _flatten(rgba: np.ndarray) -> np.ndarray:
  """Puts a transparent image on a background that shows its ink."""
  rgb, alpha = rgba[..., :3], rgba[..., 3:] / 255
  visible = photographs.to_grey(rgb)[alpha[..., 0] > 0.5]
  background = 255.0
  if visible.size and np.ptp(visible) > 2 * photographs.MIN_CONTRAST:
    background = np.median(visible)  # It brings paper of its own.
  elif visible.size and visible.mean() > 127:
    background = 0.0
  flat = rgb * alpha + background * (1 - alpha)
  return np.round(flat).astype(np.uint8)
