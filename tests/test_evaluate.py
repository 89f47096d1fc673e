"""evaluate.py against numbers computed here with NumPy."""

import csv
import json
import os
import shutil
from unittest import mock

from absl import app
from conftest import assert_not_blank
from conftest import jit
from conftest import pixels
from conftest import run_program
import jax
import numpy as np
import pytest

import evaluate
import input_pipeline
from report import figures
from rundir import runs
import steps

PICTURES = ("confusion_matrix.png", "mistakes.png", "calibration.png")


@pytest.fixture
def run(tiny_run, tmp_path):
  """A copy of the tiny run, to write to."""
  return shutil.copytree(tiny_run, tmp_path / "run")


def test_equals_numpy(run, mnist, monkeypatch):
  draw = mock.Mock(wraps=figures.confusion_matrix)
  monkeypatch.setattr(figures, "confusion_matrix", draw)
  (run / "evaluation").mkdir()
  for name in ("metrics.json", "predictions.csv"):  # Of an earlier checkpoint.
    (run / "evaluation" / name).write_text("old")
    os.link(run / "evaluation" / name, run / f"old_{name}")
  result, report = evaluate.evaluate([run])

  state = runs.open_run(run).state
  images = input_pipeline.to_float(pixels(mnist.test)[:70])
  logits = np.asarray(jit(steps.eval_step)(state, images))
  labels = np.asarray(mnist.test.labels[:70])
  probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  predicted = logits.argmax(axis=1)
  correct = predicted == labels
  loss = -np.log(probabilities[np.arange(70), labels]).mean()
  matrix = np.zeros((10, 10), int)
  for label, guess in zip(labels, predicted, strict=True):
    matrix[label, guess] += 1
  error = 0.0
  confidences = probabilities.max(axis=1)
  for low in np.arange(15) / 15:
    inside = (confidences > low) & (confidences <= low + 1 / 15)
    if inside.any():
      gap = correct[inside].mean() - confidences[inside].mean()
      error += inside.mean() * abs(gap)

  trained = json.loads((run / "result.json").read_text())
  assert result == {**trained, "n": 70}
  assert result["accuracy"] == correct.mean()
  np.testing.assert_allclose(result["loss"], loss, rtol=1e-5)
  metrics = json.loads((run / "evaluation/metrics.json").read_text())
  assert metrics.items() >= {**result, "split": "test[:70]"}.items()
  np.testing.assert_array_equal(metrics["confusion_matrix"], matrix)
  np.testing.assert_array_equal(draw.call_args.args[0], matrix)
  np.testing.assert_allclose(
    metrics["expected_calibration_error"], error, rtol=1e-4
  )
  for digit, scores in metrics["per_class"].items():
    right, digit = matrix[int(digit), int(digit)], int(digit)
    guessed, support = matrix[:, digit].sum(), matrix[digit].sum()
    assert scores["support"] == support
    assert scores["precision"] == pytest.approx(right / max(guessed, 1))
    assert scores["recall"] == pytest.approx(right / support)
    f1 = 2 * right / (guessed + support)
    assert scores["f1-score"] == pytest.approx(f1)
  with (run / "evaluation/predictions.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [int(row["index"]) for row in rows] == list(range(70))
  assert [int(row["label"]) for row in rows] == labels.tolist()
  assert [int(row["class"]) for row in rows] == predicted.tolist()
  written = [[float(row[str(digit)]) for digit in range(10)] for row in rows]
  np.testing.assert_allclose(written, probabilities, rtol=1e-3, atol=1e-6)
  for name in PICTURES:
    assert_not_blank(run / "evaluation" / name)
  assert str(matrix) in report
  for path in run.glob("old_*"):  # They were replaced, each in one go.
    assert path.read_text() == "old"


def test_calibration_of_known_bins():
  # Two bins: 0.95 sure and half right, 0.55 sure and all right.
  confidences = np.array([0.95, 0.95, 0.55, 0.55])
  correct = np.array([True, False, True, True])
  counts, accuracies, error = evaluate.calibrate(confidences, correct, 10)
  np.testing.assert_array_equal(counts, [0, 0, 0, 0, 0, 2, 0, 0, 0, 2])
  np.testing.assert_array_equal(accuracies, [0, 0, 0, 0, 0, 1, 0, 0, 0, 0.5])
  assert error == pytest.approx((0.45 + 0.45) / 2)
  ones = evaluate.calibrate(np.ones(3), np.array([1, 1, 0]))  # The last bin.
  assert ones.error == pytest.approx(1 / 3)


def test_scores_the_checkpoint_and_the_split_that_are_asked_for(run, mnist):
  result, _ = evaluate.evaluate([run], "train[100:130]", checkpoint="12")
  assert (result["global_step"], result["n"]) == (12, 30)
  state = runs.open_run(run, "12").state
  images = input_pipeline.to_float(pixels(mnist.validation)[100:130])
  logits = jit(steps.eval_step)(state, images)
  labels = mnist.validation.labels[100:130]
  correct = np.asarray(logits.argmax(axis=1) == labels)
  assert result["accuracy"] == correct.mean()


def test_the_best_checkpoint_is_the_best_validated(run):
  records = [
    json.loads(line)
    for line in (run / "metrics.jsonl").read_text().split("\n")
    if "validation" in line
  ]
  accuracy = {r["step"]: r["validation_accuracy"] for r in records}
  best = runs.open_run(run, "best")
  assert accuracy[best.step] == max(accuracy.values())
  assert int(best.state.step) == best.step


def test_the_command_prints_the_report_and_the_result(run):
  completed = run_program(
    *("evaluate.py", "--workdir=~/run", "--checkpoint=best"),
    cwd=run,
    HOME=str(run.parent),
  )
  assert completed.returncode == 0, completed.stderr
  *report, last = completed.stdout.splitlines()
  metrics = json.loads((run / "evaluation/metrics.json").read_text())
  assert metrics.items() >= json.loads(last).items()
  assert any("precision" in line for line in report)
  assert "Warning" not in completed.stderr


def test_several_runs_are_scored_by_the_mean_of_their_probabilities(
  run, tiny_run, tmp_path, mnist
):
  shutil.rmtree(run / "checkpoints/20")  # Then its last one is 16.
  third = shutil.copytree(run, tmp_path / "third")
  shutil.rmtree(third / "checkpoints/16")
  workdirs = [tiny_run, run, third]
  result, _ = evaluate.evaluate(workdirs, output=tmp_path / "all")
  images = input_pipeline.to_float(pixels(mnist.test)[:70])
  labels = np.asarray(mnist.test.labels[:70])
  eval_step = jit(steps.eval_step)
  logits = [eval_step(runs.open_run(each).state, images) for each in workdirs]
  probabilities = np.mean([jax.nn.softmax(each) for each in logits], axis=0)
  assert result["global_step"] == [20, 16, 12]
  assert result["accuracy"] == (probabilities.argmax(axis=1) == labels).mean()
  loss = -np.log(probabilities[np.arange(70), labels]).mean()
  np.testing.assert_allclose(result["loss"], loss, rtol=1e-6)
  written = json.loads((tmp_path / "all/metrics.json").read_text())
  assert written.items() >= result.items()
  assert not (run / "evaluation").exists()


def test_an_ensemble_is_of_one_kind_and_has_a_place(run, tiny_run, tmp_path):
  with pytest.raises(app.UsageError, match="--output is needed"):
    evaluate.evaluate([tiny_run, run])
  dataset = json.loads((run / "dataset.json").read_text())
  dataset["class_names"][0] = "none"
  (run / "dataset.json").write_text(json.dumps(dataset))
  with pytest.raises(app.UsageError, match="was not trained on the images and"):
    evaluate.evaluate([tiny_run, run], output=tmp_path / "both")


def test_another_shape_is_refused(run, monkeypatch):
  load = input_pipeline.load

  def load_larger(*args):
    data = load(*args)
    return data._replace(test=data.test.replace(image_shape=(32, 32, 3)))

  monkeypatch.setattr(input_pipeline, "load", load_larger)
  with pytest.raises(app.UsageError, match="10 classes of images .32, 32, 3."):
    evaluate.evaluate([run])
