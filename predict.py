"""Predicts the classes of your own images.

    python predict.py --workdir=runs/default digit.png photos/ --sheet=sheet.png

Images are files, folders, .npy arrays, or - for standard input. Drawings and
photographs of a digit are brought to MNIST's form first: light ink on black,
scaled and centred as in the database. From Python, arrays of that form are
predicted by `predictor(runs.open_run("runs/default"))(images)`.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import json
import pathlib
import sys
from typing import NamedTuple

from absl import app
import jax
import numpy as np
import tqdm

import input_pipeline
from machine import compiling
from machine import console
from rundir import files
from rundir import runs
from sources import photographs
import steps

_BATCH_SIZE = 100
_MAX_ON_SHEET = 50


def predictor(run: runs.Run) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a function that predicts images of the form of the training's.

  Args:
    run: from `runs.open_run`.

  Returns:
    A function of uint8 images [n, *run.image_shape], for MNIST [n, 28, 28, 1],
    that returns the probabilities of run.class_names, float32 [n, classes]. It
    raises ValueError if the images have another shape or dtype.
  """

  @compiling.jit
  def predict_batch(state, images):
    return jax.nn.softmax(
      steps.eval_step(state, input_pipeline.to_float(images))
    )

  def predict(images):
    images = np.asarray(images)
    if images.shape[1:] != run.image_shape or images.dtype != np.uint8:
      raise ValueError(
        f"images are {images.dtype} {list(images.shape)}; must be uint8 [n,"
        f" {', '.join(map(str, run.image_shape))}]"
      )
    padded = -(-len(images) // _BATCH_SIZE) * _BATCH_SIZE or _BATCH_SIZE
    batches = np.zeros((padded, *run.image_shape), np.uint8)  # Compiled once.
    batches[: len(images)] = images
    probabilities = [
      np.asarray(predict_batch(run.state, batches[start : start + _BATCH_SIZE]))
      for start in range(0, padded, _BATCH_SIZE)
    ]
    return np.concatenate(probabilities)[: len(images)]

  return predict


def find(
  arguments: Iterable[str],
) -> Iterator[tuple[str, pathlib.Path | bytes]]:
  """Yields the name and the source of each file that the arguments mean."""
  for argument in arguments:
    path = files.local_path(argument)
    if argument == "-":
      yield "-", sys.stdin.buffer.read()
    elif path.is_dir():
      images = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in photographs.SUFFIXES and file.is_file()
      ]
      yield from ((str(file), file) for file in images)
      if not images:
        yield argument, path
    else:
      yield argument, path


def to_network(
  image: np.ndarray, image_shape: tuple[int, int, int], raw: bool, invert: str
) -> np.ndarray:
  """The image as the network takes it, uint8 of `image_shape`.

  Raises:
    ValueError: it has no ink or, if it is raw, another shape.
  """
  if not raw:
    return photographs.to_mnist_form(image, invert).reshape(image_shape)
  if image.shape[:2] != image_shape[:2]:
    raise ValueError(
      f"is {list(image.shape[:2])}; with --raw, {list(image_shape[:2])} is"
      " accepted"
    )
  if image_shape[2] == 1:
    image = np.round(photographs.to_grey(image)).astype(np.uint8)
  elif image.ndim == 2:
    image = np.repeat(image[..., None], 3, axis=-1)
  return (255 - image if invert == "yes" else image).reshape(image_shape)


class Loaded(NamedTuple):
  """An image as given, if a sheet is to show it, and as the network sees it."""

  name: str
  given: np.ndarray | None
  seen: np.ndarray


def load(
  args: argparse.Namespace, image_shape: tuple[int, int, int]
) -> tuple[list[Loaded], bool]:
  """Reads all images; says which cannot be, and returns whether all could."""
  result, all_good = [], True

  def complain(name, error):
    nonlocal all_good
    all_good = False
    line = console.printable(f"predict.py: {name}: {error}")
    tqdm.tqdm.write(line, file=sys.stderr)

  sources = list(find(args.images))
  for name, source in tqdm.tqdm(
    sources, unit=" files", disable=None if len(sources) > 100 else True
  ):
    try:
      images = list(photographs.read(source))
    except ValueError as error:
      complain(name, error)
      continue
    for index, image in enumerate(images):
      member = f"{name}[{index}]" if len(images) > 1 else name
      try:
        seen = to_network(image, image_shape, args.raw, args.invert)
      except ValueError as error:
        complain(member, error)
        continue
      for_sheet = args.sheet and len(result) < _MAX_ON_SHEET
      result.append(Loaded(member, image if for_sheet else None, seen))
  return result, all_good


def _print(names, probabilities, class_names, as_json: bool) -> None:
  if not as_json:
    names = [*map(console.printable, names)]
    width = max(map(len, ("file", *names)))
    print(f"{'file':{width}}  class  probability  runner-up")
  for name, row in zip(names, probabilities, strict=True):
    best, second = np.argsort(-row, kind="stable")[:2]
    if as_json:
      record = {
        "file": name,
        "class": class_names[best],
        "probability": float(row[best]),
        "probabilities": dict(zip(class_names, row.tolist(), strict=True)),
      }
      print(json.dumps(record))
    else:
      print(
        f"{name:{width}}  {class_names[best]:5}  {row[best]:11.4f}"
        f"  {class_names[second]} ({row[second]:.4f})"
      )


def _report(args, run: runs.Run, images: list[Loaded]) -> None:
  """Prints the predictions, and draws them if that is asked for."""
  names, given, seen = map(list, zip(*images, strict=True))
  probabilities = predictor(run)(np.stack(seen))
  _print(names, probabilities, run.class_names, args.json)
  if not args.sheet:
    return
  from report import figures

  rows = slice(_MAX_ON_SHEET)
  picture = figures.predictions(
    given[rows], seen[rows], probabilities[rows], names[rows], run.class_names
  )
  figures.save(picture, args.sheet)
  if len(names) > _MAX_ON_SHEET:
    print(f"{args.sheet} shows the first {_MAX_ON_SHEET}", file=sys.stderr)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.error = console.exit_with
  parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER")
  parser.add_argument("--workdir", required=True, help="a run directory")
  parser.add_argument(
    "--checkpoint", default="last", help="last, best or a step"
  )
  parser.add_argument(
    "--raw", action="store_true", help="the images have MNIST's form already"
  )
  parser.add_argument(
    "--invert",
    choices=("auto", "yes", "no"),
    default="auto",
    help="whether the ink is darker than the paper",
  )
  parser.add_argument("--json", action="store_true", help="one object a line")
  parser.add_argument("--sheet", help="a picture file to draw all this in")
  args = parser.parse_args()
  console.setup()
  compiling.cache_compilations()
  with console.one_line_errors():
    args.sheet = args.sheet and files.local_path(args.sheet)
    run = runs.open_run(args.workdir, args.checkpoint)
    if run.config.dataset != "mnist" and not args.raw:
      raise app.UsageError(
        f"{args.workdir}: trained on {run.config.dataset}, and the form of"
        f" mnist alone is known; --raw takes images of {list(run.image_shape)}"
      )
    images, all_good = load(args, run.image_shape)
    if images:
      _report(args, run, images)
  sys.exit(0 if all_good else 1)


if __name__ == "__main__":
  main()
