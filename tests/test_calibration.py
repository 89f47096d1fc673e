"""Tests for calibration.py."""

import numpy as np
import pytest
from scipy import special

import calibration


def _split(temperature: float, n: int = 20_000):
  """Returns logits that are `temperature` times too large, and labels."""
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 2, (n, 10))
  noise = rng.gumbel(size=logits.shape)
  labels = (logits + noise).argmax(axis=1)  # Drawn from softmax(logits).
  return temperature * logits, labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_of_a_split_is_found(temperature):
  logits, labels = _split(temperature)
  given = special.softmax(logits, axis=1).astype(np.float32)
  fitted = calibration.fit(given, labels)
  assert fitted.temperature == pytest.approx(temperature, rel=0.03)
  expected = special.softmax(logits / fitted.temperature, axis=1)
  found = fitted.apply(given)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
  np.testing.assert_array_equal(found.argmax(axis=1), given.argmax(axis=1))
  usual = np.quantile(expected.max(axis=1), 0.02)
  assert fitted.usual_probability == pytest.approx(usual, rel=1e-4)


def test_a_small_split_without_mistakes_leaves_doubt():
  probabilities = np.full((4, 10), 0.05, np.float32)
  labels = np.arange(4)
  probabilities[labels, labels] = 0.55
  fitted = calibration.fit(probabilities, labels)
  # One more label would be any class.
  sure = fitted.apply(probabilities).max()
  assert sure == pytest.approx((4 + 1 / 10) / 5, rel=1e-3)


def test_without_a_fit_nothing_changes():
  probabilities = special.softmax(_split(1.0, 50)[0], axis=1)
  np.testing.assert_allclose(
    calibration.Calibration().apply(probabilities), probabilities
  )
