"""Reads image files as arrays."""

from collections.abc import Iterator
import contextlib
import functools
import io
import pathlib
import warnings

import numpy as np
from PIL import Image
from PIL import ImageOps

from sources import photographs

# Formats decoded in this process; for others, Pillow may start other programs.
_FORMATS = "PNG JPEG WEBP BMP GIF TIFF PPM AVIF HEIF".split()
SUFFIXES = tuple(
  ".png .jpg .jpeg .webp .bmp .gif .tif .tiff .pgm .ppm .avif .heic .heif"
  " .npy".split()
)
# The axes of arrays: n images of height h, width w and c colors.
LAYOUTS = ("auto", "hw", "hwc", "chw", "nhw", "nhwc", "nchw", "flat")
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
_NPY_MAGIC = b"\x93NUMPY"
_SIDE = 28  # Height and width of MNIST's images.
_MAX_GIVEN = 1200  # Longer sides are shrunk to this, to save memory.


def read(
  source: pathlib.Path | bytes, layout: str = "auto"
) -> Iterator[np.ndarray]:
  """Yields the images in a file: one, or any number from a .npy array.

  Args:
    source: a path, or the content of a file.
    layout: one of LAYOUTS, for .npy files.

  Yields:
    uint8 [height, width] or [height, width, 3], as a person would see it.

  Raises:
    ValueError: if the file cannot be read; the message says why.
  """
  file: io.BytesIO | pathlib.Path
  try:
    if isinstance(source, bytes):
      file, head = io.BytesIO(source), source[:12]
    else:
      with open(source, "rb") as opened:
        file, head = source, opened.read(12)
  except IsADirectoryError as error:
    raise ValueError("is a folder without images") from error
  except OSError as error:
    raise ValueError(error.strerror) from error
  if not head:
    raise ValueError("is empty")
  if head.startswith(_NPY_MAGIC):
    yield from _read_array(file, layout)
  else:
    yield _read_image(file, head)


def _read_array(file, layout: str) -> Iterator[np.ndarray]:
  """Returns the images in a .npy file."""
  try:
    # Memory-mapped, so that no header can claim more memory than the file has.
    is_on_disk = not isinstance(file, io.BytesIO)
    with warnings.catch_warnings(action="ignore"):
      array = np.load(file, "r" if is_on_disk else None, allow_pickle=False)
  except Exception as error:  # NumPy's header parser may raise anything.
    reason = str(error).splitlines()[0]
    raise ValueError(f"cannot be read as an array: {reason}") from error
  found = f"is an array of {array.dtype} {list(array.shape)}"
  if layout == "auto":
    layout = _layout(array.shape, found)
  if layout == "flat" and array.ndim == 2 and array.shape[1] == _SIDE**2:
    array, layout = array.reshape(-1, _SIDE, _SIDE), "nhw"
  if layout != "flat" and array.ndim == len(layout):
    array = array.transpose([layout.index(a) for a in "nhwc" if a in layout])
    if "n" not in layout:
      array = array[None]
    if "c" not in layout:
      array = array[..., None]
  is_image = array.ndim == 4 and array.shape[-1] in (1, 3, 4)
  if not is_image or not array.size or array.dtype.kind not in "buif":
    raise ValueError(
      f"{found}; must be numbers, [height, width], [height, width, 1, 3 or 4],"
      f" n such images, or [n, {_SIDE**2}]; for other axes, use --layout"
    )
  images = _to_uint8(array)
  if images.shape[-1] == 1:
    images = images[..., 0]
  elif images.shape[-1] == 4:
    return (_flatten(image.astype(np.float32)) for image in images)
  return iter(images)


def _layout(shape: tuple[int, ...], found: str) -> str:
  """Infers an array's axes from its shape; raises ValueError if ambiguous."""
  match shape:
    case (n, 784) if 100 <= n <= 2000:
      raise ValueError(
        f"{found}: use --layout=flat if these are {n} images, --layout=hw if it"
        " is one image"
      )
    case (_, 784):
      return "flat"
    case (_, _):
      return "hw"
    case (_, _, 1 | 3 | 4):
      return "hwc"
    case (3 | 4 as n, height, width) if (height, width) != (_SIDE, _SIDE):
      raise ValueError(
        f"{found}: use --layout=nhw if these are {n} images, --layout=chw if it"
        f" is one image of {n} colors"
      )
    case (_, _, _):
      return "nhw"
  return "nhwc"


def _to_uint8(values: np.ndarray) -> np.ndarray:
  """Scales values in [0, 1], or of 8, 12 or 16 bits, to uint8."""
  largest = np.max(values)
  if not (np.min(values) >= 0 and largest <= 65535):  # Also true for NaN.
    raise ValueError(
      "has values outside 0 to 65535; must be 0 to 1, 0 to 255 or 0 to 65535"
    )
  if values.dtype == np.uint8 and largest > 1:
    return np.asarray(values)
  full = next(full for full in (1, 255, 4095, 65535) if largest <= full)
  return np.round(values * np.float32(255 / full)).astype(np.uint8)


def _read_image(file, head: bytes) -> np.ndarray:
  formats = supported_formats()
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("error", Image.DecompressionBombWarning)
      with Image.open(file, formats=formats) as opened:
        image: Image.Image = opened
        ImageOps.exif_transpose(image, in_place=True)
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
  except Image.UnidentifiedImageError as error:
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
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


@functools.cache
def supported_formats() -> list[str]:
  """Returns the formats that Pillow reads, with its HEIC plugin if present."""
  with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()
  Image.init()
  return [name for name in _FORMATS if name in Image.OPEN]


def _flatten(rgba: np.ndarray) -> np.ndarray:
  """Puts a transparent image on a background that shows its ink."""
  rgb, alpha = rgba[..., :3], rgba[..., 3:]
  alpha = alpha / max(alpha.max(), 1)  # Makes faint ink opaque.
  visible = photographs.to_gray(rgb)[alpha[..., 0] > 0.5]
  background = 255.0
  if visible.size and np.ptp(visible) > 2 * photographs.MIN_CONTRAST:
    background = np.median(visible)  # The image has its own paper.
  elif visible.size and visible.mean() > 127:
    background = 0.0
  flat = rgb * alpha + background * (1 - alpha)
  return np.round(flat).astype(np.uint8)
