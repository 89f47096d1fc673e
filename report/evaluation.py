"""Measures how well the examples of a split were predicted."""

from collections.abc import Callable
from collections.abc import Sequence
import csv
import io
from typing import Any
from typing import NamedTuple

from matplotlib import figure
import numpy as np
from sklearn import metrics

import input_pipeline
from report import figures


class Calibration(NamedTuple):
  """The accuracy of a network by its confidence, in bins of equal width.

  Attributes:
    counts: the number of examples in each bin, [bins].
    accuracies: the accuracy in each bin, [bins]; 0 if it is empty.
    error: the expected calibration error of Guo et al., "On Calibration of
      Modern Neural Networks", arXiv 1706.04599.
  """

  counts: np.ndarray
  accuracies: np.ndarray
  error: float


class Evaluation(NamedTuple):
  """What was predicted, and how well.

  Attributes:
    examples: n examples, as NumPy arrays.
    probabilities: float32 [n, classes].
    class_names: the names of the labels.
    calibration: how well the probabilities match the accuracy.
    confusion_matrix: int [true classes, predicted classes].
    per_class: precision, recall, f1-score and support by class name.
    table: the same as text, plus averages.
  """

  examples: input_pipeline.Examples
  probabilities: np.ndarray
  class_names: Sequence[str]
  calibration: Calibration
  confusion_matrix: np.ndarray
  per_class: dict[str, dict[str, float]]
  table: str


def calibrate(
  confidences: np.ndarray, correct: np.ndarray, num_bins: int = 15
) -> Calibration:
  """Bins the probabilities of the predicted classes, [n] in (0, 1]."""
  bins = np.clip(np.ceil(confidences * num_bins) - 1, 0, num_bins - 1)
  bins = bins.astype(int)
  counts = np.bincount(bins, minlength=num_bins)
  right = np.bincount(bins, correct, num_bins)
  gaps = np.abs(right - np.bincount(bins, confidences, num_bins))
  return Calibration(
    counts, right / np.maximum(counts, 1), float(gaps.sum() / len(correct))
  )


def measure(
  examples: input_pipeline.Examples,
  probabilities: figures.Array,
  class_names: Sequence[str],
) -> Evaluation:
  """Compares probabilities, [n, classes], with the labels of n examples."""
  probabilities = np.asarray(probabilities)
  labels, predicted = examples.labels, probabilities.argmax(axis=1)
  indices = range(len(class_names))

  def by_class(**options):
    return metrics.classification_report(
      labels,
      predicted,
      labels=indices,
      target_names=class_names,
      zero_division=0,
      **options,
    )

  scores = by_class(output_dict=True)
  return Evaluation(
    examples,
    probabilities,
    class_names,
    calibrate(probabilities.max(axis=1), predicted == labels),
    metrics.confusion_matrix(labels, predicted, labels=indices),
    {name: scores[name] for name in class_names},
    by_class(digits=4),
  )


def details(evaluation: Evaluation) -> dict[str, Any]:
  """Returns all measurements except the means, ready for JSON."""
  return {
    "expected_calibration_error": evaluation.calibration.error,
    "per_class": evaluation.per_class,
    "confusion_matrix": evaluation.confusion_matrix.tolist(),
  }


def to_csv(evaluation: Evaluation) -> str:
  """Returns CSV: each example's index, label, prediction and probabilities."""
  names = evaluation.class_names
  labels = np.asarray(evaluation.examples.labels)
  table = io.StringIO()
  writer = csv.writer(table, lineterminator="\n")
  writer.writerow(["index", "label", "class", *names])
  for index, row in enumerate(evaluation.probabilities):
    label, predicted = names[labels[index]], names[row.argmax()]
    writer.writerow([index, label, predicted, *(f"{p:.6g}" for p in row)])
  return table.getvalue()


def drawings(
  evaluation: Evaluation,
) -> dict[str, Callable[[], figure.Figure]]:
  """Returns functions that draw the pictures, by the pictures' names."""
  examples, names = evaluation.examples, evaluation.class_names
  return {
    "confusion_matrix": lambda: figures.confusion_matrix(
      evaluation.confusion_matrix, names
    ),
    "mistakes": lambda: figures.mistakes(
      examples.unflatten(examples.images),
      examples.labels,
      evaluation.probabilities,
      names,
    ),
    "calibration": lambda: figures.calibration(*evaluation.calibration),
  }


def to_text(evaluation: Evaluation) -> str:
  """Formats the numbers for people to read."""
  return (
    f"{evaluation.table}\n"
    "Rows are the true classes, columns the predicted ones:\n"
    f"{evaluation.confusion_matrix}\n\n"
    f"Expected calibration error {evaluation.calibration.error:.4f}."
  )
