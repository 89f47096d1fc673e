"""Turns MNIST's test digits into the kinds of pictures that people take.

There is one function for each kind. It takes a digit's ink (how much of each
pixel is ink, float [height, width]) and a random generator, and returns a
picture, uint8 [height, width] or [height, width, 3].
"""

from collections.abc import Callable

import numpy as np
from PIL import Image
from PIL import ImageDraw
from scipy import ndimage

INK, PAPER = 30.0, 235.0


def enlarge(digit: np.ndarray, scale: int = 10) -> np.ndarray:
  """Enlarges a uint8 image from MNIST, and returns floats in [0, 1]."""
  side = digit.shape[0] * scale
  image = Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)
  return np.asarray(image, np.float32) / 255


def on_paper(ink: np.ndarray, paper: float = PAPER, color: float = INK):
  return np.uint8(np.clip(paper + ink * (color - paper), 0, 255))


def _noisy(values: np.ndarray, rng: np.random.Generator, sigma: float = 3):
  noise = rng.normal(0, sigma, values.shape)
  return np.uint8(np.clip(values + noise, 0, 255))


def plain(ink, rng):
  return on_paper(ink)


def tight(ink, rng):
  rows, columns = (np.flatnonzero((ink > 0.3).any(axis=i)) for i in (1, 0))
  return on_paper(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def inverted(ink, rng):
  return on_paper(ink, 20, 240)


def lined(ink, rng):
  image = np.float32(on_paper(ink))
  spacing, start = rng.integers(25, 50), rng.integers(0, 25)
  image[start::spacing] = np.minimum(image[start::spacing], 190)
  image[start + 1 :: spacing] = np.minimum(image[start + 1 :: spacing], 190)
  return _noisy(image, rng)


def squared(ink, rng):
  spacing, start = rng.integers(20, 50), rng.integers(0, 20)
  image = np.float32(lined(ink, rng))
  for lines in (image[start::spacing], image[:, start::spacing].T):
    np.minimum(lines, 185, out=lines)
  return _noisy(image, rng)


def vignette(ink, rng):
  rows, columns = np.indices(ink.shape) / ink.shape[0] - 0.5
  light = 1 - rng.uniform(0.5, 0.9) * (rows**2 + columns**2)
  return _noisy(on_paper(ink) * light, rng)


def thin(ink, rng):
  return on_paper(np.clip(ndimage.grey_erosion(ink, 13) * 2, 0, 1))


def faint(ink, rng):
  return _noisy(on_paper(ink, 225, 225 - rng.uniform(45, 80)), rng)


def frame(ink, rng):
  image = on_paper(np.pad(ink, rng.integers(0, 30)))
  width = rng.integers(1, 10)
  is_paper = np.pad(np.ones(np.array(image.shape) - 2 * width, bool), width)
  return np.where(is_paper, image, np.uint8(rng.integers(0, 120)))


def cell(ink, rng):
  """Draws one cell of a table, cut out with a little of its neighbors."""
  image = on_paper(np.pad(ink, 30))
  width, color = rng.integers(1, 7), rng.integers(0, 110)
  for lines in (image, image.T, image[::-1], image.T[::-1]):
    if rng.random() < 0.8:
      start = rng.integers(0, 28)
      lines[start : start + width] = color
  return image


def line_below(ink, rng):
  image = on_paper(np.pad(ink, ((0, 10), (20, 20))))
  row, width = rng.integers(256, 284), rng.integers(1, 6)
  line = slice(row, row + width)
  image[line] = np.minimum(image[line], rng.integers(0, 120))
  return image


def box(ink, rng):
  pad, inset = rng.integers(20, 100), rng.integers(4, 20)
  image = Image.fromarray(on_paper(np.pad(ink, pad)))
  low, high = inset - 4, image.width - 1 - inset + 4
  if rng.random() < 0.5:
    low, high = pad - rng.integers(4, 20), 280 + pad + rng.integers(4, 20)
  ImageDraw.Draw(image).rectangle(
    (low, low, high, high),
    outline=int(rng.integers(0, 110)),
    width=int(rng.integers(1, 8)),
  )
  if rng.random() < 0.5:
    image = image.rotate(
      rng.uniform(-4, 4), Image.Resampling.BICUBIC, fillcolor=int(PAPER)
    )
  return np.asarray(image)


def strip(ink, rng):
  """Draws a dark strip of the table on one side of the sheet."""
  turns = rng.integers(4)
  ink = np.rot90(np.pad(ink, rng.integers(0, 40)), -turns)
  image = _noisy(on_paper(ink), rng)
  width = rng.integers(4, 60)
  dark = rng.normal(rng.uniform(20, 130), 4, (width, image.shape[1]))
  image = np.concatenate([image, np.uint8(np.clip(dark, 0, 255))])
  return np.rot90(image, turns)


def table(ink, rng):
  """Draws a sheet, turned a bit, and the table on two to four of its sides."""
  sheet = np.pad(on_paper(ink), rng.integers(0, 60), constant_values=235)
  pads = rng.integers(15, 90, 4) * (rng.permutation(4) < rng.integers(2, 5))
  pads = pads.reshape(2, 2)
  mask = Image.fromarray(np.pad(np.full(sheet.shape, 255, np.uint8), pads))
  image = Image.fromarray(np.pad(sheet, pads))
  angle = rng.uniform(-6, 6)
  mask, image = (
    np.asarray(x.rotate(angle, Image.Resampling.BICUBIC), np.float32)
    for x in (mask, image)
  )
  wood = rng.uniform(20, 130) + ndimage.gaussian_filter(
    rng.normal(0, 60, mask.shape), (1, 15)
  )
  values = image + wood * (1 - mask / 255)
  return _noisy(ndimage.gaussian_filter(values, 0.8), rng)


def lid(ink, rng):
  """Draws a slip of paper scanned under a lid, with a shadow along its edge."""
  sheet = np.pad(on_paper(ink, 245), rng.integers(0, 30), constant_values=245)
  pads = rng.integers(10, 160, 4).reshape(2, 2)
  is_lid = np.pad(np.zeros(sheet.shape, bool), pads, constant_values=True)
  image = np.float32(np.pad(sheet, pads))
  image[is_lid] = rng.choice([15, 60, 130, 190, 215, 255])
  shadow = ndimage.gaussian_filter(np.float32(np.roll(is_lid, 2, (0, 1))), 2)
  image[is_lid] *= 0.75 + 0.25 * shadow[is_lid]
  return _noisy(image, rng, 2)


def window(ink, rng):
  """Draws a screenshot of a drawing program with a title bar."""
  page = on_paper(np.pad(ink, rng.integers(0, 60)), 255, 0)
  bar = int(rng.integers(24, 50))
  color = rng.choice([20, 60, 120, 200, 225, 240])
  image = np.full((page.shape[0] + bar, page.shape[1], 3), color, np.uint8)
  image[bar:] = page[..., None]
  image = Image.fromarray(image)
  draw = ImageDraw.Draw(image)
  dots = ("#ff5f57", "#febc2e", "#28c840")
  for index, dot in enumerate(dots if rng.random() < 0.5 else ()):
    left = 8 + 20 * index
    draw.ellipse((left, bar // 2 - 6, left + 12, bar // 2 + 6), dot)
  text = "black" if color > 110 else "white"
  draw.text((90, bar // 2), "Untitled - Paint", text, anchor="lm", font_size=14)
  draw.text((image.width - 20, bar // 2), "x", text, anchor="lm", font_size=18)
  if rng.random() < 0.5:
    draw.rectangle((0, 0, image.width - 1, image.height - 1), outline="#555")
  if rng.random() < 0.5:
    draw.rectangle(
      (0, image.height - 18, image.width, image.height), tuple([int(color)] * 3)
    )
  return np.asarray(image)


def shadow(ink, rng):
  """Draws a sheet partly in the shadow of a hand or a phone."""
  size = ink.shape[0] + 60
  angle, offset = rng.uniform(0, 2 * np.pi), rng.uniform(-0.35, 0.35)
  rows, columns = np.indices((size, size)) / size - 0.5
  is_dark = np.cos(angle) * rows + np.sin(angle) * columns > offset
  soft = ndimage.gaussian_filter(np.float32(is_dark), rng.choice([1, 8, 25]))
  light = 1 - rng.uniform(0.25, 0.55) * soft
  return _noisy(on_paper(np.pad(ink, 30)) * light, rng)


def colored(ink, rng):
  """Draws ink of a different color than its paper, but of the same luma."""
  pairs = (
    ((220, 40, 40), (30, 60, 250)),
    ((60, 130, 230), (200, 70, 130)),
    ((0, 140, 60), (190, 60, 60)),
  )
  paper, color = np.float32(pairs[rng.integers(len(pairs))])
  if rng.random() < 0.5:
    paper, color = color, paper
  weights = np.float32([0.299, 0.587, 0.114])
  color = color * (paper @ weights) / (color @ weights)
  ink = np.pad(ink, 20)[..., None]
  return _noisy(paper + ink * (color - paper), rng)


def _turned(sheet: np.ndarray, around: np.ndarray, angle: float) -> np.ndarray:
  """Turns a sheet so that slivers of what is around it show at the corners."""
  image = Image.fromarray(np.uint8(np.clip(sheet, 0, 255)))
  mask = Image.new("L", image.size, 255)
  image, mask = (
    x.rotate(angle, Image.Resampling.BICUBIC) for x in (image, mask)
  )
  share = np.asarray(mask, np.float32)[..., None] / 255
  return np.asarray(image, np.float32) * share + around * (1 - share)


def _lamplight(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
  """Returns a lamp's light, [height, width, 1], which falls off to one side."""
  rows, columns = np.indices(shape) / max(shape)
  center = rng.uniform(0.1, 0.9, 2)
  distance = np.hypot(rows - center[0], columns - center[1])
  return (1 - rng.uniform(0.3, 0.6) * distance**1.3)[..., None]


def _written(
  ink: np.ndarray, rng: np.random.Generator, height: int = 380, width: int = 480
) -> np.ndarray:
  """Puts a digit anywhere on a larger sheet, [height, width, 1]."""
  side = int(rng.integers(130, min(230, width - 45)))
  small = Image.fromarray(np.uint8(255 * np.clip(ink, 0, 1)))
  small = small.resize((side, side), Image.Resampling.LANCZOS)
  sheet = Image.new("L", (width, height))
  left = int(rng.integers(20, width - side - 20))
  sheet.paste(small, (left, int(rng.integers(20, height - side - 20))))
  return np.asarray(sheet, np.float32)[..., None] / 255


_PENS = np.array(
  [(35, 35, 38), (38, 55, 130), (30, 40, 90), (150, 30, 40)], np.float32
)


def lamp(ink, rng):
  """Draws pen on cream paper under a lamp, with slivers of the table."""
  ink = _written(ink, rng)
  paper = np.float32([240, 230, 205])
  sheet = paper + ink * (_PENS[rng.integers(3)] - paper)
  table = np.float32([(105, 65, 45), (45, 38, 36)])[rng.integers(2)]
  angle = rng.choice([-1, 1]) * rng.uniform(2, 6)
  image = _turned(sheet, table, angle) * _lamplight(ink.shape[:2], rng)
  return _noisy(ndimage.gaussian_filter(image, (0.7, 0.7, 0)), rng)


def whiteboard(ink, rng):
  """Draws a marker on a glossy board, with a reflection and wiped-off ink."""
  old = ndimage.gaussian_filter(np.roll(ink, 60, 1)[::-1], 9)
  ink = _written(ink, rng)
  board = np.float32([205, 210, 214])
  pens = np.float32([(25, 25, 30), (30, 60, 170), (190, 35, 40), (20, 120, 60)])
  pen = pens[rng.integers(4)]
  image = board + 0.9 * ink * (pen - board)
  old = np.asarray(Image.fromarray(old).resize(ink.shape[1::-1]))[..., None]
  image += 0.15 * old * (pen - board)
  rows, columns = np.indices(ink.shape[:2])
  center = rng.uniform(0, 1, 2) * ink.shape[:2]
  distance = np.hypot(rows - center[0], columns - center[1])[..., None]
  glare = np.exp(-((distance / rng.uniform(40, 90)) ** 2))
  image += 0.6 * glare * (255 - image)
  if rng.random() < 0.5:
    image[-int(rng.integers(8, 30)) :] = rng.uniform(90, 160)  # The tray.
  return _noisy(image * _lamplight(ink.shape[:2], rng) ** 0.5, rng)


def squared_lamp(ink, rng):
  """Draws a pen on squared paper under a lamp, a little turned."""
  ink = _written(ink, rng)
  sheet = np.broadcast_to(np.float32([243, 240, 232]), (*ink.shape[:2], 3))
  sheet = sheet.copy()
  spacing, start = rng.integers(18, 36), rng.integers(0, 18)
  for lines in (sheet[start::spacing], sheet[:, start::spacing]):
    lines[:] = (165, 185, 215)
  sheet = ndimage.gaussian_filter(sheet, (0.6, 0.6, 0))
  sheet += ink * (_PENS[rng.integers(4)] - sheet)
  image = _turned(sheet, np.float32([70, 50, 40]), rng.uniform(-4, 4))
  return _noisy(image * _lamplight(ink.shape[:2], rng), rng)


def receipt(ink, rng):
  """Draws a pen on a receipt, a narrow strip with print at its top."""
  width = int(rng.integers(240, 300))
  ink = _written(ink, rng, 400, width)
  paper = np.float32([232, 232, 236])
  sheet = Image.fromarray(
    np.uint8(paper + ink * (_PENS[rng.integers(4)] - paper))
  )
  draw = ImageDraw.Draw(sheet)
  for row in range(2):
    text = "".join(rng.choice(list("ABCDEHKLMNORSTU 0123"), 22))
    draw.text((14, 4 + 11 * row), text, (120, 120, 130), font_size=9)
  curl = 0.8 + 0.2 * np.sin(np.linspace(0.2, np.pi - 0.2, width))[:, None]
  sheet = np.asarray(sheet, np.float32) * curl
  wood = (
    np.float32([92, 66, 48])
    + ndimage.gaussian_filter(rng.normal(0, 50, (400, 480)), (1, 12))[..., None]
  )
  left = int(rng.integers(20, 460 - width))
  image = wood.copy()
  image[:, left : left + width] = sheet
  return _noisy(ndimage.gaussian_filter(image, (0.6, 0.6, 0)), rng)


def chalk(ink, rng):
  """Draws grainy chalk on a dusty board."""
  ink = _written(ink, rng)
  grain = ndimage.gaussian_filter(rng.normal(0.75, 0.5, ink.shape), (1, 1, 0))
  dust = ndimage.gaussian_filter(rng.normal(0, 1, ink.shape), (20, 20, 0))
  board = np.float32([(38, 66, 54), (45, 47, 50)])[rng.integers(2)]
  board = board + 16 * np.clip(dust / dust.std(), -1, 2)
  image = board + ink * np.clip(grain, 0, 1) * (
    np.float32([232, 232, 225]) - board
  )
  if rng.random() < 0.5:
    image[: int(rng.integers(8, 30))] = (150, 110, 70)  # The wooden frame.
  return _noisy(image, rng, 4)


def screen(ink, rng):
  """Draws a photographed screen: pixel pattern, bezel and a blue cast."""
  ink = _written(ink, rng)
  page, color = (245, 20) if rng.random() < 0.7 else (30, 235)
  sheet = page + ink * np.float32([color - page] * 3)
  rows, columns = np.indices(ink.shape[:2])
  angle, period = rng.uniform(0, np.pi), rng.uniform(5, 14)
  wave = np.cos(angle) * rows + np.sin(angle) * columns
  sheet *= (1 + 0.06 * np.sin(2 * np.pi * wave / period))[..., None]
  sheet *= np.float32([0.88, 0.95, 1])
  bezel = int(rng.integers(0, 30))
  if bezel:
    sheet[-bezel:] = 15
    if rng.random() < 0.5:
      sheet[:, :bezel] = 15
  image = _turned(sheet, np.float32([15, 15, 18]), rng.uniform(-3, 3))
  return _noisy(ndimage.gaussian_filter(image, (0.8, 0.8, 0)), rng, 4)


KINDS: dict[str, Callable] = {
  draw.__name__: draw
  for draw in (
    *(plain, tight, inverted, lined, squared, vignette, thin, faint, frame),
    *(cell, line_below, box, strip, table, lid, window, shadow, colored),
    *(lamp, whiteboard, squared_lamp, receipt, chalk, screen),
  )
}
