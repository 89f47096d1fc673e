"""Finds digits in drawings and photographs; converts them to MNIST's form.

No rule can tell ink from a shadow, a ruled line or the edge of a table in every
picture. So this module makes a few candidates, each of which may be the ink,
and a network judges which of them looks most like digits.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

MIN_CONTRAST = 20.0  # Between ink and paper, out of 255.
_SIDE, _BOX = 28, 20  # Pixels per side of an image, and of its digit's box.
_MAX_SIDE = 280  # As in exporting/page.html; more detail only takes time.
_MAX_DIGITS = 20  # Per picture; more separate parts are not a row of digits.
_SHARES = (1 / 2, 1 / 5)  # Of the picture: for large and for small digits.
_SPECK = 0.05  # A part that is smaller, compared with the largest, is dirt.
# The right one was always among these, in every kind of picture.
_MAX_MASKS, _MAX_CANDIDATES = 8, 16  # Per polarity, and per picture.
# The weights of a logistic regression on benchmarks/digit_pictures.py, rounded:
# any of them can be doubled or halved with little effect.
_TRUST, _AT_EDGE = 4, 2
_CLOSE = np.log(4)  # Chosen so that most misread pictures are marked unsure.
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601.
_EIGHT = np.ones((3, 3))  # A pixel's neighbors, including the diagonal ones.


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


class Candidate(NamedTuple):
  """What may be the digits of a picture.

  Attributes:
    digits: from left to right.
    is_dark: whether their ink is darker than the paper.
    prior: the logarithm of how likely it is before the network has seen it, up
      to a constant.
  """

  digits: list[Digit]
  is_dark: bool
  prior: float


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
  image: np.ndarray,
  invert: str = "auto",
  is_single: bool = False,
  judge: Callable[[np.ndarray], np.ndarray] | None = None,
) -> list[Digit]:
  """Finds the digits in a row, left to right, and puts them in MNIST's form.

  Args:
    image: uint8 [height, width] or [height, width, 3].
    invert: "yes" if the ink is darker than the paper, "no" if it is lighter,
      "auto" to find out.
    is_single: whether all ink belongs to one digit.
    judge: returns the probabilities of the classes, [n, classes], of images
      uint8 [n, 28, 28, 1]; without it, the ink that stands out most is chosen.

  Raises:
    ValueError: if there is no ink.
  """
  found = candidates(image, invert, is_single)
  if not judge:
    return found[0].digits
  seen = np.stack([digit.seen for each in found for digit in each.digits])
  return choose(found, judge(seen[..., None]))[0]


def candidates(
  image: np.ndarray, invert: str = "auto", is_single: bool = False
) -> list[Candidate]:
  """Returns what may be the digits of a picture, the most prominent first.

  The arguments and errors are those of `find_digits`.
  """
  result: dict[bytes, Candidate] = {}
  scale = max(1, max(image.shape[:2]) / _MAX_SIDE)
  polarities = {"auto": (True, False), "yes": (True,), "no": (False,)}[invert]
  for view, smooth in _views(image):
    steps = _steps(smooth)
    for is_dark in polarities:
      light, even = (255 - view, 255 - smooth) if is_dark else (view, smooth)
      papers = [_paper(even, share) for share in _SHARES]
      for paper, strokes in _masks(even, papers):
        ink = _ink(np.maximum(light - paper, 0), strokes)
        if not ink.any():
          continue
        parts = [ink > 0] if is_single else _separate(ink > 0)
        digits = [_digit(ink, part, scale) for part in parts]
        key = b"".join(digit.seen.tobytes() for digit in digits)
        if key not in result:
          strokes = strokes & np.logical_or.reduce(parts)
          prior = _prior(digits, strokes, steps, scale)
          result[key] = Candidate(digits, is_dark, prior)
  if not result:
    raise ValueError("has no ink")
  ranked = sorted(result.values(), key=lambda candidate: -candidate.prior)
  return ranked[:_MAX_CANDIDATES]


def choose(
  found: Sequence[Candidate], probabilities: np.ndarray
) -> tuple[list[Digit], np.ndarray]:
  """Returns the digits that a network is surest of, and their probabilities.

  Args:
    found: the candidates of one picture.
    probabilities: [n, classes], of all their digits in order.
  """
  ends = np.cumsum([len(candidate.digits) for candidate in found])
  rows = np.split(probabilities, ends[:-1])
  sure = [np.log(each.max(axis=1) + 1e-9).mean() for each in rows]
  scores = np.array(
    [c.prior + _TRUST * s for c, s in zip(found, sure, strict=True)]
  )
  best = int(scores.argmax())
  readings = ["".join(map(str, each.argmax(axis=1))) for each in rows]
  doubt = _doubt(found, readings, scores)
  digits = [
    digit._replace(doubt="; ".join(filter(None, (digit.doubt, doubt))))
    for digit in found[best].digits
  ]
  return digits, rows[best]


def _doubt(
  found: Sequence[Candidate], readings: list[str], scores: np.ndarray
) -> str:
  """Returns the second most likely reading if it is nearly as likely."""
  order = [int(i) for i in np.argsort(-scores, kind="stable")]
  best = order[0]
  others = [i for i in order if readings[i] != readings[best]]
  if not others or scores[others[0]] < scores[best] - _CLOSE:
    return ""
  other = others[0]
  is_dark = found[other].is_dark
  doubt = f"may be {readings[other]}"
  if other == next(i for i in order if found[i].is_dark == is_dark):
    return f"{doubt}, which --invert={'yes' if is_dark else 'no'} reads"
  return f"{doubt}, which cropping the picture may show"


def _views(image: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields the luma and the least similar color channel, and both smoothed."""
  views = [_shrink(to_gray(image))]
  if image.ndim == 3 and np.ptp(image, axis=-1).max() >= MIN_CONTRAST:
    colors = np.moveaxis(image.astype(np.float32), -1, 0)
    channels = [_shrink(color) for color in colors]
    views.append(max(channels, key=lambda x: np.ptp(_smooth(x - views[0]))))
  for view in views:
    yield view, _smooth(view)


def _steps(smooth: np.ndarray) -> np.ndarray:
  """Returns how much the brightness changes around each pixel."""
  width = 3 + 2 * (max(smooth.shape) // 100)  # Across a blurred edge.
  highest = ndimage.maximum_filter(smooth, width)
  return highest - ndimage.minimum_filter(smooth, width)


def _paper(light: np.ndarray, share: float) -> np.ndarray:
  """Returns what is left of an image without its light, narrow parts.

  Args:
    light: [height, width].
    share: what is wider than this share of the picture is not narrow.
  """
  width = max(3, int(share * max(light.shape)))
  return ndimage.grey_opening(light, [min(n, width) for n in light.shape])


def _masks(
  light: np.ndarray, papers: list[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields masks of strokes: all, then without what may surround a digit.

  Args:
    light: [height, width].
    papers: what the paper under it may look like.

  Yields:
    The paper, and the mask of what is lighter.
  """
  waiting, known = [(paper, light - paper) for paper in papers], set()
  for paper, contrast in waiting:  # More are added meanwhile.
    if contrast.max() < MIN_CONTRAST:
      continue
    labels, _ = ndimage.label(contrast > _otsu(contrast), _EIGHT)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    labels[(sizes <= _SPECK * sizes.max())[labels]] = 0
    strokes = labels > 0
    if strokes.tobytes() in known:
      continue
    known.add(strokes.tobytes())
    yield paper, strokes
    if len(waiting) >= _MAX_MASKS:
      continue
    width = 2 + max(contrast.shape) // 100  # Includes the soft edges.
    for around in ({*_border(labels)} - {0}, {*_enclosing(labels)}):
      if around:
        gone = _grown(np.isin(labels, list(around)), width)
        waiting.append((paper, np.where(gone, 0, contrast)))
    lines = _lines(strokes)
    if lines.any():
      waiting.append((paper, np.where(lines, 0, contrast)))


def _enclosing(labels: np.ndarray) -> Iterator[int]:
  """Yields the labels of the parts that have another part inside."""
  for label, box in enumerate(ndimage.find_objects(labels), 1):
    if box:
      part = labels[box] == label
      inside = ndimage.binary_fill_holes(part) & ~part
      if (labels[box][inside] > 0).sum() > _SPECK * part.sum():
        yield label


def _lines(strokes: np.ndarray) -> np.ndarray:
  """Returns the thin lines along rows and columns, but not where ink crosses."""
  lines = np.zeros_like(strokes)
  thick = 1 + max(strokes.shape) // 25  # More than a ruler's line, or a box's.
  for mask, out in ((strokes, lines), (strokes.T, lines.T)):
    mask = np.uint8(mask)
    long = ndimage.grey_opening(mask, (1, mask.shape[1] // 2), mode="constant")
    thin = long - ndimage.grey_opening(long, (thick, 1), mode="constant")
    thin = ndimage.maximum_filter(thin, (3, 1)) & mask
    crossed = ndimage.grey_closing(mask - thin, (thick + 2, 1))
    out |= thin > crossed
  return lines


def _ink(contrast: np.ndarray, strokes: np.ndarray) -> np.ndarray:
  """Returns how much of each pixel is ink, 0 to 1: 0 away from the strokes."""
  near = _grown(strokes, 1 + max(contrast.shape) // 100)
  paper = np.median(contrast[~near]) if not near.all() else 0
  high = np.median(contrast[strokes])  # As in MNIST, half of the ink becomes 1.
  low = paper + (high - paper) / 8  # As in exporting/page.html.
  return np.where(near, np.clip((contrast - low) / max(high - low, 1), 0, 1), 0)


def _separate(ink: np.ndarray) -> list[np.ndarray]:
  """Returns the ink of each digit in a row, [height, width], from the left.

  A part of the ink belongs to a digit nearby if it is above, below or inside
  it, or small. A small part with no digit nearby is dropped.
  """
  height = np.ptp(np.flatnonzero(ink.any(axis=1))) + 1
  labels, count = ndimage.label(_grown(ink, 1 + height // 40), _EIGHT)
  if count > 10 * _MAX_DIGITS:
    return [ink]
  parts = [ink & (labels == label) for label in range(1, count + 1)]
  parts.sort(key=lambda part: -_height(bounding_box(part)))
  tallest = _height(bounding_box(parts[0]))
  digits: list[np.ndarray] = []
  for part in parts:
    box = bounding_box(part)
    is_small = _height(box) < 0.4 * tallest
    gaps = [_gap(box, bounding_box(digit), is_small) for digit in digits]
    if gaps and min(gaps) < 0.4 * tallest:
      digits[int(np.argmin(gaps))] |= part
    elif not is_small:
      digits.append(part)
  if len(digits) > _MAX_DIGITS:
    return [ink]
  return sorted(digits, key=lambda digit: bounding_box(digit)[1].start)


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


def _digit(ink: np.ndarray, part: np.ndarray, scale: float) -> Digit:
  """Puts a part of the ink, [height, width], in MNIST's form.

  Args:
    ink: how much of each pixel is ink.
    part: the mask of the digit.
    scale: the size of the picture divided by that of the ink.
  """
  box = bounding_box(part)
  form = _resize(np.where(part, ink, 0)[box], _BOX)
  seen = _center(np.clip(form / form.max(), 0, 1))
  top, bottom, left, right = (
    round(scale * end) for side in box for end in (side.start, side.stop)
  )
  # A tight crop touches opposite sides, and a digit that is cut off only one.
  is_cut = any(
    (side.start == 0) != (side.stop == size)
    for side, size in zip(box, part.shape, strict=True)
  )
  doubt = "ink touches the edge" if is_cut else ""
  return Digit(seen, (left, top, right, bottom), doubt)


def _prior(
  digits: list[Digit], strokes: np.ndarray, steps: np.ndarray, scale: float
) -> float:
  """Returns a candidate's prior: ink is large, stands out and makes strokes."""
  outline = strokes & ~ndimage.binary_erosion(strokes)
  # Ink ends all around. Light and the paper between strokes do not; so what
  # counts is how much the weakest fifth of the outline stands out.
  step = np.percentile(steps[outline], 20) if outline.any() else 0
  sides = [max(d.box[2] - d.box[0], d.box[3] - d.box[1]) for d in digits]
  area = (np.mean(sides) / scale / max(steps.shape)) ** 2
  fill = np.mean([digit.seen.sum() for digit in digits]) / 255 / _BOX**2
  unusual = np.log(fill / 0.24) / 0.5  # MNIST's median, and 1.5 deviations.
  at_edge = _AT_EDGE * _border(strokes).any()
  return float(np.log(max(step, 1) * area) - unusual**2 / 2 - at_edge)


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


def _shrink(x: np.ndarray) -> np.ndarray:
  return _resize(x, _MAX_SIDE) if max(x.shape) > _MAX_SIDE else x


def _smooth(x: np.ndarray) -> np.ndarray:
  return ndimage.gaussian_filter(x, max(x.shape) / 200)


def _grown(mask: np.ndarray, width: int) -> np.ndarray:
  return ndimage.maximum_filter(mask, 2 * width + 1)


def _border(x: np.ndarray) -> np.ndarray:
  return np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]])


def _height(box: tuple[slice, slice]) -> int:
  return box[0].stop - box[0].start


def _otsu(x: np.ndarray) -> int:
  """Returns the threshold between two classes of pixels (Otsu, 1979).

  Args:
    x: values from 0 to 255.
  """
  counts = np.bincount(np.uint8(x).ravel(), minlength=256)
  below, sums = np.cumsum(counts), np.cumsum(counts * np.arange(256))
  above = np.maximum(x.size - below, 1)
  gap = sums / np.maximum(below, 1) - (sums[-1] - sums) / above
  return int(np.argmax(below * (x.size - below) * gap**2))


def bounding_box(mask: np.ndarray) -> tuple[slice, slice]:
  """Returns the rows and columns that a mask spans."""
  rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
  return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
