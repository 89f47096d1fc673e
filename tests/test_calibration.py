"""Tests for calibration.py."""

import numpy as np
import pytest
from scipy import special

import calibration


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_of_a_split_is_found(temperature):
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 2, (20_000, 10))
  labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
  # The labels were drawn from softmax(logits), so that these are wrong.
  given = special.softmax(temperature * logits, axis=1).astype(np.float32)
  found = calibration.fit(given, labels)
  assert found == pytest.approx(temperature, rel=0.03)
  expected = special.softmax(temperature * logits / found, axis=1)
  actual = calibration.apply(given, found)
  assert actual.dtype == np.float32
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-7)


def test_a_small_split_without_mistakes_leaves_doubt():
  probabilities = np.full((4, 10), 0.05, np.float32)
  labels = np.arange(4)
  probabilities[labels, labels] = 0.55
  temperature = calibration.fit(probabilities, labels)
  # As if a fifth label could be any class.
  sure = calibration.apply(probabilities, temperature).max()
  assert sure == pytest.approx((4 + 1 / 10) / 5, rel=1e-3)


def test_extreme_probabilities_stay_finite():
  rows = np.array([[1, 0, 0], [1e-30, 1, 1e-38]], np.float32)
  for temperature in (0.05, 20.0):
    actual = calibration.apply(rows, temperature)
    np.testing.assert_allclose(actual.sum(axis=1), 1, rtol=1e-6)
  assert calibration.fit(rows, np.array([1, 1])) > 10  # One is quite wrong.
