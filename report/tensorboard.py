"""Draws the pictures of a network that TensorBoard shows."""

from collections.abc import Iterator
from collections.abc import Sequence

from absl import logging
import jax
from matplotlib import figure
import numpy as np
from sklearn import metrics

import input_pipeline
from report import figures
from report import network
import steps


def pictures(
  examples: input_pipeline.Examples,
  probabilities: np.ndarray,
  params: steps.Params,
  inspection: network.Inspection,
  class_names: Sequence[str],
) -> Iterator[tuple[str, figure.Figure]]:
  """Draws what was learned; only warns if a picture cannot be drawn.

  Args:
    examples: the validation split, n examples.
    probabilities: their predicted probabilities, [n, classes].
    params: the parameters that predicted them.
    inspection: the result of `network.inspect`.
    class_names: the names of the labels.

  Yields:
    Tags and figures.
  """
  drawings = {
    "confusion_matrix": lambda: figures.confusion_matrix(
      metrics.confusion_matrix(
        examples.labels,
        probabilities.argmax(axis=1),
        labels=range(len(class_names)),
      ),
      class_names,
    ),
    "mistakes": lambda: figures.mistakes(
      examples.unflatten(examples.images),
      examples.labels,
      probabilities,
      class_names,
      count=10,
    ),
    "activations": lambda: figures.activations(
      inspection.image,
      inspection.label,
      dict(zip(inspection.layer_names, inspection.layers, strict=True)),
      inspection.probabilities,
      class_names,
    ),
  }
  kernels = _image_kernels(params, channels=inspection.image.shape[-1])
  if kernels:
    drawings["filters"] = lambda: figures.filters(*kernels[0])
  if (deformed := inspection.deformed) is not None:
    drawings["augmentation"] = lambda: figures.deformations(
      inspection.originals, deformed
    )
  for tag, draw in drawings.items():
    try:
      yield tag, draw()
    except Exception as error:  # A failed picture must not stop the run.
      logging.warning("The picture %s cannot be drawn: %s", tag, error)


def _image_kernels(
  params: steps.Params, channels: int
) -> list[tuple[np.ndarray, str]]:
  """Returns the kernels with as many channels as an image, and their names."""
  return [
    (leaf, jax.tree_util.keystr(path, simple=True, separator="/"))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if leaf.ndim == 4 and leaf.shape[2] == channels
  ]
