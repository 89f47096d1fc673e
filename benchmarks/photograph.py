"""Draws docs/photograph.png: digits in felt pen on a sheet under a lamp.

    python benchmarks/photograph.py docs/photograph.png

No camera was involved: the pen follows the points below, with a tremor and a
changing pressure, and the sheet lies on a table, seen from the side.
"""

import sys

import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFilter
from scipy import ndimage

SIZE = (600, 375)
SHEET = (1400, 800)
RULING = 90
# Where the pen goes in each stroke of a digit: to the right and down.
STROKES = {
  "1": ["34,2 31,30 27,62 22,100"],
  "3": ["8,14 22,1 44,4 49,24 36,42 20,47 42,52 54,72 44,94 20,100 2,88"],
  "4": ["16,0 10,28 0,62 32,62 66,58", "56,12 50,60 44,108"],
  "5": ["16,3 13,24 9,46 32,40 52,56 52,82 34,99 14,98 2,88", "15,4 34,4 58,0"],
  "9": ["50,14 34,0 14,8 6,30 16,47 36,44 49,24 51,12 49,50 42,104"],
}


def write(digits: str, rng: np.random.Generator) -> Image.Image:
  """Returns how much of a sheet is ink, in mode L."""
  ink = Image.new("L", SHEET)
  pen = ImageDraw.Draw(ink)
  left = 200.0
  for digit in digits:
    size = rng.uniform(2.3, 2.6)
    slant, base = rng.normal(-0.05, 0.04), 220 + rng.normal(0, 7)
    for stroke in STROKES[digit]:
      points = np.array([p.split(",") for p in stroke.split()], float)
      points += rng.normal(0, 1.2, points.shape)
      ends = np.linspace(0, len(points) - 1, 60 * len(points))
      path = [np.interp(ends, range(len(points)), x) for x in points.T]
      x, y = ndimage.gaussian_filter1d(path, 22, mode="nearest")
      x, y = left + size * (x + slant * (y - 50)), base + size * y
      tremor = ndimage.gaussian_filter1d(rng.normal(0, 1, (3, len(x))), 25)
      radius = 11 + 12 * tremor[2] - 2.5 * np.linspace(0, 1, len(x)) ** 3
      x, y = (x, y) + 5 * tremor[:2]
      for a, b, r in zip(x, y, radius, strict=True):
        fill = int(rng.integers(215, 255))
        pen.ellipse((a - r, b - r, a + r, b + r), fill)
    left += size * 62 + rng.uniform(45, 65)
  return ink.filter(ImageFilter.GaussianBlur(1.5))


def photograph(digits: str, rng: np.random.Generator) -> Image.Image:
  """Returns a photograph of a sheet with digits, in mode RGB."""
  sheet = Image.new("RGBA", SHEET, (246, 240, 226, 255))
  lines = ImageDraw.Draw(sheet)
  for y in range(130, SHEET[1], RULING):
    lines.line((0, y, SHEET[0], y), (196, 205, 216), 2)
  sheet.paste((28, 38, 84), mask=write(digits, rng))
  # The corners of the photograph, seen from the sheet.
  corners = (-150, -60, 60, 760, 1330, 700, 1480, -120)
  size = (2 * SIZE[0], 2 * SIZE[1])
  sheet = sheet.transform(
    size, Image.Transform.QUAD, corners, Image.Resampling.BICUBIC
  )
  grain = rng.normal(0, 1, (size[1], size[0]))
  wood = sum(
    width * ndimage.gaussian_filter(grain, (width, 60 * width))
    for width in (0.7, 2, 6)
  )
  table = np.array([112, 74, 48]) * (1 + 0.17 * wood / wood.std())[..., None]
  share = np.asarray(sheet.getchannel("A"), np.float32)[..., None] / 255
  shade = np.roll(share, (16, 14), (0, 1))
  table *= 1 - 0.65 * ndimage.gaussian_filter(shade, (12, 12, 0))
  paper = np.asarray(sheet.convert("RGB"), np.float32)
  image = share * paper + (1 - share) * table
  # The lamp stands at the upper left, and its light is warm.
  rows, columns = np.indices(image.shape[:2]) / size[0]
  distance = np.hypot(rows - 0.05, columns - 0.25)[..., None]
  image *= (1.12 - 0.62 * distance**1.2) * np.array([1, 0.965, 0.89])
  image = ndimage.gaussian_filter(image, (1.2, 1.2, 0))[::2, ::2]
  image += rng.normal(0, 2, image.shape)
  return Image.fromarray(np.uint8(np.clip(image, 0, 255)))


if __name__ == "__main__":
  photograph("31459", np.random.default_rng(0)).save(sys.argv[1], optimize=True)
