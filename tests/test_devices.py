"""Data parallelism on virtual CPU devices."""

import json
import math
import os
import re
import subprocess
import sys
from unittest import mock

from conftest import PROJECT
from conftest import if_meant
import jax
import numpy as np
import pytest

import input_pipeline
from machine import devices
from machine import errors
from rundir import runs
import train

# A rounding error that decides the sign of a ReLU's input or the larger of two
# pixels is amplified: after 50 steps, parameters differ by 7e-9 with jax 0.10.2
# and by 4e-6 with 0.7.2.
MAX_DIFFERENCE = 1e-5


@pytest.fixture(scope="module")
def result(tmp_path_factory):
  """The output of tests/eight_devices.py."""
  done = subprocess.run(
    [
      *(sys.executable, str(PROJECT / "tests/eight_devices.py")),
      str(tmp_path_factory.mktemp("eight_devices")),
    ],
    env={
      **os.environ,
      "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
def test_the_number_of_devices_changes_only_rounding(result, devices):
  """Dropout and the order are the same, so 20 steps have the same result."""
  one, many = result["1"], result[str(devices)]
  assert many["devices"] == devices
  # The sum of the loss and the counts of right answers and examples, per step.
  np.testing.assert_allclose(many["metrics"], one["metrics"], rtol=1e-6)
  assert np.shape(many["metrics"]) == (20, 3)
  assert many["difference"] < MAX_DIFFERENCE


@pytest.mark.slow
def test_eight_devices_evaluate_every_image_once(result):
  """Their number divides one of the two batch sizes."""
  expected = result["1"]["tests"][0]
  for means in result["1"]["tests"] + result["8"]["tests"]:
    assert means["accuracy"] == expected["accuracy"]
    np.testing.assert_allclose(means["loss"], expected["loss"], rtol=1e-6)


@pytest.mark.slow
def test_every_device_has_all_probabilities(result):
  assert result["8"]["whole"]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["8 to 1", "1 to 8"])
def test_a_checkpoint_resumes_on_another_number_of_devices(result, change):
  metrics = result["1"]["metrics"][10:]
  np.testing.assert_allclose(result[change]["metrics"], metrics, rtol=1e-6)
  assert result[change]["difference"] < MAX_DIFFERENCE


@pytest.mark.slow
def test_gradients_are_summed_in_one_operation(result):
  with_gradients = [x for x in result["all_reduces"] if "f32[1024]" in x]
  assert len(with_gradients) == 1
  (together,) = with_gradients
  for bias in ("f32[32]", "f32[64]", "f32[10]"):
    assert bias in together
  # The gradients, as docs/scaling.md counts them, and the loss.
  assert _num_bytes(together) == 4 * (3_274_634 + 1), if_meant(
    "update it here and in docs/scaling.md"
  )
  # The only other sum is the count of right answers.
  others = [x for x in result["all_reduces"] if x != together]
  assert all(x.startswith(("s32[]", "f32[]")) for x in others), others


def _num_bytes(shapes):
  """Counts the bytes of the float32 arrays in, say, (f32[10]{0}, f32[])."""
  sizes = re.findall(r"f32\[([\d,]*)\]", shapes)
  return 4 * sum(math.prod(map(int, filter(None, s.split(",")))) for s in sizes)


@pytest.mark.parametrize(
  ("error", "reason"),
  [
    (AssertionError(), "set JAX_PLATFORMS= to use the best one found"),
    (RuntimeError("No jellyfish device found."), "No jellyfish device found."),
  ],
)
def test_a_missing_platform_is_named(error, reason, monkeypatch):
  """JAX raises these with JAX_PLATFORMS=cuda or tpu; the first has no text."""
  monkeypatch.setattr(jax, "devices", mock.Mock(side_effect=error))
  platforms = jax.config.jax_platforms
  for check in (
    devices.check,
    lambda: runs.open_run("none"),  # As evaluate.py and predict.py do.
  ):
    with pytest.raises(errors.UserError) as refused:
      check()
    assert str(refused.value) == (
      f"JAX_PLATFORMS={platforms}: JAX finds no such device; {reason}"
    )


@pytest.mark.parametrize(
  ("batch_size", "nearest"), [(30, r"\[24, 32\]"), (3, r"\[8\]")]
)
def test_a_batch_that_the_devices_cannot_share_is_refused(
  tiny_config, tmp_path, monkeypatch, batch_size, nearest
):
  class EightDevices:
    size = 8

  tiny_config.batch_size = batch_size
  data = input_pipeline.load(tiny_config)
  monkeypatch.setattr(input_pipeline, "load", lambda config: data)
  monkeypatch.setattr(devices, "mesh", EightDevices)
  with pytest.raises(errors.UserError, match=f"the nearest are {nearest}"):
    train.train_and_evaluate(tiny_config, tmp_path / "run")
  assert not (tmp_path / "run").exists()
