r"""Measures how well a run reads digits that are not from MNIST.

    python benchmarks/unseen_digits.py --workdir=runs/default \
      --json=docs/unseen_digits.json --picture=docs/unseen_digits.png

The pictures are printed digits, rendered in the fonts that come with matplotlib
and made to look like photographs of paper (uneven light, noise, blur, a few
degrees of rotation); scikit-learn's `load_digits`, 1,797 handwritten digits of
8x8 pixels; and MNIST's test digits in each kind of picture of
digit_pictures.py. All are processed as predict.py would process a file; a
picture in which more than one digit is found counts as wrong. Of wrong and of
right pictures, it also counts those that predict.py would mark unsure.
"""

import argparse
import json
import pathlib
import sys

import matplotlib
from matplotlib import figure
from matplotlib.patches import Rectangle
import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFilter
from PIL import ImageFont
from sklearn import datasets
import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import digit_pictures  # noqa: E402
from configs import default  # noqa: E402
import input_pipeline  # noqa: E402
import predict  # noqa: E402
from report import figures  # noqa: E402
from rundir import runs  # noqa: E402
from sources import photographs  # noqa: E402

FONTS = (
  "DejaVuSans",
  "DejaVuSans-Bold",
  "DejaVuSans-Oblique",
  "DejaVuSansMono",
  "DejaVuSerif",
  "DejaVuSerif-Italic",
  "STIXGeneral",
  "STIXGeneralItalic",
  "cmr10",
  "cmss10",
)
PHOTOGRAPHS_EACH = 10  # For each digit and font.
PICTURES_EACH = 200  # For each kind of picture.
HEIGHT, WIDTH = 240, 320


def photograph(digit: int, font: str, rng: np.random.Generator) -> np.ndarray:
  """Draws a photograph of a printed digit, uint8 [HEIGHT, WIDTH]."""
  folder = pathlib.Path(matplotlib.get_data_path()) / "fonts/ttf"
  truetype = ImageFont.truetype(
    str(folder / f"{font}.ttf"), int(rng.integers(60, 140))
  )
  ink = Image.new("L", (WIDTH, HEIGHT))
  ImageDraw.Draw(ink).text(
    (WIDTH / 2, HEIGHT / 2), str(digit), 255, truetype, anchor="mm"
  )
  ink = ink.rotate(
    rng.uniform(-8, 8),
    Image.Resampling.BICUBIC,
    translate=tuple(rng.integers(-40, 40, 2)),
  ).filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2)))
  rows, columns = np.indices((HEIGHT, WIDTH)) / WIDTH - 0.5
  angle = rng.uniform(0, 2 * np.pi)
  light = 1 + 0.3 * (np.sin(angle) * rows + np.cos(angle) * columns)
  reflected = 1 - rng.uniform(0.6, 0.9) * np.asarray(ink) / 255
  values = rng.uniform(150, 210) * light * reflected
  values += rng.normal(0, 5, values.shape)
  return np.clip(values, 0, 255).astype(np.uint8)


def make_sets() -> dict[str, tuple[list[np.ndarray], np.ndarray]]:
  """Returns the images and labels of each set."""
  rng = np.random.default_rng(0)
  labels = np.tile(np.arange(10), len(FONTS) * PHOTOGRAPHS_EACH)
  fonts = np.repeat(FONTS, 10 * PHOTOGRAPHS_EACH)
  printed = [
    photograph(digit, font, rng)
    for digit, font in zip(labels, fonts, strict=True)
  ]
  digits = datasets.load_digits()
  test = input_pipeline.load(default.get_config(), ["test"]).test
  chosen = rng.choice(len(test.labels), PICTURES_EACH, replace=False)
  inks = [
    digit_pictures.enlarge(image)
    for image in np.asarray(test.images[chosen]).reshape(-1, 28, 28)
  ]
  return {
    "printed digits, photographed": (printed, labels),
    "load_digits, 8x8": (
      list(np.round(digits.images * 255 / 16).astype(np.uint8)),
      digits.target,
    ),
    **{
      kind: ([draw(ink, rng) for ink in inks], np.asarray(test.labels)[chosen])
      for kind, draw in digit_pictures.KINDS.items()
    },
  }


def draw(
  shown: list[tuple[np.ndarray, photographs.Digit, str, str]],
) -> figure.Figure:
  """Draws pictures, what the network sees of them, and titles in a color."""
  columns = 5
  rows = -(-len(shown) // columns)
  picture = figure.Figure((10, 1.45 * rows), layout="constrained")
  grid = picture.subplots(rows, 2 * columns).reshape(-1, 2)
  for axes in grid.ravel():
    axes.axis("off")
    axes.set_anchor("N")  # Titles are in line.
  for (left, right), (image, digit, title, color) in zip(
    grid, shown, strict=False
  ):
    left.imshow(image, cmap="gray", vmin=0, vmax=255)
    x, y, right_x, bottom_y = digit.box
    size = right_x - x, bottom_y - y
    left.add_patch(Rectangle((x, y), *size, fill=False, color="#e69f00"))
    right.imshow(digit.seen, cmap="gray", vmin=0, vmax=255)
    left.set_title(title, color=color, fontsize=9, loc="left")
  return picture


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--checkpoint", default="last")
  parser.add_argument("--json", help="where to write the result")
  parser.add_argument(
    "--picture", type=pathlib.Path, help="where to draw one picture of each set"
  )
  args = parser.parse_args()
  run = runs.open_run(args.workdir, args.checkpoint)
  predictor = predict.predictor(run)
  result = {}
  shown: list[tuple[np.ndarray, photographs.Digit, str, str]] = []
  for name, (images, labels) in make_sets().items():
    digits = [
      photographs.find_digits(image, judge=predictor)
      for image in tqdm.tqdm(images, desc=name, disable=None)
    ]
    seen = np.stack([found[0].seen[..., None] for found in digits])
    probabilities = predictor(seen)
    correct = probabilities.argmax(axis=1) == labels
    correct &= np.array([len(found) == 1 for found in digits])
    first = [found[0] for found in digits]
    doubts = predict.doubts_about(first, probabilities)
    is_unsure = np.array(doubts) != ""
    result[name] = {
      "n": len(labels),
      "accuracy": float(correct.mean()),
      "unsure_of_wrong": f"{is_unsure[~correct].sum()} of {(~correct).sum()}",
      "unsure_of_right": f"{is_unsure[correct].sum()} of {correct.sum()}",
      "accuracy_by_class": {
        str(digit): float(correct[labels == digit].mean())
        for digit in range(10)
      },
    }
    print({name: list(result[name].values())[:4]})
    index = np.random.default_rng([len(shown), 2]).integers(len(labels))
    reading = f"{labels[index]} read as {probabilities[index].argmax()}"
    mark = ", unsure" * bool(doubts[index])
    title = f"{name.split(',')[0]}:\n{reading}{mark}"
    color = "black" if correct[index] else "#d55e00"
    shown.append((images[index], digits[index][0], title, color))
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
  if args.picture:
    figures.save(draw(shown), args.picture)


if __name__ == "__main__":
  main()
