"""Finds the sheet of paper in a picture, whatever surrounds it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL import ImageDraw
from scipy import ndimage
from scipy import spatial

MIN_CONTRAST = 20.0  # Between ink and paper, out of 255.
MIN_SIDE = 20  # In smaller pictures, a stroke looks like a line or a sheet.
EIGHT = np.ones((3, 3))  # A pixel's neighbors, including the diagonal ones.


class Sheet(NamedTuple):
  """A region that may be paper with ink on it; masks are [height, width]."""

  has_dark_ink: bool
  paper: np.ndarray
  hull: np.ndarray
  ink: np.ndarray  # Its largest connected part, with holes filled.
  prominence: float  # The size of the ink times its contrast.


def find(x: np.ndarray) -> Sheet | None:
  """Returns the sheet with the most prominent ink; of near ties, the smallest.

  A candidate whose ink covers a smaller candidate is dropped: it is a table
  with the sheet on it, or paper with a box drawn around the digit.
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
  """Yields the light regions that may be paper with dark ink on it."""
  relief = relief_of(255 - light)
  shades = [relief_of(light), smoothed(light)]
  without_ink = 255 - paper_of(255 - light)
  if relief_of(without_ink).max() < 0.3 * relief.max():
    shades.append(-relief)  # For paper that is partly in shadow.
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
  """Returns a region's convex hull if it is a rectangle edged with paper."""
  points = np.argwhere(paper)[:, ::-1]
  try:
    corners = points[spatial.ConvexHull(points).vertices]
  except spatial.QhullError:  # All points are on one line.
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
  """Returns the largest connected part of a sheet's ink, with holes filled.

  Returns None if there is no ink, or if that part continues beyond the sheet or
  does not stand out from its surroundings in the picture x, whose ink is light.
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
  """Returns whether a light region of x has darker pixels all around it."""
  edge = region & ~ndimage.binary_erosion(region, border_value=1)
  light = ndimage.maximum_filter(np.where(region, x, -np.inf), 5)[edge]
  dark = ndimage.minimum_filter(np.where(region, np.inf, x), 7)[edge]
  return not edge.any() or (light - dark > step).mean() > 0.8


def _nearest(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns, for every pixel, the indices of the mask's nearest pixel."""
  return tuple(
    ndimage.distance_transform_edt(
      ~mask, return_distances=False, return_indices=True
    )
  )


def with_paper_around(
  x: np.ndarray, sheet: Sheet
) -> tuple[np.ndarray, np.ndarray]:
  """Replaces a sheet's surroundings with paper; also returns its mask."""
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
  """Returns the brightness of the paper under light, narrow ink.

  This is a morphological opening by half of the picture. It follows uneven
  light, and shadows too, keeping their edges.

  Args:
    light: [height, width].
    reaches_out: whether what lies at an edge continues beyond it, and so is not
      narrow, whatever its width in the picture.
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
  """Returns how much lighter each pixel is than the paper around it."""
  return smoothed(light) - paper_of(light)


def smoothed(x: np.ndarray) -> np.ndarray:
  return ndimage.gaussian_filter(x, max(x.shape) / 200)


def border(x: np.ndarray) -> np.ndarray:
  return np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]])


def otsu(x: np.ndarray) -> float:
  """Returns the threshold between two classes of pixels (Otsu, 1979)."""
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
