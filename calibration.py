"""Makes a network's probabilities match how often it is right."""

from typing import NamedTuple

import numpy as np
from scipy import optimize
from scipy import special


class Calibration(NamedTuple):
  """How to read the probabilities of a network.

  Attributes:
    temperature: what the logits are divided by; see `fit`.
    usual_probability: for 98% of the validation images, the predicted class had
      at least this probability.
  """

  temperature: float = 1.0
  usual_probability: float = 0.5

  def apply(self, probabilities: np.ndarray) -> np.ndarray:
    """Returns the softmax of logits / temperature, [n, classes].

    Args:
      probabilities: the softmax of the logits, [n, classes].
    """
    # Logits are the logarithms of probabilities, up to a constant.
    relative = probabilities / probabilities.max(axis=-1, keepdims=True)
    powers = relative ** (1 / self.temperature)
    return powers / powers.sum(axis=-1, keepdims=True)


def fit(probabilities: np.ndarray, labels: np.ndarray) -> Calibration:
  """Finds the temperature with the lowest loss: Guo et al., arXiv 1706.04599.

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

  best = optimize.minimize_scalar(loss, bounds=(-3, 3), method="bounded").x
  calibration = Calibration(temperature=float(np.exp(best)))
  predicted = calibration.apply(probabilities).max(axis=-1)
  return calibration._replace(
    usual_probability=float(np.quantile(predicted, 0.02))
  )
