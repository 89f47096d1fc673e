"""Reads image files as arrays."""

from collections.abc import Iterator
import contextlib
import functools
import io
import os
import pathlib
import warnings

import numpy as np
from PIL import Image
from PIL import ImageOps
from PIL import ImageSequence

from machine import directories
from sources import photographs

# Formats decoded in this process; for others, Pillow may start other programs.
_FORMATS = "PNG JPEG WEBP BMP GIF TIFF PPM AVIF HEIF".split()
_SUFFIXES = (
  ".png .apng .jpg .jpeg .jpe .jfif .webp .bmp .gif .tif .tiff .pbm .pgm .ppm"
  " .pnm .avif .heic .heif .npy".split()
)
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
_NPY_MAGIC = b"\x93NUMPY"
_MAX_GIVEN = 1200  # Longer sides are shrunk to this, to save memory.


def find(
  folder: pathlib.Path,
) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
  """Returns the images in a folder, at any depth, and the other files there.

  Hidden files and the pictures of runs count as other files. The paths are
  relative to the folder.
  """
  images: list[pathlib.Path] = []
  others: list[pathlib.Path] = []
  for parent, folders, names in directories.walk(folder):
    is_run = "config.json" in names and "checkpoints" in folders
    if is_run:
      folders.clear()
    for name in names:
      path = (parent / name).relative_to(folder)
      is_image = (
        path.suffix.lower() in _SUFFIXES
        and os.path.isfile(folder / path)  # Not a pipe or a link to nowhere.
        and not is_run
        # macOS and Jupyter leave hidden files and folders.
        and not any(part.startswith((".", "__MACOSX")) for part in path.parts)
      )
      (images if is_image else others).append(path)
  return sorted(images), sorted(others)


def read(
  source: pathlib.Path | bytes, fit: int | None = None
) -> Iterator[np.ndarray]:
  """Yields the images in a file; TIFF, GIF and .npy files can have several.

  Args:
    source: a path, or the content of a file.
    fit: for a run on photographs, its `config.image_size`; None for drawings.

  Yields:
    uint8 [height, width] or [height, width, 3], as a person would see it.

  Raises:
    ValueError: if the file cannot be read; the message says why.
  """
  try:
    content = source if isinstance(source, bytes) else source.read_bytes()
  except IsADirectoryError as error:
    raise ValueError("is a folder without images") from error
  except OSError as error:
    raise ValueError(error.strerror) from error
  if not content:
    raise ValueError("is empty")
  if content.startswith(_NPY_MAGIC):
    yield from _read_array(content)
  else:
    with _opened(content) as opened_image:
      for image in ImageSequence.Iterator(opened_image):
        ImageOps.exif_transpose(image, in_place=True)
        yield _as_drawn(image) if fit is None else _fitted(image, fit)
        if image.format not in ("TIFF", "GIF"):
          break  # A telephone's JPEG may also have a preview.


def _read_array(content: bytes) -> Iterator[np.ndarray]:
  """Returns the images in a .npy file."""
  try:
    with warnings.catch_warnings(action="ignore"):
      array = np.load(io.BytesIO(content), allow_pickle=False)
  except Exception as error:  # NumPy's header parser may raise anything.
    reason = str(error).splitlines()[0]
    raise ValueError(f"cannot be read as an array: {reason}") from error
  found = f"is an array of {array.dtype} {list(array.shape)}"
  if array.ndim == 2 and array.shape[1] == 784:
    array = array.reshape(-1, 28, 28)
  if array.shape[-1:] not in ((1,), (3,), (4,)):
    array = array[..., None]
  if array.ndim == 3:
    array = array[None]
  if array.ndim != 4 or not array.size or array.dtype.kind not in "buif":
    raise ValueError(
      f"{found}; must be numbers, [height, width], [height, width, 1, 3 or 4],"
      " n such images, or [n, 784]"
    )
  images = _to_uint8(array)
  if images.shape[-1] == 1:
    images = images[..., 0]
  elif images.shape[-1] == 4:
    return (_flatten(image.astype(np.float32)) for image in images)
  return iter(images)


def _to_uint8(values: np.ndarray) -> np.ndarray:
  """Scales values in [0, 1], or of 8, 12 or 16 bits, to uint8."""
  smallest, largest = np.min(values), np.max(values)
  # Resampling may exceed 1, which is not yet a scale of 255. NaN fails too.
  if not (smallest >= 0 and (largest <= 1 or 2 <= largest <= 65535)):
    raise ValueError(
      f"has values from {smallest:g} to {largest:g}; must be 0 to 1, 0 to 255"
      " or 0 to 65535"
    )
  if values.dtype == np.uint8 and largest > 1:
    return np.asarray(values)
  full = next(full for full in (1, 255, 4095, 65535) if largest <= full)
  return np.round(values * np.float32(255 / full)).astype(np.uint8)


@contextlib.contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
  """Opens an image; decoding it may fail too."""
  formats = supported_formats()
  try:
    too_large = Image.DecompressionBombWarning
    with warnings.catch_warnings(action="error", category=too_large):
      with Image.open(io.BytesIO(content), formats=formats) as image:
        yield image
  except Image.UnidentifiedImageError as error:
    brand = content[8:12] if content[4:8] == b"ftyp" else b""
    if brand == b"avif" and "AVIF" not in formats:
      raise ValueError("is AVIF, which needs Pillow 11.3 or newer") from error
    if brand in _HEIC_BRANDS and "HEIF" not in formats:
      raise ValueError("is HEIC; pip install pillow-heif to read it") from error
    raise ValueError(
      f"is not an image in a supported format ({', '.join(formats)})"
    ) from error
  except (
    Image.DecompressionBombWarning,
    Image.DecompressionBombError,
  ) as error:
    raise ValueError(
      f"is larger than {Image.MAX_IMAGE_PIXELS:,} pixels"
    ) from error
  except Exception as error:  # Pillow's decoders may raise anything.
    raise ValueError(f"cannot be decoded: {error}") from error


def _as_drawn(image: Image.Image) -> np.ndarray:
  """Returns an image with its ink visible, shrunk if it is large."""
  if image.mode.startswith(("I", "F")):  # 16 bits or more.
    image = image.convert("F" if image.mode == "F" else "I")
    image.thumbnail((_MAX_GIVEN, _MAX_GIVEN), Image.Resampling.BOX)
    return _to_uint8(np.asarray(image))
  mode = "L" if image.mode in ("1", "L") else "RGB"
  if image.has_transparency_data:
    mode = "RGBA"
  if image.mode != mode:
    image = image.convert(mode)
  image.thumbnail((_MAX_GIVEN, _MAX_GIVEN))  # Never enlarges.
  if mode == "RGBA":
    return _flatten(np.asarray(image, np.float32))
  return _to_uint8(np.asarray(image))


def _fitted(image: Image.Image, size: int) -> np.ndarray:
  """Returns an image on white, scaled and cropped to a square unless size is 0.

  The result is that of torchvision's Resize(size) and CenterCrop(size).
  """
  if image.mode.startswith(("I", "F")):
    raise ValueError(f"its mode is {image.mode}; must be 8-bit gray or RGB")
  mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image)
  image = image.convert(mode)
  if size:
    shorter = min(image.size)
    width, height = (size * side // shorter for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
  return np.asarray(image)


@functools.cache
def supported_formats() -> list[str]:
  """Returns the formats that Pillow reads, with its HEIC plugin if present."""
  with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()
  Image.init()
  return [name for name in _FORMATS if name in Image.OPEN]


def to_gray(image: np.ndarray) -> np.ndarray:
  """Returns the luma of an image, uint8 [height, width] (ITU-R 601)."""
  return np.asarray(Image.fromarray(image).convert("L"))


def _flatten(rgba: np.ndarray) -> np.ndarray:
  """Puts a transparent image on a background that shows its ink."""
  rgb, alpha = rgba[..., :3], rgba[..., 3:]
  alpha = alpha / max(alpha.max(), 1)  # Makes faint ink opaque.
  visible = to_gray(rgb.astype(np.uint8))[alpha[..., 0] > 0.5]
  background = 255.0
  if visible.size and np.ptp(visible) > 2 * photographs.MIN_CONTRAST:
    background = np.median(visible)  # The image has its own paper.
  elif visible.size and visible.mean() > 127:
    background = 0.0
  flat = rgb * alpha + background * (1 - alpha)
  return np.round(flat).astype(np.uint8)
