"""Finds digits in drawings and photographs; converts them to MNIST's form."""

from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from sources import sheets

_SIDE, _BOX = 28, 20  # Pixels per side of an image, and of its digit's box.
_MAX_SIDE = 400  # Pictures are shrunk to this; more detail only takes time.
_COARSE_SIDE = 100  # For a square; enough to tell a sheet from the background.
_MAX_DIGITS = 20  # Per picture; more separate parts are not a row of digits.
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601.


class Digit(NamedTuple):
  """A digit found in a picture.

  Attributes:
    seen: the digit in MNIST's form, uint8 [28, 28].
    box: (left, top, right, bottom), in pixels of the picture.
    doubt: why it may not be a digit or may be only part of one; empty if there
      is no doubt.
  """

  seen: np.ndarray
  box: tuple[int, int, int, int]
  doubt: str = ""


def to_gray(image: np.ndarray) -> np.ndarray:
  """Returns the luma of an image, float32 [height, width]."""
  image = image.astype(np.float32)
  return image if image.ndim == 2 else image @ _LUMA


def to_mnist_form(image: np.ndarray, invert: str = "auto") -> np.ndarray:
  """Converts an image of one digit to MNIST's form, uint8 [28, 28].

  The arguments and errors are those of `find_digits`.
  """
  (digit,) = find_digits(image, invert, is_single=True)
  return digit.seen


def find_digits(
  image: np.ndarray, invert: str = "auto", is_single: bool = False
) -> list[Digit]:
  """Finds the digits in a row, left to right, and puts them in MNIST's form.

  MNIST's authors scaled each digit to fit into 20x20 pixels, keeping its aspect
  ratio, and put its center of mass at the center of 28x28 pixels, with light
  ink on black: http://yann.lecun.com/exdb/mnist/. Before doing the same, this
  removes uneven light, specks, ruled lines and the surroundings of the sheet.

  Args:
    image: uint8 [height, width] or [height, width, 3].
    invert: "yes" if the ink is darker than the paper, "no" if it is lighter,
      "auto" to find out.
    is_single: whether all ink belongs to one digit.

  Raises:
    ValueError: if there is no ink.
  """
  ink, at_edge = _find_ink(image, invert)
  parts = [ink > 0] if is_single else _separate(ink > 0)
  doubt = ""
  if len(parts) > _MAX_DIGITS:
    doubt = f"ink in {len(parts)} places"
    parts = [ink > 0]
  scale = np.array(image.shape[:2]) / ink.shape
  digits = []
  for part in parts:
    box = sheets.bounding_box(part)
    digit = _resize(np.where(part, ink, 0)[box], _BOX)
    seen = _center(np.clip(digit / digit.max(), 0, 1))
    top, bottom = np.round(scale[0] * np.array([box[0].start, box[0].stop]))
    left, right = np.round(scale[1] * np.array([box[1].start, box[1].stop]))
    corners = int(left), int(top), int(right), int(bottom)
    touches = (part & at_edge).any()
    why = doubt or ("ink touches the edge" if touches else "")
    digits.append(Digit(seen, corners, why))
  return digits


def _separate(ink: np.ndarray) -> list[np.ndarray]:
  """Returns the ink of each digit in a row, [height, width], from the left.

  A part of the ink belongs to a digit nearby if it is above, below or inside
  it, or small. A small part with no digit nearby is dropped.
  """
  height = np.ptp(np.flatnonzero(ink.any(axis=1))) + 1
  near = ndimage.binary_dilation(ink, iterations=1 + height // 40)
  labels, count = ndimage.label(near, sheets.EIGHT)
  parts = [ink & (labels == label) for label in range(1, count + 1)]
  parts = [part for part in parts if part.any()]
  if len(parts) > 10 * _MAX_DIGITS:
    return parts
  boxes = [sheets.bounding_box(part) for part in parts]
  order = sorted(range(len(parts)), key=lambda i: -_height(boxes[i]))
  tallest = _height(boxes[order[0]])
  digits: list[np.ndarray] = []
  digit_boxes: list[tuple[slice, slice]] = []
  for i in order:
    is_small = _height(boxes[i]) < 0.4 * tallest
    gaps = [_gap(boxes[i], other, is_small) for other in digit_boxes]
    if gaps and min(gaps) < 0.4 * tallest:
      nearest = int(np.argmin(gaps))
      digits[nearest] = digits[nearest] | parts[i]
      digit_boxes[nearest] = sheets.bounding_box(digits[nearest])
    elif not is_small:
      digits.append(parts[i])
      digit_boxes.append(boxes[i])
  lefts = [box[1].start for box in digit_boxes]
  return [digits[i] for i in np.argsort(lefts, kind="stable")]


def _gap(a, b, is_small: bool) -> float:
  """Returns how far part a is from digit b; infinity if a is a digit beside b.

  Both are bounding boxes.
  """
  across = min(a[1].stop, b[1].stop) - max(a[1].start, b[1].start)
  down = min(a[0].stop, b[0].stop) - max(a[0].start, b[0].start)
  narrower = min(box[1].stop - box[1].start for box in (a, b))
  if not is_small and across < 0.5 * narrower:
    return np.inf
  return np.hypot(max(-across, 0), max(-down, 0))


def _height(box: tuple[slice, slice]) -> int:
  return box[0].stop - box[0].start


def _find_ink(image: np.ndarray, invert: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns how much of each pixel is ink, 0 to 1, and the edge of the sheet.

  Both are [height, width], with at most 400 pixels per side.
  """
  x = _best_channel(image)
  sheet = None
  if min(x.shape) >= sheets.MIN_SIDE:
    sheet = sheets.find(_coarse(x))
  is_dark = sheet.has_dark_ink if sheet else _has_dark_ink(x)
  if invert != "auto":
    is_dark = invert == "yes"
    sheet = sheet if sheet and sheet.has_dark_ink == is_dark else None
  within = np.ones(x.shape, bool)
  if sheet and sheet.hull.mean() < 0.97:
    x, within = sheets.with_paper_around(x, sheet)
  box = sheets.bounding_box(within)
  x = 255 - x[box] if is_dark else x[box]
  contrast = _on_sheet(x, is_dark) if sheet else _without_surroundings(x)
  ink = np.zeros(within.shape, np.float32)
  ink[box] = _clean(contrast)
  width = 1 + (max(within.shape) > _COARSE_SIDE)
  inner = ndimage.binary_erosion(within, iterations=width)
  return ink, within & ~inner


def _clean(contrast: np.ndarray) -> np.ndarray:
  """Returns how much of each pixel is ink, 0 to 1, without lines and specks."""
  smooth = sheets.smoothed(contrast)
  if smooth.max() < sheets.MIN_CONTRAST:
    raise ValueError("has no ink")
  threshold = sheets.otsu(smooth)
  strokes = _without_specks(_without_lines(smooth > threshold))
  width = 1 + max(contrast.shape) // 100
  near = ndimage.binary_dilation(strokes, iterations=width)
  # As in MNIST, paper becomes 0, however noisy, and half of the ink becomes 1.
  far = contrast[~near & (smooth <= threshold)]
  paper, noise = np.percentile(far, (50, 98)) if far.size else (0, 0)
  high = np.median(contrast[strokes])
  # Without noise, low is an eighth of high, as in exporting/page.html.
  low = max(paper + threshold / 4, noise) if noise else high / 8
  ink = np.clip((contrast - low) / max(high - low, 1), 0, 1)
  ink[~near] = 0
  if not ink.any():
    raise ValueError("has no ink that stands out from its noise")
  return ink


def _best_channel(image: np.ndarray) -> np.ndarray:
  """Returns the luma, or a color channel if ink stands out much more in it."""
  gray = _shrink(to_gray(image), _MAX_SIDE)
  if image.ndim == 2 or np.ptp(image, axis=-1).max() < sheets.MIN_CONTRAST:
    return gray
  colors = np.moveaxis(image.astype(np.float32), -1, 0)
  channels = [gray, *(_shrink(color, _MAX_SIDE) for color in colors)]
  coarse = [_coarse(channel) for channel in channels]
  peaks = [
    max(sheets.relief_of(x).max(), sheets.relief_of(255 - x).max())
    for x in coarse
  ]
  if max(peaks) < sheets.MIN_CONTRAST:  # The ink may reach from edge to edge.
    peaks = [np.ptp(sheets.smoothed(x)) for x in coarse]
  peaks[0] *= 1.5
  return channels[int(np.argmax(peaks))]


def _on_sheet(x: np.ndarray, is_dark: bool) -> np.ndarray:
  """Returns the contrast of ink, corrected for shadows if the ink was dark.

  Args:
    x: [height, width], with light ink.
    is_dark: whether x is the negative of a picture with dark ink.
  """
  paper = sheets.paper_of(x)
  contrast = np.maximum(x - paper, 0)
  if not is_dark:
    return contrast
  light = np.maximum(255 - paper, 1)
  return contrast * np.clip(light.max() / light, 1, 2.5)


def _without_surroundings(x: np.ndarray) -> np.ndarray:
  """Returns the contrast of light ink that may touch the edges.

  Parts that only run along an edge, such as a frame, are left out.
  """
  inner = np.maximum(x - sheets.paper_of(x), 0)
  whole = np.maximum(x - sheets.paper_of(x, reaches_out=False), 0)
  smooth = sheets.smoothed(whole)
  if (
    smooth.max() < sheets.MIN_CONTRAST
    or sheets.smoothed(inner).max() < sheets.MIN_CONTRAST
  ):
    return whole
  labels, count = ndimage.label(smooth > sheets.otsu(smooth), sheets.EIGHT)
  index = np.arange(1, count + 1)
  share = ndimage.sum(inner, labels, index) / np.maximum(
    ndimage.sum(whole, labels, index), 1
  )
  digit = index[np.isin(index, sheets.border(labels)) & (share >= 0.3)]
  width = 1 + max(x.shape) // 100
  digit = ndimage.binary_dilation(np.isin(labels, digit), iterations=width)
  return np.where(digit, whole, inner)


def _without_lines(strokes: np.ndarray) -> np.ndarray:
  """Removes thin straight lines from edge to edge, except where ink crosses."""
  if min(strokes.shape) < sheets.MIN_SIDE:
    return strokes
  rest = _without_rows(_without_rows(strokes).T).T
  return rest if rest.any() else strokes


def _without_rows(strokes: np.ndarray) -> np.ndarray:
  """Removes lines from left to right that have the slope of the longest line.

  This is a Hough transform: a line's length is the pixel count of its level.
  """
  width = strokes.shape[1]
  rows, columns = np.nonzero(strokes)
  best: np.ndarray = np.zeros(1)
  for slope in np.linspace(-0.08, 0.08, 3 + 2 * round(0.08 * width)):
    levels = np.round(rows - slope * columns).astype(int) + width
    counts = np.bincount(levels)
    if counts.max(initial=0) > best.max():
      best, level = counts, levels
  rest = strokes.copy()
  bands, count = ndimage.label(best > 0.6 * width)
  for (band,) in ndimage.find_objects(bands, count):
    thickness = band.stop - band.start
    is_thin = thickness <= 2 + max(strokes.shape) // 25
    if not is_thin or best[band].max() < 0.85 * width:
      continue
    first, stop = band.start - 2, band.stop + 2  # Includes the soft edges.
    in_line = (level >= first) & (level < stop)
    beside = (level >= first - 2) & (level < stop + 2) & ~in_line
    is_crossed = np.zeros(width + 2, bool)
    for shift in range(3):
      is_crossed[columns[beside] + shift] = True
    gone = in_line & ~is_crossed[columns + 1]
    rest[rows[gone], columns[gone]] = False
  return rest


def _coarse(x: np.ndarray) -> np.ndarray:
  return _shrink(x, round(_COARSE_SIDE * (max(x.shape) / min(x.shape)) ** 0.5))


def _shrink(x: np.ndarray, longer_side: int) -> np.ndarray:
  return _resize(x, longer_side) if max(x.shape) > longer_side else x


def _center(digit: np.ndarray) -> np.ndarray:
  """Returns a uint8 [28, 28] image with the center of mass at its center."""
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
  """Scales an image, keeping its aspect ratio."""
  scale = longer_side / max(x.shape)
  height, width = (max(1, round(n * scale)) for n in x.shape)
  image = Image.fromarray(np.asarray(x, np.float32))
  return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _has_dark_ink(x: np.ndarray) -> bool:
  """Returns whether what differs most from the border is darker than it."""
  paper = np.median(sheets.border(x))
  # Not percentiles: they would miss a thin stroke, which has few pixels.
  smooth = sheets.smoothed(x)
  low, high = smooth.min(), smooth.max()
  return paper - low > high - paper


def _without_specks(mask: np.ndarray) -> np.ndarray:
  """Removes the connected parts that are tiny compared with the largest."""
  parts, _ = ndimage.label(mask, sheets.EIGHT)
  sizes = np.bincount(parts.ravel())
  sizes[0] = 0
  return (sizes > 0.05 * sizes.max())[parts]
