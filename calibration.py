"""Makes a network's probabilities match how often it is right.

This is the temperature scaling of Guo et al., "On Calibration of Modern Neural
Networks", arXiv 1706.04599.
"""

import numpy as np
from scipy import optimize
from scipy import special

SURE = 0.9  # With a lower probability, a prediction is marked unsure.


def apply(probabilities: np.ndarray, temperature: float) -> np.ndarray:
  """Returns the softmax of logits / temperature, [n, classes].

  Args:
    probabilities: the softmax of the logits, [n, classes].
    temperature: more than 1 makes the network less certain.
  """
  # Logits are the logarithms of probabilities, up to a constant.
  relative = probabilities / probabilities.max(axis=-1, keepdims=True)
  powers = relative ** (1 / temperature)
  return powers / powers.sum(axis=-1, keepdims=True)


def fit(probabilities: np.ndarray, labels: np.ndarray) -> float:
  """Returns the temperature at which the cross-entropy is lowest.

  Args:
    probabilities: the softmax of the logits, float32 [n, classes].
    labels: int32 [n].
  """
  n, classes = probabilities.shape
  # As in Platt's scaling, no label is quite certain. Otherwise, no prediction
  # would stay in doubt if a small split has no mistakes.
  targets = (n * np.eye(classes)[labels] + 1 / classes) / (n + 1)
  logits = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))

  def loss(log_temperature):
    scaled = logits / np.exp(log_temperature)
    return -np.sum(targets * special.log_softmax(scaled, axis=-1))

  found = optimize.minimize_scalar(loss, bounds=(-3, 3), method="bounded")
  return float(np.exp(found.x))
