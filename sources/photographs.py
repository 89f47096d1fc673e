"""Image files to arrays, and drawings and photographs to MNIST's form."""

from collections.abc import Iterator
import io
import pathlib
import warnings

import numpy as np
from PIL import Image
from PIL import ImageOps
from scipy import ndimage

# Formats whose decoders Pillow has itself: others may start other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = tuple(
  ".png .jpg .jpeg .webp .bmp .gif .tif .tiff .pgm .ppm .npy".split()
)
_NPY_MAGIC = b"\x93NUMPY"
_SIDE, _BOX = 28, 20  # Of the images, and of the digit in them, in pixels.
_MAX_GIVEN = 1200  # Larger images, by the longer side, only take memory,
_MAX_SIDE = 400  # and more detail than this in finding the ink only takes time.
_MIN_CONTRAST = 20.0  # Of ink to paper, of 255.


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
  visible = to_grey(rgb)[alpha[..., 0] > 0.5]
  background = 255.0
  if visible.size and np.ptp(visible) > 2 * _MIN_CONTRAST:
    background = np.median(visible)  # It brings paper of its own.
  elif visible.size and visible.mean() > 127:
    background = 0.0
  flat = rgb * alpha + background * (1 - alpha)
  return np.round(flat).astype(np.uint8)


def to_grey(image: np.ndarray) -> np.ndarray:
  """The luma (ITU-R 601) of an image, float32 [height, width]."""
  image = image.astype(np.float32)
  if image.ndim == 2:
    return image
  return image @ np.float32([0.299, 0.587, 0.114])


def to_mnist_form(image: np.ndarray, invert: str = "auto") -> np.ndarray:
  """Makes an image of a digit what MNIST's are.

  Its authors scaled each digit into 20x20 pixels with its aspect ratio kept,
  and put its centre of mass at the centre of 28x28 pixels, light ink on black:
  http://yann.lecun.com/exdb/mnist/. Before that, uneven light and specks on the
  paper are taken out here.

  Args:
    image: uint8 [height, width] or [height, width, 3].
    invert: "yes" if the ink is darker than the paper, "no" if it is lighter,
      "auto" to find out.

  Returns:
    uint8 [28, 28].

  Raises:
    ValueError: there is no ink.
  """
  grey = to_grey(image)
  if max(grey.shape) > _MAX_SIDE:
    grey = _resize(grey, _MAX_SIDE)
  if invert == "yes" or (invert == "auto" and _has_dark_ink(grey)):
    grey = 255 - grey
  digit = _resize(_crop(_find_ink(grey)), _BOX)
  return _center(np.clip(digit / digit.max(), 0, 1))


def _find_ink(x: np.ndarray) -> np.ndarray:
  """How much of each pixel is ink, 0 to 1, in an image with light ink."""
  contrast = np.maximum(x - _paper(x), 0)
  smooth = ndimage.gaussian_filter(contrast, max(x.shape) / 200)
  if smooth.max() < _MIN_CONTRAST:
    raise ValueError("has no ink")
  threshold = _otsu(smooth)
  strokes = _without_specks(smooth > threshold)
  near = ndimage.binary_dilation(strokes, iterations=1 + max(x.shape) // 100)
  # MNIST's paper is 0, here whatever noise it has; its ink is mostly 255.
  noise = np.percentile(contrast[~near], 98) if not near.all() else 0
  high = np.median(contrast[strokes])
  # On paper without noise, an eighth, as exporting/page.html takes it.
  low = max(threshold / 4, noise) if noise else high / 8
  ink = np.clip((contrast - low) / max(high - low, 1), 0, 1)
  ink[~near] = 0
  if not ink.any():
    raise ValueError("has no ink that stands out from its noise")
  return ink


def _crop(ink: np.ndarray) -> np.ndarray:
  """Cuts off the rows and columns around the ink."""
  rows, columns = (np.flatnonzero(ink.any(axis=axis)) for axis in (1, 0))
  return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _center(digit: np.ndarray) -> np.ndarray:
  """Puts its centre of mass at the centre of an image of MNIST's, uint8."""
  center = _SIDE / 2  # The mean over MNIST is 14.0, not 13.5.
  height, width = digit.shape
  top, left = (
    int(np.clip(round(center - mass), 0, _SIDE - size))
    for mass, size in zip(
      ndimage.center_of_mass(digit), digit.shape, strict=True
    )
  )
  image = np.zeros((_SIDE, _SIDE), np.uint8)
  image[top : top + height, left : left + width] = np.round(digit * 255)
  return image


def _resize(x: np.ndarray, longer_side: int) -> np.ndarray:
  """Scales an image, with its aspect ratio kept."""
  scale = longer_side / max(x.shape)
  height, width = (max(1, round(n * scale)) for n in x.shape)
  image = Image.fromarray(np.asarray(x, np.float32))
  return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _border(x: np.ndarray) -> np.ndarray:
  return np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]])


def _has_dark_ink(x: np.ndarray) -> bool:
  """Whether what differs most from the border is darker than it."""
  paper = np.median(_border(x))
  # A thin stroke is few pixels: not to be missed, as a percentile would.
  smooth = ndimage.gaussian_filter(x, max(x.shape) / 200)
  low, high = smooth.min(), smooth.max()
  return paper - low > high - paper


def _paper(x: np.ndarray) -> np.ndarray:
  """The brightness under light ink: even, or a plane through the pixels."""
  border = _border(x)
  even = np.median(border)
  if (border == even).mean() > 0.5:  # Drawn, not photographed.
    return np.full_like(x, even)
  rows, columns = np.indices(x.shape, np.float32) / max(x.shape)
  planes = np.stack([np.ones_like(x), rows, columns], axis=-1)
  stride = max(1, max(x.shape) // 64)
  points = planes[::stride, ::stride].reshape(-1, 3)
  values = x[::stride, ::stride].ravel()
  keep = np.ones(values.shape, bool)
  for _ in range(5):  # Each leaves out what stands out: the ink.
    fit, *_ = np.linalg.lstsq(points[keep], values[keep], rcond=None)
    residuals = values - points @ fit
    keep = residuals <= np.percentile(residuals, 60)
  return planes @ fit


def _otsu(x: np.ndarray) -> float:
  """The threshold between two classes of pixels (Otsu, 1979)."""
  counts, edges = np.histogram(x, 256)
  centers = (edges[:-1] + edges[1:]) / 2
  below = np.cumsum(counts)[:-1]
  above = counts.sum() - below
  sums = np.cumsum(counts * centers)
  gap = sums[:-1] / np.maximum(below, 1) - (sums[-1] - sums[:-1]) / np.maximum(
    above, 1
  )
  return float(edges[1 + np.argmax(below * above * gap**2)])


def _without_specks(mask: np.ndarray) -> np.ndarray:
  """Keeps the connected parts that are not tiny beside the largest."""
  parts, _ = ndimage.label(mask, np.ones((3, 3)))
  sizes = np.bincount(parts.ravel())
  sizes[0] = 0
  return (sizes > 0.05 * sizes.max())[parts]
