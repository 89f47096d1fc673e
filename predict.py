"""Predicts the classes of your own images.

    python predict.py --workdir=runs/default digit.png photos/ --sheet=sheet.png

Takes image files, folders and .npy arrays; - is standard input. Drawings and
photographs of digits are first brought to MNIST's form: light ink on black,
scaled and centered. What is ink is the network's choice among a few candidates.
Several digits are read one by one, line by line. A prediction is marked unsure
if another candidate is nearly as likely and reads differently, if the digit
seems cut off by the edge of the picture, or if the probability is below 0.9.
Probabilities are calibrated: of the predictions with 0.9, nine in ten should be
right. With several --workdir, they are averaged.
From Python, `predictor(runs.open_run("runs/default"))(images)` takes arrays in
MNIST's form.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
import json
import os
import pathlib
import sys
from typing import NamedTuple

import jax
import numpy as np
import tqdm

import calibration
from machine import compiling
from machine import console
from machine import errors
from rundir import files
from rundir import runs
from sources import image_files
from sources import photographs
import steps

_BATCH_SIZE = 20  # Four candidates of a row of five digits.
_MAX_ON_SHEET = 50


def predictor(run: runs.Run) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a function that predicts the classes of images.

  Args:
    run: from `runs.open_run`.

  Returns:
    A function from images to the calibrated probabilities of run.class_names,
    float32 [n, classes]. The images are uint8 or floats in [0, 1], [n,
    *run.image_shape]; one image needs no n, and gray ones no channels, so
    MNIST's are [n, 28, 28, 1], [n, 28, 28] or [28, 28]. It raises ValueError if
    they are not.
  """
  shape = run.image_shape
  of_one = (shape, shape[:2]) if shape[2] == 1 else (shape,)

  @compiling.jit
  def predict_batch(state, images):
    return jax.nn.softmax(steps.eval_step(state, images))

  def predict(images):
    images = np.asarray(images)
    if images.shape in of_one:
      images = images[None]
    if images.dtype.kind == "f" and images.size:
      low, high = images.min(), images.max()
      if not (low >= 0 and high <= 1):  # Also true for NaN.
        raise ValueError(f"images are from {low} to {high}; must be in [0, 1]")
      images = images.astype(np.float32)
    if images.shape[1:] not in of_one or images.dtype not in (
      np.uint8,
      np.float32,
    ):
      raise ValueError(
        f"images are {images.dtype} {list(images.shape)}; must be uint8 or"
        f" floats in [0, 1], [n, {', '.join(map(str, shape))}]"
      )
    images = images.reshape(-1, *shape)
    # Only full batches: another size would have to be compiled too.
    padded = -(-len(images) // _BATCH_SIZE) * _BATCH_SIZE or _BATCH_SIZE
    batches = np.zeros((padded, *shape), images.dtype)
    batches[: len(images)] = images
    probabilities = [
      np.asarray(predict_batch(run.state, batches[start : start + _BATCH_SIZE]))
      for start in range(0, padded, _BATCH_SIZE)
    ]
    probabilities = np.concatenate(probabilities)[: len(images)]
    return calibration.apply(probabilities, run.temperature)

  return predict


def ensemble(opened: list[runs.Run]) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a predictor with the mean probabilities of several runs."""
  predictors = [predictor(run) for run in opened]
  return lambda images: np.mean([each(images) for each in predictors], axis=0)


def find(argument: str) -> Iterator[tuple[str, pathlib.Path | bytes]]:
  """Yields the name and the path or content of each image to read."""
  path = files.local_path(argument)
  if argument == "-":
    yield "-", sys.stdin.buffer.read()
    return
  found, _ = image_files.find(path)
  if found:  # It is a folder.
    yield from ((str(path / file), path / file) for file in found)
  else:
    yield argument, path


def to_network(
  image: np.ndarray, image_shape: tuple[int, int, int], invert: str
) -> np.ndarray:
  """Returns an image as network input: uint8 [height, width, channels].

  Raises:
    ValueError: if its height and width are not those of `image_shape`.
  """
  if image.shape[:2] != image_shape[:2]:
    raise ValueError(
      f"is {list(image.shape[:2])}; with --raw, must be {list(image_shape[:2])}"
    )
  if image_shape[2] == 1:
    image = image_files.to_gray(image)
  elif image.ndim == 2:
    image = np.repeat(image[..., None], 3, axis=-1)
  return (255 - image if invert == "yes" else image).reshape(image_shape)


class Loaded(NamedTuple):
  """A digit found in an image.

  Attributes:
    file: the name of the image.
    part: the position of the digit in the image, from 1.
    parts: the number of digits in the image.
    given: the image, or None if no sheet will show it.
    digit: what the network sees, its place in the image and any doubt.
  """

  file: str
  part: int
  parts: int
  given: np.ndarray | None
  digit: photographs.Digit

  @property
  def name(self) -> str:
    name = console.printable(self.file)
    return name if self.parts == 1 else f"{name} ({self.part} of {self.parts})"


def load(
  args: argparse.Namespace,
  image_shape: tuple[int, int, int],
  judge: Callable[[np.ndarray], np.ndarray],
) -> tuple[list[Loaded], bool]:
  """Reads all images and reports those that cannot be read.

  `judge` returns the probabilities of what may be digits.

  Returns:
    The digits, and whether all images could be read.
  """
  result: list[Loaded] = []
  all_good = True

  def complain(name, error):
    nonlocal all_good
    all_good = False
    line = console.printable(f"predict.py: {name}: {error}")
    tqdm.tqdm.write(line, file=sys.stderr)

  sources: list[tuple[str, pathlib.Path | bytes]] = []
  for argument in args.images:
    try:
      sources += find(argument)
    except errors.UserError as error:  # It is a URL.
      complain(argument, str(error).removeprefix(f"{argument}: "))
  paths = (source for _, source in sources if isinstance(source, pathlib.Path))
  if args.sheet and os.path.realpath(args.sheet) in map(
    os.path.realpath, paths
  ):
    raise errors.UserError(
      f"--sheet={args.sheet}: is one of the images; must be another file"
    )
  for name, source in tqdm.tqdm(
    sources, unit=" files", disable=None if len(sources) > 100 else True
  ):
    try:
      images = list(image_files.read(source, args.fit))
    except ValueError as error:
      complain(name, error)
      continue
    for index, image in enumerate(images):
      member = f"{name}[{index}]" if len(images) > 1 else name
      try:
        digits = _digits(image, image_shape, args, judge)
      except ValueError as error:
        complain(member, error)
        continue
      for part, digit in enumerate(digits, 1):
        given = image if args.sheet and len(result) < _MAX_ON_SHEET else None
        result.append(Loaded(member, part, len(digits), given, digit))
  return result, all_good


def _digits(
  image: np.ndarray, image_shape: tuple[int, int, int], args, judge
) -> list[photographs.Digit]:
  """Returns the digits in an image; with --raw, the image is one digit."""
  if args.raw:
    height, width = image.shape[:2]
    seen = to_network(image, image_shape, args.invert)
    return [photographs.Digit(seen, (0, 0, width, height))]
  digits = photographs.find_digits(image, args.invert, args.single, judge)
  return [d._replace(seen=d.seen.reshape(image_shape)) for d in digits]


def doubts_about(
  digits: list[photographs.Digit], probabilities: np.ndarray
) -> list[str]:
  """Returns why each prediction is unsure; "" if it is not."""
  is_low = probabilities.max(axis=1) < calibration.SURE
  low = f"probability below {calibration.SURE}"
  return [
    "; ".join([digit.doubt] * bool(digit.doubt) + [low] * bool(is_low))
    for digit, is_low in zip(digits, is_low, strict=True)
  ]


def _print(
  images: list[Loaded],
  probabilities: np.ndarray,
  doubts: list[str],
  class_names: tuple[str, ...],
  as_json: bool,
) -> None:
  if not as_json:
    width = max(len("file"), *(len(image.name) for image in images))
    print(f"{'file':{width}}  class  probability  runner-up")
  for image, row, doubt in zip(images, probabilities, doubts, strict=True):
    best, second = np.argsort(-row, kind="stable")[:2]
    if as_json:
      record = {
        "file": image.file,
        "part": image.part,
        "parts": image.parts,
        "box": image.digit.box,
        "class": class_names[best],
        "probability": float(row[best]),
        "unsure": doubt or None,
        "probabilities": dict(zip(class_names, row.tolist(), strict=True)),
      }
      print(json.dumps(record))
    else:
      print(
        f"{image.name:{width}}  {class_names[best]:5}  {row[best]:11.4f}"
        f"  {class_names[second]} ({row[second]:.4f})"
        + (f"  unsure: {doubt}" if doubt else "")
      )


def _report(args, opened: list[runs.Run], judge, images: list[Loaded]) -> None:
  """Prints the predictions and draws them if --sheet is given."""
  seen = np.stack([image.digit.seen for image in images])
  probabilities = judge(seen)
  doubts = doubts_about([image.digit for image in images], probabilities)
  class_names = opened[0].class_names
  _print(images, probabilities, doubts, class_names, args.json)
  if not args.sheet:
    return
  from report import figures

  given = [image.given for image in images if image.given is not None]
  shown = images[: len(given)]
  picture = figures.predictions(
    given,
    seen[: len(given)],
    probabilities[: len(given)],
    [image.name for image in shown],
    class_names,
    [None if args.raw else image.digit.box for image in shown],
    doubts[: len(given)],
  )
  figures.save(picture, args.sheet)
  if len(images) > len(given):
    sheet = console.printable(str(args.sheet))
    print(f"{sheet} shows only the first {len(given)} digits", file=sys.stderr)


def main() -> None:
  parser = console.Parser(__doc__)
  parser.add_argument(
    "images",
    nargs="+",
    metavar="IMAGE_OR_FOLDER",
    help="a file, a folder or - for standard input",
  )
  parser.add_argument(
    "--workdir",
    required=True,
    action="append",
    dest="workdirs",
    metavar="DIR",
    help="a run directory; give several for an ensemble",
  )
  parser.add_argument(
    "--checkpoint", default="last", help="last (the default), best or a step"
  )
  parser.add_argument(
    "--raw",
    action="store_true",
    help="take the images as they are, already the size of the training images",
  )
  parser.add_argument(
    "--invert",
    choices=("auto", "yes", "no"),
    default="auto",
    help="whether the ink is darker than the paper; by default auto",
  )
  parser.add_argument(
    "--single", action="store_true", help="read each image as one digit"
  )
  parser.add_argument(
    "--json", action="store_true", help="print one JSON object per line"
  )
  parser.add_argument(
    "--sheet", type=files.local_path, help="a file to draw the predictions in"
  )
  with console.program():
    args = parser.parse_args()
    opened = runs.open_ensemble(args.workdirs, args.checkpoint)
    run = opened[0]
    args.fit = None
    if run.config.dataset == "image_folder":
      args.raw, args.fit = True, run.config.image_size
    if run.config.dataset != "mnist" and not args.raw:
      raise errors.UserError(
        f"{args.workdirs[0]}: was trained on {run.config.dataset}, but pictures"
        " can only be brought to mnist's form; --raw takes images of"
        f" {list(run.image_shape)} as they are"
      )
    judge = ensemble(opened)
    images, all_good = load(args, run.image_shape, judge)
    if images:
      _report(args, opened, judge, images)
  sys.exit(0 if all_good else 1)


if __name__ == "__main__":
  main()
