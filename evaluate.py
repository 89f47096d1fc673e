"""Scores a run on any split, and shows where it is wrong.

    python evaluate.py --workdir=runs/default --split=test

Writes metrics.json, predictions.csv and pictures to `evaluation/` in the run
directory. The last line on stdout is the result, as JSON.
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
import logger
import ops
import pictures
import steps
import workdir as workdir_lib


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
  workdir: pathlib.Path,
  split: str | None = None,
  dataset: str | None = None,
  checkpoint: str = "last",
) -> tuple[dict[str, Any], str]:
  """Scores a run, and writes `evaluation/` in its directory.

  Args:
    workdir: the run directory.
    split: in TFDS's syntax; by default the config's test split.
    dataset: by default the config's.
    checkpoint: "last", "best" or a step.

  Returns:
    accuracy, loss, global_step and n; and a report for people.

  Raises:
    app.UsageError: names what is wrong with an argument or the directory.
  """
  run = workdir_lib.open_run(workdir, checkpoint)
  config = run.config
  config.dataset = dataset or config.dataset
  config.test_split = split or config.test_split
  data = input_pipeline.load(config, ["test"])
  image_shape = data.test.images.shape[1:]
  if (image_shape, len(data.class_names)) != (
    run.image_shape,
    len(run.class_names),
  ):
    raise app.UsageError(
      f"--dataset={config.dataset}: has {len(data.class_names)} classes of"
      f" images {list(image_shape)}; accepted are {len(run.class_names)} of"
      f" {list(run.image_shape)}, as in training"
    )
  means, probabilities = steps.evaluator(data.test, config.eval_batch_size)(
    run.state
  )
  (images, labels), probabilities = jax.device_get((data.test, probabilities))

  result = {**means, "global_step": run.step, "n": labels.size}
  report = _write(
    workdir / "evaluation",
    {**result, "dataset": config.dataset, "split": config.test_split},
    images,
    labels,
    probabilities,
    data.class_names,
  )
  return result, report


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

  folder.mkdir(exist_ok=True)
  workdir_lib.write_json(
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
  workdir_lib.write_text(folder / "predictions.csv", table.getvalue())
  for name, picture in {
    "confusion_matrix": pictures.confusion_matrix(matrix, class_names),
    "mistakes": pictures.mistakes(images, labels, probabilities, class_names),
    "calibration": pictures.calibration(*calibration),
  }.items():
    pictures.save(picture, folder / f"{name}.png")
  return (
    f"{report(digits=4)}\n"
    f"Rows are the true classes, columns the predicted ones:\n{matrix}\n\n"
    f"Expected calibration error {calibration.error:.4f}. More in {folder}"
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.error = logger.exit_with
  parser.add_argument(
    "--workdir", required=True, type=pathlib.Path, help="a run directory"
  )
  parser.add_argument(
    "--split", help="in TFDS's syntax; by default the test split"
  )
  parser.add_argument("--dataset", help="another one with images of this shape")
  parser.add_argument(
    "--checkpoint", default="last", help="last, best or a step"
  )
  args = parser.parse_args()
  logger.setup_console()
  ops.cache_compilations()
  with logger.one_line_errors():
    result, report = evaluate(
      args.workdir.expanduser(), args.split, args.dataset, args.checkpoint
    )
    print(report)
    print(json.dumps(result, sort_keys=True))


if __name__ == "__main__":
  main()
