"""Scores a run on any split, and shows where it is wrong.

    python evaluate.py --workdir=runs/default --split=test

Writes metrics.json, predictions.csv and pictures to `evaluation/` in the run
directory. The last line on stdout is the result, as JSON. Several runs are
scored as one, an ensemble: the mean of their probabilities.

    python evaluate.py --workdir=runs/a --workdir=runs/b --output=runs/both
"""

import argparse
from collections.abc import Sequence
import csv
import io
import json
import pathlib
from typing import Any
from typing import NamedTuple

from absl import app
import jax
import numpy as np
from sklearn import metrics

import input_pipeline
from machine import compiling
from machine import console
from report import figures
from rundir import files
from rundir import runs
import steps


class Calibration(NamedTuple):
  """How sure a network is and how often it is right, in bins of equal width.

  Attributes:
    counts: of the examples in each bin, [bins].
    accuracies: of each bin, [bins]; 0 where it is empty.
    error: the expected calibration error: Guo et al., "On Calibration of Modern
      Neural Networks", arXiv 1706.04599.
  """

  counts: np.ndarray
  accuracies: np.ndarray
  error: float


def calibrate(
  confidences: np.ndarray, correct: np.ndarray, num_bins: int = 15
) -> Calibration:
  """Bins the [n] probabilities of the predicted classes, in (0, 1]."""
  bins = np.clip(np.ceil(confidences * num_bins) - 1, 0, num_bins - 1)
  bins = bins.astype(int)
  counts = np.bincount(bins, minlength=num_bins)
  right = np.bincount(bins, correct, num_bins)
  gaps = np.abs(right - np.bincount(bins, confidences, num_bins))
  return Calibration(
    counts, right / np.maximum(counts, 1), float(gaps.sum() / len(correct))
  )


def evaluate(
  workdirs: Sequence[pathlib.Path],
  split: str | None = None,
  dataset: str | None = None,
  checkpoint: str = "last",
  output: pathlib.Path | None = None,
) -> tuple[dict[str, Any], str]:
  """Scores a run, or the mean of the probabilities of several.

  Args:
    workdirs: the run directories.
    split: in TFDS's syntax; by default the first config's test split.
    dataset: by default the first config's.
    checkpoint: "last", "best" or a step.
    output: where to write; by default `evaluation/` in the run directory.

  Returns:
    accuracy, loss, global_step and n; and a report for people. Of several runs,
    global_step is a list.

  Raises:
    app.UsageError: names what is wrong with an argument or the directory.
  """
  if len(workdirs) > 1 and not output:
    raise app.UsageError("--output is needed where several runs are scored")
  opened = [runs.open_run(each, checkpoint) for each in workdirs]
  run, config = opened[0], opened[0].config
  for each, other in zip(workdirs, opened, strict=True):
    trained_on = (other.config.dataset, other.image_shape, other.class_names)
    if trained_on != (config.dataset, run.image_shape, run.class_names):
      raise app.UsageError(
        f"--workdir={each}: was not trained on the images and classes of"
        f" {workdirs[0]}"
      )
  config.dataset = dataset or config.dataset
  config.test_split = split or config.test_split
  data = input_pipeline.load(config, ["test"])
  image_shape = data.test.image_shape
  if (image_shape, len(data.class_names)) != (
    run.image_shape,
    len(run.class_names),
  ):
    raise app.UsageError(
      f"--dataset={config.dataset}: has {len(data.class_names)} classes of"
      f" images {list(image_shape)}; accepted are {len(run.class_names)} of"
      f" {list(run.image_shape)}, as in training"
    )
  evaluator = steps.evaluator(data.test, config.eval_batch_size)
  scores = [evaluator(each.state) for each in opened]
  images, labels = jax.device_get((data.test.images, data.test.labels))
  if len(opened) == 1:
    means, probabilities = jax.device_get(scores[0])
    global_step = run.step
  else:
    probabilities = np.mean([jax.device_get(p) for _, p in scores], axis=0)
    means = _score(probabilities, labels)
    global_step = [each.step for each in opened]

  result = {**means, "global_step": global_step, "n": labels.size}
  report = _write(
    output or workdirs[0] / "evaluation",
    {**result, "dataset": config.dataset, "split": config.test_split},
    data.test.unflatten(images),
    labels,
    probabilities,
    data.class_names,
  )
  return result, report


def _score(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  """The means of the metrics, which are computed from logits."""
  logits = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
  return jax.device_get(steps.Metrics.of(logits, labels)).means()


def _write(
  folder: pathlib.Path,
  result: dict[str, Any],
  images: np.ndarray,
  labels: np.ndarray,
  probabilities: np.ndarray,
  class_names: Sequence[str],
) -> str:
  """Writes all files, and returns the report."""
  predicted = probabilities.argmax(axis=1)
  confidences, correct = probabilities.max(axis=1), predicted == labels
  calibration = calibrate(confidences, correct)
  indices = range(len(class_names))
  matrix = metrics.confusion_matrix(labels, predicted, labels=indices)

  def report(**options):
    return metrics.classification_report(
      labels,
      predicted,
      labels=indices,
      target_names=class_names,
      zero_division=0,
      **options,
    )

  folder.mkdir(parents=True, exist_ok=True)
  files.write_json(
    folder / "metrics.json",
    {
      **result,
      "expected_calibration_error": calibration.error,
      "per_class": {
        name: values
        for name, values in report(output_dict=True).items()
        if name in class_names
      },
      "confusion_matrix": matrix.tolist(),
    },
  )
  table = io.StringIO()
  writer = csv.writer(table, lineterminator="\n")
  writer.writerow(["index", "label", "class", *class_names])
  for index, row in enumerate(probabilities):
    names = (class_names[labels[index]], class_names[predicted[index]])
    writer.writerow([index, *names, *(f"{p:.6g}" for p in row)])
  files.write_text(folder / "predictions.csv", table.getvalue())
  for name, picture in {
    "confusion_matrix": figures.confusion_matrix(matrix, class_names),
    "mistakes": figures.mistakes(images, labels, probabilities, class_names),
    "calibration": figures.calibration(*calibration),
  }.items():
    figures.save(picture, folder / f"{name}.png")
  return (
    f"{report(digits=4)}\n"
    f"Rows are the true classes, columns the predicted ones:\n{matrix}\n\n"
    f"Expected calibration error {calibration.error:.4f}. More in {folder}"
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.error = console.exit_with
  parser.add_argument(
    "--workdir",
    required=True,
    action="append",
    type=pathlib.Path,
    help="a run directory; several for an ensemble",
  )
  parser.add_argument(
    "--split", help="in TFDS's syntax; by default the test split"
  )
  parser.add_argument("--dataset", help="another one with images of this shape")
  parser.add_argument(
    "--checkpoint", default="last", help="last, best or a step"
  )
  parser.add_argument(
    "--output",
    type=pathlib.Path,
    help="where to write; by default evaluation/ in the run directory",
  )
  args = parser.parse_args()
  console.setup()
  compiling.cache_compilations()
  compiling.keep_freed_memory()
  with console.one_line_errors():
    result, report = evaluate(
      [workdir.expanduser() for workdir in args.workdir],
      args.split,
      args.dataset,
      args.checkpoint,
      args.output and args.output.expanduser(),
    )
    print(report)
    print(json.dumps(result, sort_keys=True))


if __name__ == "__main__":
  main()
