"""Drawings and photographs of digits to MNIST's form."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL import ImageDraw
from scipy import ndimage
from scipy import spatial

_SIDE, _BOX = 28, 20  # Of the images, and of the digit in them, in pixels.
_MAX_SIDE = 400  # More detail than this in finding the ink only takes time.
_COARSE_SIDE = 100  # Enough to tell colours, and paper from what lies around.
MIN_CONTRAST = 20.0  # Of ink to paper, of 255.
_LUMA = np.float32([0.299, 0.587, 0.114])  # ITU-R 601.


def to_grey(image: np.ndarray) -> np.ndarray:
  """Returns the luma of an image, float32 [height, width]."""
  image = image.astype(np.float32)
  return image if image.ndim == 2 else image @ _LUMA


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
  digit = _resize(_crop(find_ink(image, invert)), _BOX)
  return _center(np.clip(digit / digit.max(), 0, 1))


def find_ink(image: np.ndarray, invert: str = "auto") -> np.ndarray:
  """Returns how much of each pixel is ink, 0 to 1."""
  x, is_dark, is_sheet = _with_light_ink(image, invert)
  if is_sheet:
    paper = _paper(x, True)
    contrast = np.maximum(x - paper, 0)
    if is_dark:
      contrast *= np.clip((255 - paper.min()) / np.maximum(255 - paper, 1), 1, 2.5)
  else:
    contrast = _without_surroundings(x)
  smooth = _smooth(contrast)
  if smooth.max() < MIN_CONTRAST:
    raise ValueError("has no ink")
  threshold = _otsu(smooth)
  strokes = _without_lines(smooth > threshold)
  strokes = _without_box(strokes)
  strokes = _without_specks(strokes)
  near = ndimage.binary_dilation(strokes, iterations=1 + max(x.shape) // 100)
  # MNIST's paper is 0, here whatever noise it has; its ink is mostly 255.
  far = contrast[~near & (smooth <= threshold)]
  paper, noise = np.percentile(far, (50, 98)) if far.size else (0, 0)
  low = max(paper + threshold / 4, noise)
  high = np.median(contrast[strokes])
  ink = np.clip((contrast - low) / max(high - low, 1), 0, 1)
  ink[~near] = 0
  if not ink.any():
    raise ValueError("has no ink that stands out from its noise")
  return ink


def _with_light_ink(image: np.ndarray, invert: str) -> np.ndarray:
  """Returns the sheet in the channel that shows the ink best, the ink light."""
  x = _best_channel(image)
  found = _find_sheet(_shrink(x, _COARSE_SIDE)) if min(x.shape) >= 20 else None
  if found is not None:
    is_dark, paper, hull = found[:3]
    x = _cut(x, paper, hull)
  else:
    is_dark = _has_dark_ink(x)
  is_dark = invert == "yes" or (invert == "auto" and is_dark)
  return 255 - x if is_dark else x, is_dark, found is not None


def _best_channel(image: np.ndarray) -> np.ndarray:
  x = _shrink(to_grey(image), _MAX_SIDE)
  if image.ndim == 2 or np.ptp(image, axis=-1).max() < MIN_CONTRAST:
    return x
  channels = [x, *(_shrink(np.float32(image[..., i]), _MAX_SIDE) for i in range(3))]
  coarse = [_shrink(channel, _COARSE_SIDE) for channel in channels]
  peaks = [max(_relief(x).max(), _relief(255 - x).max()) for x in coarse]
  if max(peaks) < MIN_CONTRAST:
    peaks = [np.ptp(_smooth(x)) for x in coarse]
  peaks[0] *= 1.5
  return channels[int(np.argmax(peaks))]


def _relief(light: np.ndarray) -> np.ndarray:
  return _smooth(light) - _paper(light, True)


class Sheet(NamedTuple):
  """A region that may be paper with ink on it, masks of [height, width]."""

  has_dark_ink: bool
  paper: np.ndarray
  hull: np.ndarray
  ink: np.ndarray  # The largest part of it, its holes filled.
  prominence: float


def _find_sheet(x: np.ndarray) -> Sheet | None:
  """Returns the sheet with the largest ink, the smallest of such sheets.

  Ink that is a sheet itself, as paper on a table, or is a box around one, is
  not taken for ink.
  """
  sheets = [*_sheets(x, True), *_sheets(255 - x, False)]
  sheets = [s for s in sheets if not any(t.hull.sum() < s.hull.sum() and (s.ink & t.hull).sum() > 0.4 * t.hull.sum() for t in sheets)]
  if not sheets:
    return None
  extents = [s.prominence for s in sheets]
  large = [s for s, e in zip(sheets, extents, strict=True) if e > 0.92 * max(extents)]
  return min(large, key=lambda s: s.hull.sum())


def _sheets(light: np.ndarray, has_dark_ink: bool) -> Iterator[Sheet]:
  """Yields the light regions that may be paper with ink that is dark."""
  relief = _relief(255 - light)
  bare = 255 - _paper(255 - light, True)  # The sheet without its ink.
  shades = [_relief(light), _smooth(light)]
  if _relief(bare).max() < 0.3 * relief.max():
    shades.append(-relief)
  for shade in shades:
    if np.ptp(shade) < MIN_CONTRAST:
      continue
    labels, _ = ndimage.label(shade > _otsu(shade))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    for label in np.argsort(-sizes)[:2]:
      if sizes[label] > 0.1 * light.size:
        paper = labels == label
        hull = _hull_of_sheet(paper)
        ink = None if hull is None else _largest_ink(relief, hull, 255 - light)
        if ink is not None:
          yield Sheet(has_dark_ink, paper, hull, ink, _extent(ink) * relief[ink].max())


def _extent(mask: np.ndarray) -> int:
  return max(np.ptp(np.flatnonzero(mask.any(axis=axis))) + 1 for axis in (0, 1))


def _hull_of_sheet(paper: np.ndarray) -> np.ndarray | None:
  """Returns the convex hull of a region if it is a closed rectangle."""
  points = np.argwhere(paper)[:, ::-1]
  try:
    corners = points[spatial.ConvexHull(points).vertices]
  except spatial.QhullError:
    return None
  canvas = Image.new("1", paper.shape[::-1])
  ImageDraw.Draw(canvas).polygon([tuple(c) for c in corners.tolist()], 1, 1)
  hull = np.asarray(canvas)
  turns = np.deg2rad(np.arange(-20, 21))
  u, v = np.stack([np.cos(turns), np.sin(turns)]), np.stack([-np.sin(turns), np.cos(turns)])
  rectangle = np.prod([np.ptp(corners @ a, axis=0) + 1 for a in (u, v)], axis=0).min()
  inner = ndimage.binary_erosion(hull, iterations=2)
  edge = hull & ~inner
  if hull.sum() > 0.87 * rectangle and paper.sum() > 0.55 * hull.sum() and paper[edge].mean() > 0.8:
    return hull
  return None


def _largest_ink(relief: np.ndarray, hull: np.ndarray, x: np.ndarray) -> np.ndarray | None:
  """Returns the largest part of the ink on a sheet, if it stays on it."""
  inner = ndimage.binary_erosion(hull, iterations=2, border_value=1)
  peak = relief[inner].max(initial=0)
  if peak < MIN_CONTRAST:
    return None
  labels, _ = ndimage.label(relief > peak / 3, np.ones((3, 3)))
  sizes = np.bincount(labels[inner])
  sizes[0] = 0
  part = labels == sizes.argmax()
  if (part & hull).sum() < 0.9 * part.sum():
    return None
  around = ndimage.binary_dilation(part, iterations=3) & ~ndimage.binary_dilation(part)
  nearest = ndimage.distance_transform_edt(~part, return_distances=False, return_indices=True)
  if (x[tuple(nearest)] - x > 0.2 * peak)[around].mean() < 0.8:
    return None
  return ndimage.binary_fill_holes(part)


def _cut(x, paper, hull):
  """Puts paper around the sheet."""
  def enlarge(mask):
    image = Image.fromarray(mask).resize(x.shape[::-1])
    return np.asarray(image)
  if hull.mean() > 0.97:
    return x
  hull, paper = enlarge(hull), enlarge(paper)
  margin = 1 + max(x.shape) // 60
  outside = ~ndimage.binary_erosion(hull, iterations=margin, border_value=1)
  paper = ndimage.binary_erosion(paper & ~outside, iterations=margin, border_value=1)
  if not paper.any():
    return x
  nearest = ndimage.distance_transform_edt(~paper, return_distances=False, return_indices=True)
  x = np.where(outside, x[tuple(nearest)], x)
  return _crop_to(x, ~outside)


def _crop_to(x, mask):
  rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
  return x[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _paper(x: np.ndarray, reaches_out: bool) -> np.ndarray:
  """Returns the brightness under light ink that is narrower than half of x."""
  if min(x.shape) < 20:
    return np.full_like(x, np.median(_border(x)))
  window = [min(n, max(3, round(max(x.shape) * 0.5))) for n in x.shape]
  x = _smooth(x)
  if reaches_out:
    pad = [(n // 2 + 1,) * 2 for n in window]
    inside = tuple(slice(n // 2 + 1, -(n // 2 + 1)) for n in window)
    return ndimage.grey_opening(np.pad(x, pad, mode="edge"), window)[inside]
  inner = ndimage.grey_erosion(x, window, mode="constant", cval=-1e9)
  return ndimage.grey_dilation(inner, window, mode="constant", cval=-1e9)


def _without_surroundings(x: np.ndarray) -> np.ndarray:
  """Returns the contrast to the paper but for what comes in from the edges."""
  whole = np.maximum(x - _paper(x, False), 0)
  inner = np.maximum(x - _paper(x, True), 0)
  smooth = _smooth(whole)
  if smooth.max() < MIN_CONTRAST or _smooth(inner).max() < MIN_CONTRAST:
    return whole
  labels, count = ndimage.label(smooth > _otsu(smooth), np.ones((3, 3)))
  index = np.arange(1, count + 1)
  share = ndimage.sum(inner, labels, index) / ndimage.sum(whole, labels, index)
  touching = np.isin(index, _border(labels))
  keep = np.isin(labels, index[touching & (share >= 0.3)])
  keep = ndimage.binary_dilation(keep, iterations=1 + max(x.shape) // 100)
  return np.where(keep, whole, inner)


def _without_lines(strokes: np.ndarray) -> np.ndarray:
  """Takes out thin straight lines from edge to edge, but for what crosses."""
  if min(strokes.shape) < 20:
    return strokes
  rest = _without_rows(_without_rows(strokes).T).T
  return rest if rest.any() else strokes


def _without_rows(strokes: np.ndarray) -> np.ndarray:
  """Takes out lines from the left to the right, of any slope up to 8 %."""
  height, width = strokes.shape
  rows, columns = np.nonzero(strokes)
  thickest = 2 + max(height, width) // 25
  best = None
  for slope in np.linspace(-0.08, 0.08, 1 + 2 * max(1, round(0.08 * width))):
    levels = np.round(rows - slope * columns).astype(int) + width
    counts = np.bincount(levels, minlength=height + 2 * width)
    if best is None or counts.max() > best[0].max():
      best = counts, slope, levels
  counts, slope, levels = best
  is_line = counts > 0.6 * width
  bands, count = ndimage.label(is_line)
  strokes = strokes.copy()
  for band in range(1, count + 1):
    at = np.flatnonzero(bands == band)
    if len(at) > thickest or counts[at].max() < 0.85 * width:
      continue
    first, last = at[0] - 2, at[-1] + 2
    in_band = (levels >= first) & (levels <= last)
    beside = ((levels >= first - 2) & (levels < first)) | ((levels > last) & (levels <= last + 2))
    crossed = ndimage.binary_dilation(np.isin(np.arange(width), columns[beside]), iterations=1)
    gone = in_band & ~crossed[columns]
    strokes[rows[gone], columns[gone]] = False
  return strokes


def _without_box(strokes):
  return strokes


def _smooth(x: np.ndarray) -> np.ndarray:
  return ndimage.gaussian_filter(x, max(x.shape) / 200)


def _shrink(x: np.ndarray, longer_side: int) -> np.ndarray:
  return _resize(x, longer_side) if max(x.shape) > longer_side else x


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
