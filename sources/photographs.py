"""Finds digits in drawings and photographs; converts them to MNIST's form.

No rule tells ink from a shadow, a ruled line or a table in every picture. So
there are a few candidates for the ink, and a network judges which looks right.
"""

from collections.abc import Callable
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.sparse import csgraph

import calibration

MIN_CONTRAST = 20.0  # Between ink and paper, out of 255.
_SIDE, _BOX = 28, 20  # Pixels per side of an image, and of its digit's box.
_MAX_SIDE = 280  # As in exporting/page.html; more detail only takes time.
_COARSE = 140  # Pixels per side that are enough to tell digits from the rest.
# Fitted to pictures like those of benchmarks/digit_pictures.py, and rounded.
_TEMPERATURE, _TRUST, _IS_DARK, _WAS_FAINT = 2.5, 2.5, 0.3, -2.5
_CLOSE = np.log(5)  # A fifth as likely as the best is too likely to ignore.


class Digit(NamedTuple):
  """A digit found in a picture."""

  seen: np.ndarray  # In MNIST's form: uint8 [28, 28].
  box: tuple[int, int, int, int]  # Left, top, right, bottom, in the picture.
  doubt: str = ""  # Why it may be another digit, if there is a reason.


class Candidate(NamedTuple):
  """What may be the digits of a picture, line by line."""

  digits: list[Digit]
  prior: float  # The logarithm of how likely it is before a network has judged.
  is_dark: bool  # Whether the ink is darker than the paper.
  channel: int  # Where it was found, in what `_views` returns.
  paper: np.ndarray  # How light the paper is, or if the ink is light, how dark.
  strokes: np.ndarray  # A mask of the ink.


def find_digits(
  image: np.ndarray,
  invert: str = "auto",
  is_single: bool = False,
  judge: Callable[[np.ndarray], np.ndarray] | None = None,
) -> list[Digit]:
  """Finds the digits, line by line, and puts them in MNIST's form.

  Args:
    image: uint8 [height, width] or [height, width, 3].
    invert: "yes" if the ink is darker than the paper, "no" if it is lighter,
      "auto" to find out.
    is_single: whether all ink belongs to one digit.
    judge: returns the probabilities, [n, classes], of images uint8 [n, 28, 28,
      1]. Without it, what stands out most is taken for the ink.

  Raises:
    ValueError: if there is no ink.
  """
  found = _candidates(image, invert, is_single)
  best, doubt = _choose(found, judge) if judge else (found[0], "")
  view = _views(image, _MAX_SIDE)[best.channel]
  digits = _digits(view, best, is_single, max(image.shape[:2]))
  return [digit._replace(doubt=doubt or digit.doubt) for digit in digits]


def _choose(
  found: list[Candidate], judge: Callable[[np.ndarray], np.ndarray]
) -> tuple[Candidate, str]:
  """Returns the likeliest candidate, and what casts doubt on it, or ""."""
  seen = np.stack([digit.seen for each in found for digit in each.digits])
  ends = np.cumsum([len(each.digits) for each in found])
  rows = np.split(judge(seen[..., None]), ends[:-1])
  readings = ["".join(map(str, row.argmax(axis=1))) for row in rows]
  # A network is too certain about what it was not trained on.
  soft = [calibration.apply(row, _TEMPERATURE).max(axis=1) for row in rows]
  scores = np.array([_TRUST * np.log(confidence).mean() for confidence in soft])
  scores += [each.prior for each in found]
  best, *others = np.argsort(-scores, kind="stable")
  for i in others:
    if readings[i] != readings[best] and scores[i] > scores[best] - _CLOSE:
      option = "if cropped to its digits"
      if found[i].is_dark != found[best].is_dark:
        option = f"with --invert={'yes' if found[i].is_dark else 'no'}"
      return found[best], f"could be {readings[i]} {option}"
  return found[best], ""


def _candidates(
  image: np.ndarray, invert: str, is_single: bool
) -> list[Candidate]:
  """Returns what `find_digits` chooses from, the most prominent first."""
  result: dict[bytes, Candidate] = {}
  side = max(image.shape[:2])
  polarities = {"auto": (True, False), "yes": (True,), "no": (False,)}[invert]
  views = _views(image, _COARSE)
  sigma = max(views[0].shape) / 200  # Enough against noise, less than a stroke.
  smooth = [ndimage.gaussian_filter(view, sigma) for view in views]
  differs = [MIN_CONTRAST, *(np.ptp(x - smooth[0]) for x in smooth[1:])]
  for channel in sorted({0, int(np.argmax(differs))}):
    steps = ndimage.morphological_gradient(smooth[channel], 3)
    for is_dark in polarities:
      light = 255 - smooth[channel] if is_dark else smooth[channel]
      for paper, strokes, prior in _strokes(light):
        found = Candidate([], prior, is_dark, channel, paper, strokes)
        digits = _digits(views[channel], found, is_single, side)
        key = b"".join(digit.seen.tobytes() for digit in digits)
        if digits and key not in result:
          prior += _IS_DARK * is_dark + _prior(digits, strokes, steps, side)
          result[key] = found._replace(digits=digits, prior=prior)
  if not result:
    raise ValueError("has no ink")
  return sorted(result.values(), key=lambda x: -x.prior)[:4]  # Four will do.


def _views(image: np.ndarray, max_side: int) -> list[np.ndarray]:
  """Returns the luma and, in color, the channels, float32 [height, width]."""
  image = _resize(image, min(max_side, max(image.shape[:2])))
  channels = np.moveaxis(image, -1, 0) if image.ndim == 3 else ()
  luma = Image.fromarray(image).convert("L")
  return [np.asarray(view, np.float32) for view in (luma, *channels)]


def _digits(
  view: np.ndarray, found: Candidate, is_single: bool, side: int
) -> list[Digit]:
  """Returns the digits of a candidate, in a view of any resolution."""
  grid = zip(view.shape, found.strokes.shape, strict=True)
  nearest = np.ix_(*(np.arange(n) * m // n for n, m in grid))
  paper, strokes = found.paper[nearest], found.strokes[nearest]
  light = 255 - view if found.is_dark else view
  # In shadow, ink of the same darkness has less contrast.
  gain = 255 / np.maximum(255 - paper, MIN_CONTRAST) if found.is_dark else 1
  ink = _ink(np.maximum(light - paper, 0) * gain, strokes)
  parts = [ink > 0] if is_single else _separate(ink > 0)
  return [_digit(ink, part, side) for part in parts if part.any()]


def _strokes(
  light: np.ndarray,
) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
  """Yields the paper, a mask of what is narrow and lighter, and its prior.

  What may hide a digit is then removed: faint ink, parts that have another one
  inside, and parts that touch the edge, or do so after an earlier removal.
  """
  waiting, known = [], set()
  for times, share in enumerate((1 / 2, 1 / 5)):  # For large, small digits.
    width = max(8, int(share * max(light.shape)))  # Pixels; 8 in tiny pictures.
    paper = ndimage.grey_opening(light, [min(n, width) for n in light.shape])
    waiting.append((paper, np.maximum(light - paper, 0), times, True, 0.0))
  for paper, contrast, times, is_whole, prior in waiting:  # More are added.
    labels, _ = ndimage.label(contrast > _otsu(contrast), np.ones((3, 3)))
    sizes = np.bincount(labels[labels > 0], minlength=1)
    labels[(sizes <= 0.03 * sizes.max())[labels]] = 0  # These are specks.
    strokes = labels > 0
    if contrast.max() < MIN_CONTRAST or strokes.tobytes() in known:
      continue
    known.add(strokes.tobytes())
    yield paper, strokes, prior
    if times == 2:
      continue
    border = [*labels[[0, -1]].flat, *labels[:, [0, -1]].flat]
    removed = [(_around(labels, border), prior)]
    if is_whole:
      faint = strokes & (contrast <= _otsu(contrast[strokes]))
      faint &= faint.sum() > strokes.sum() / 2  # Otherwise, a soft edge.
      boxes = enumerate(ndimage.find_objects(labels), 1)
      outer = [k for k, box in boxes if box and _has_inside(labels[box], k)]
      removed += [(_around(labels, outer), prior), (faint, _WAS_FAINT)]
    for mask, likely in removed:
      if mask.any():
        rest = np.where(mask, 0, contrast)
        waiting.append((paper, rest, times + 1, False, likely))


def _around(labels: np.ndarray, chosen: list[int]) -> np.ndarray:
  """Returns the mask of some parts with their soft edges."""
  return ndimage.maximum_filter(np.isin(labels, chosen) & (labels > 0), 5)


def _has_inside(labels: np.ndarray, label: int) -> bool:
  """Returns whether a part has another one inside."""
  part = labels == label
  return bool(labels[ndimage.binary_fill_holes(part) & ~part].any())


def _ink(contrast: np.ndarray, strokes: np.ndarray) -> np.ndarray:
  """Returns how much of each pixel is ink, 0 to 1: 0 away from the strokes."""
  near = ndimage.maximum_filter(strokes, 5 + 2 * (max(contrast.shape) // 100))
  high = np.median(contrast[strokes])  # As in MNIST, half of the ink becomes 1.
  far = contrast[~near & (contrast < high / 2)]  # What has more is not paper.
  paper, noise = np.percentile(far, (50, 98)) if far.size else (0, 1)
  # A drawing has sharp edges; its threshold is that of exporting/page.html.
  low = max(paper + (high - paper) / (4 if noise else 8), noise)
  return near * np.clip((contrast - low) / max(high - low, 1), 0, 1)


def _separate(ink: np.ndarray) -> list[np.ndarray]:
  """Returns the mask of each digit, [height, width], line by line.

  A part of the ink belongs to a digit nearby if it is above, below or inside
  it, or small, as the bar of a five is. Other small parts are dropped.
  """
  height = int(ink.any(axis=1).sum())
  grown = ndimage.maximum_filter(ink, 3 + 2 * (height // 40))
  labels, count = ndimage.label(grown, np.ones((3, 3)))
  if not 1 < count <= 200:  # More are not digits.
    return [ink]
  labels[~ink] = 0
  boxes = ndimage.find_objects(labels)
  starts = np.array([[side.start for side in box] for box in boxes])
  stops = np.array([[side.stop for side in box] for box in boxes])
  heights = (stops - starts)[:, 0]
  near = 0.4 * heights.max()
  digits: list[int] = []
  for i in np.argsort(-heights, kind="stable"):
    sizes = stops - starts
    apart = np.maximum(starts[i], starts[digits])
    apart -= np.minimum(stops[i], stops[digits])
    is_above = -apart[:, 1] >= 0.5 * np.minimum(sizes[i, 1], sizes[digits, 1])
    gaps = np.hypot(*np.maximum(apart, 0).T)
    if heights[i] >= near:
      gaps = np.where(is_above, 4 * gaps, np.inf)  # It may be in another line.
    if gaps.min(initial=np.inf) < near:
      digit = digits[gaps.argmin()]
      labels[labels == i + 1] = digit + 1
      starts[digit] = np.minimum(starts[digit], starts[i])
      stops[digit] = np.maximum(stops[digit], stops[i])
    elif heights[i] >= near:
      digits.append(i)
  digits.sort(key=lambda digit: starts[digit, 0])  # Lines follow this order.
  tops, bottoms = starts[digits, 0], stops[digits, 0]
  shared = np.minimum.outer(bottoms, bottoms) - np.maximum.outer(tops, tops)
  _, lines = csgraph.connected_components(shared > near / 2, directed=False)
  in_order = np.lexsort((starts[digits, 1], lines))
  return [labels == digits[i] + 1 for i in in_order]


def _digit(ink: np.ndarray, part: np.ndarray, side: int) -> Digit:
  """Puts a part of the ink of a picture with this side in MNIST's form."""
  box = rows, columns = ndimage.find_objects(part.astype(np.uint8))[0]
  form = _resize(ink[box] * part[box], _BOX)
  form = np.round(255 * np.clip(form / form.max(), 0, 1))
  # The center of mass goes to 14.0, its mean over MNIST.
  corner = np.round(_SIDE / 2 - np.array(ndimage.center_of_mass(form)))
  top, left = np.clip(corner, 0, _SIDE - np.array(form.shape)).astype(int)
  seen = np.zeros((_SIDE, _SIDE), np.uint8)
  seen[top : top + form.shape[0], left : left + form.shape[1]] = form
  # A tight crop touches opposite sides; a digit that is cut off does not.
  near = 1 + max(part.shape) // 100  # Blur and noise take a pixel or two.
  edges = zip(box, part.shape, strict=True)
  touches = [(x.start < near, x.stop > size - near) for x, size in edges]
  ends = columns.start, rows.start, columns.stop, rows.stop
  left, top, right, bottom = (round(x * side / max(part.shape)) for x in ends)
  is_cut = np.any(touches) and not np.all(touches, axis=1).any()
  doubt = "ink touches the edge" if is_cut else ""
  return Digit(seen, (left, top, right, bottom), doubt)


def _prior(
  digits: list[Digit], strokes: np.ndarray, steps: np.ndarray, side: int
) -> float:
  """Returns how likely strokes are to be digits: large, clear, not solid."""
  outline = strokes & ~ndimage.binary_erosion(strokes)
  # Ink ends all around. Light and the paper between strokes do not, so what
  # counts is how much the weakest part of the outline stands out.
  step = np.percentile(steps[outline], 2)
  sides = [max(d.box[2] - d.box[0], d.box[3] - d.box[1]) / side for d in digits]
  area = len(sides) * min(sides) ** 2  # A row is as large as one large digit.
  # MNIST's median and deviation; thin strokes are common in other pictures.
  fill = np.log([digit.seen.sum() / 255 / _BOX**2 / 0.25 for digit in digits])
  unusual = np.where(fill > 0, fill / 0.34, fill / 0.5) ** 2 / 2
  return float(np.log(max(step, 1) ** 2 * area) - unusual.mean())


def _otsu(x: np.ndarray) -> int:
  """Returns the threshold between two classes of bytes (Otsu, 1979)."""
  counts = np.bincount(np.uint8(x).ravel(), minlength=256)
  below, sums = np.cumsum(counts), np.cumsum(counts * np.arange(256))
  above = x.size - below
  gap = sums / np.maximum(below, 1) - (sums[-1] - sums) / np.maximum(above, 1)
  return int(np.argmax(below * above * gap**2))


def _resize(x: np.ndarray, longer_side: int) -> np.ndarray:
  """Scales an image of bytes or of float32, keeping its aspect ratio."""
  scale = longer_side / max(x.shape[:2])
  size = [max(1, round(n * scale)) for n in x.shape[1::-1]]
  return np.asarray(Image.fromarray(x).resize(size, Image.Resampling.BICUBIC))
