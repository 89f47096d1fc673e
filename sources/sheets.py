"""Finds the sheet of paper in a picture, whatever lies around it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL import ImageDraw
from scipy import ndimage
from scipy import spatial

MIN_CONTRAST = 20.0  # Of ink to paper, of 255.
MIN_SIDE = 20  # In fewer pixels a stroke looks like a line or a sheet.
EIGHT = np.ones((3, 3))  # Neighbors of a pixel, the diagonal ones included.


class Sheet(NamedTuple):
  """A region that may be paper with ink on it; masks are [height, width]."""

  has_dark_ink: bool
  paper: np.ndarray
  hull: np.ndarray
  ink: np.ndarray  # The largest part of it, its holes filled.
  prominence: float


def find(x: np.ndarray) -> Sheet | None:
  """Returns the sheet with the most prominent ink, the smallest of several.

  Ink that covers another sheet is that sheet on a table, or a box around it.
  """
  sheets = [*_sheets(x, True), *_sheets(255 - x, False)]
  sheets = [
    sheet
    for sheet in sheets
    if not any(
      other.hull.sum() < sheet.hull.sum()
      and (sheet.ink & other.hull).sum() > 0.4 * other.hull.sum()
      for other in sheets
    )
  ]
  most = max((sheet.prominence for sheet in sheets), default=0)
  return min(
    (sheet for sheet in sheets if sheet.prominence > 0.92 * most),
    key=lambda sheet: sheet.hull.sum(),
    default=None,
  )


def _sheets(light: np.ndarray, has_dark_ink: bool) -> Iterator[Sheet]:
  """Yields the light regions that may be paper with ink that is dark."""
  relief = relief_of(255 - light)
  shades = [relief_of(light), smoothed(light)]
  without_ink = 255 - paper_of(255 - light)
  if relief_of(without_ink).max() < 0.3 * relief.max():
    shades.append(-relief)  # Paper in the light and in the shadow.
  for shade in shades:
    if np.ptp(shade) < MIN_CONTRAST:
      continue
    labels, _ = ndimage.label(shade > otsu(shade))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    for label in np.argsort(-sizes)[:2]:
      if sizes[label] < 0.1 * light.size:
        continue
      paper = labels == label
      hull = _hull_of_sheet(paper)
      if hull is None or not _ends_there(hull, light, MIN_CONTRAST / 2):
        continue
      ink = _largest_ink(relief, hull, 255 - light)
      if ink is not None:
        prominence = _longest_side(ink) * relief[ink].max()
        yield Sheet(has_dark_ink, paper, hull, ink, prominence)


def _hull_of_sheet(paper: np.ndarray) -> np.ndarray | None:
  """Returns the convex hull of a region if that is a rectangle, and closed."""
  points = np.argwhere(paper)[:, ::-1]
  try:
    corners = points[spatial.ConvexHull(points).vertices]
  except spatial.QhullError:  # A line.
    return None
  canvas = Image.new("1", paper.shape[::-1])
  ImageDraw.Draw(canvas).polygon(corners.ravel().tolist(), 1, 1)
  hull = np.asarray(canvas)
  edge = hull & ~ndimage.binary_erosion(hull, iterations=2)
  turns = np.deg2rad(np.arange(-20, 21))
  axes = np.stack([np.cos(turns), np.sin(turns)])
  across = np.stack([-axes[1], axes[0]])
  areas = (np.ptp(corners @ axes, axis=0) + 1) * (
    np.ptp(corners @ across, axis=0) + 1
  )
  is_sheet = (
    hull.sum() > 0.87 * areas.min()
    and paper.sum() > 0.55 * hull.sum()
    and paper[edge].mean() > 0.8
  )
  return hull if is_sheet else None


def _largest_ink(
  relief: np.ndarray, hull: np.ndarray, x: np.ndarray
) -> np.ndarray | None:
  """Returns the largest part of the ink on a sheet, its holes filled.

  None if there is no ink, if the part goes on beyond the sheet, or if it ends
  where nothing in the picture x, with light ink, does.
  """
  inner = ndimage.binary_erosion(hull, iterations=2, border_value=1)
  peak = relief[inner].max(initial=0)
  if peak < MIN_CONTRAST:
    return None
  labels, _ = ndimage.label(relief > peak / 3, EIGHT)
  sizes = np.bincount(labels[inner])
  sizes[0] = 0
  part = labels == sizes.argmax()
  goes_on = (part & hull).sum() < 0.9 * part.sum()
  if goes_on or not _ends_there(part, x, 0.2 * peak):
    return None
  return ndimage.binary_fill_holes(part)


def _ends_there(region: np.ndarray, x: np.ndarray, step: float) -> bool:
  """Returns whether a light region of x has a darker one all around it."""
  edge = region & ~ndimage.binary_erosion(region, border_value=1)
  light = ndimage.maximum_filter(np.where(region, x, -np.inf), 5)[edge]
  dark = ndimage.minimum_filter(np.where(region, np.inf, x), 7)[edge]
  return not edge.any() or (light - dark > step).mean() > 0.8


def _nearest(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the indices of the pixel of a mask that is nearest to each."""
  return tuple(
    ndimage.distance_transform_edt(
      ~mask, return_distances=False, return_indices=True
    )
  )


def with_paper_around(
  x: np.ndarray, sheet: Sheet
) -> tuple[np.ndarray, np.ndarray]:
  """Puts paper around a sheet; returns this, and what of it is the sheet."""
  hull, paper = (
    np.asarray(Image.fromarray(mask).resize(x.shape[::-1]))
    for mask in (sheet.hull, sheet.paper)
  )
  options = dict(iterations=1 + max(x.shape) // 60, border_value=1)
  within = ndimage.binary_erosion(hull, **options)
  paper = ndimage.binary_erosion(paper & within, **options)
  if not paper.any():
    return x, np.ones(x.shape, bool)
  return np.where(within, x, x[_nearest(paper)]), within


def paper_of(light: np.ndarray, reaches_out: bool = True) -> np.ndarray:
  """Returns the brightness under ink that is light and narrow.

  A morphological opening by half of the picture: it follows uneven light, and
  shadows too, whose edges it keeps.

  Args:
    light: [height, width].
    reaches_out: whether what lies at an edge goes on beyond it; if so, it is
      not narrow, whatever its width in the picture.
  """
  if min(light.shape) < MIN_SIDE:
    return np.full_like(light, np.median(border(light)))
  half = max(light.shape) // 4
  window = [min(n, 2 * half + 1) for n in light.shape]
  light = smoothed(light)
  if reaches_out:
    outer = np.pad(light, half + 1, mode="edge")
    inside = (slice(half + 1, -half - 1),) * 2
    return ndimage.grey_opening(outer, window)[inside]
  options = dict(size=window, mode="constant", cval=-np.inf)
  return ndimage.grey_dilation(
    ndimage.grey_erosion(light, **options), **options
  )


def relief_of(light: np.ndarray) -> np.ndarray:
  """Returns how much lighter than its surroundings what lies inside is."""
  return smoothed(light) - paper_of(light)


def smoothed(x: np.ndarray) -> np.ndarray:
  return ndimage.gaussian_filter(x, max(x.shape) / 200)


def border(x: np.ndarray) -> np.ndarray:
  return np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]])


def otsu(x: np.ndarray) -> float:
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


def bounding_box(mask: np.ndarray) -> tuple[slice, slice]:
  """Returns the rows and columns that a mask spans."""
  rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
  return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _longest_side(mask: np.ndarray) -> int:
  return max(side.stop - side.start for side in bounding_box(mask))
