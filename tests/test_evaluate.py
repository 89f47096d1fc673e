"""evaluate.py, compared with results computed here with NumPy."""

import csv
import json
import os
import shutil
from unittest import mock

from absl import logging
from conftest import PROJECT
from conftest import assert_not_blank
from conftest import jit
from conftest import pixels
from conftest import run_program
from conftest import temperature
import jax
import numpy as np
from PIL import Image
import pytest

import evaluate
import input_pipeline
from machine import errors
from report import evaluation
from report import figures
from rundir import files
from rundir import runs
from sources import idx_dataset
import steps

PICTURES = ("confusion_matrix.png", "mistakes.png", "calibration.png")


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
  """Skips drawing, which takes most of the time, but in the first test."""
  if "numpy" not in request.node.name:
    monkeypatch.setattr(evaluation, "drawings", lambda evaluated: {})


def test_the_scores_equal_those_of_numpy(run, mnist, monkeypatch):
  draw = mock.Mock(wraps=figures.confusion_matrix)
  monkeypatch.setattr(figures, "confusion_matrix", draw)
  folder = run / "evaluation/test_70"
  folder.mkdir(parents=True)
  # Files of an earlier evaluation.
  for name in ("metrics.json", "predictions.csv"):
    (folder / name).write_text("old")
    os.link(folder / name, run / f"old_{name}")
  result, report = evaluate.evaluate([run])

  state = runs.open_run(run).state
  images = input_pipeline.to_float(pixels(mnist.test)[:70])
  logits = np.asarray(jit(steps.eval_step)(state, images))
  labels = np.asarray(mnist.test.labels[:70])
  loss = -jax.nn.log_softmax(logits)[np.arange(70), labels].mean()
  probabilities = np.exp(logits / temperature(run, 20))
  probabilities /= probabilities.sum(axis=1, keepdims=True)
  predicted = logits.argmax(axis=1)
  correct = predicted == labels
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
  text = (folder / "metrics.json").read_text()
  metrics = json.loads(text)
  scored = {"run": str(run), "dataset": "mnist", "split": "test[:70]"}
  assert metrics.items() >= {**result, **scored, "checkpoint": "last"}.items()
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
  with (folder / "predictions.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [int(row["index"]) for row in rows] == list(range(70))
  assert [int(row["label"]) for row in rows] == labels.tolist()
  assert [int(row["class"]) for row in rows] == predicted.tolist()
  written = [[float(row[str(digit)]) for digit in range(10)] for row in rows]
  np.testing.assert_allclose(written, probabilities, rtol=1e-3, atol=1e-6)
  for name in PICTURES:
    assert_not_blank(folder / name)
  assert str(matrix) in report
  for path in run.glob("old_*"):  # Replaced, not overwritten.
    assert path.read_text() == "old"


def test_calibration_of_known_bins():
  # Two bins: confidence 0.95 and half right, confidence 0.55 and all right.
  confidences = np.array([0.95, 0.95, 0.55, 0.55])
  correct = np.array([True, False, True, True])
  counts, accuracies, error = evaluation.calibrate(confidences, correct, 10)
  np.testing.assert_array_equal(counts, [0, 0, 0, 0, 0, 2, 0, 0, 0, 2])
  np.testing.assert_array_equal(accuracies, [0, 0, 0, 0, 0, 1, 0, 0, 0, 0.5])
  assert error == pytest.approx((0.45 + 0.45) / 2)
  ones = evaluation.calibrate(np.ones(3), np.array([1, 1, 0]))  # The last bin.
  assert ones.error == pytest.approx(1 / 3)


def test_the_requested_checkpoint_and_split_are_scored(run, mnist):
  result, _ = evaluate.evaluate([run], "train[100:130]", checkpoint="12")
  assert (result["global_step"], result["n"]) == (12, 30)
  state = runs.open_run(run, "12").state
  images = input_pipeline.to_float(pixels(mnist.validation)[100:130])
  logits = jit(steps.eval_step)(state, images)
  labels = mnist.validation.labels[100:130]
  correct = np.asarray(logits.argmax(axis=1) == labels)
  assert result["accuracy"] == correct.mean()


def test_the_best_checkpoint_has_the_best_validation_accuracy(run):
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
    *("evaluate.py", "--workdir=~/run", "--checkpoint=12"),
    cwd=run,
    HOME=str(run.parent),
  )
  assert completed.returncode == 0, completed.stderr
  title, *report, last = completed.stdout.splitlines()
  assert title == (
    f"{run} at step 12 of 20 (not complete) on test[:70] of mnist: 70 examples"
  )
  folder = run / "evaluation/test_70,checkpoint=12"
  metrics = json.loads((folder / "metrics.json").read_text())
  assert metrics.items() >= json.loads(last).items()
  assert any("precision" in line for line in report)
  assert "Warning" not in completed.stderr


def test_several_runs_are_scored_by_the_mean_of_their_probabilities(
  run, tmp_path, mnist
):
  second = shutil.copytree(run, tmp_path / "second")
  shutil.rmtree(second / "checkpoints/20")  # Now the last is step 16.
  third = shutil.copytree(second, tmp_path / "third")
  shutil.rmtree(third / "checkpoints/16")
  workdirs = [run, second, third]
  result, report = evaluate.evaluate(workdirs)
  images = input_pipeline.to_float(pixels(mnist.test)[:70])
  labels = np.asarray(mnist.test.labels[:70])
  eval_step = jit(steps.eval_step)
  logits = [eval_step(runs.open_run(each).state, images) for each in workdirs]
  probabilities = np.mean(
    [
      jax.nn.softmax(each / temperature(run, step))
      for each, step in zip(logits, (20, 16, 12), strict=True)
    ],
    axis=0,
  )
  assert result["global_step"] == [20, 16, 12]
  assert result["accuracy"] == (probabilities.argmax(axis=1) == labels).mean()
  loss = -np.log(probabilities[np.arange(70), labels]).mean()
  np.testing.assert_allclose(result["loss"], loss, rtol=1e-6)
  title = report.splitlines()[0]
  assert title == (
    f"{run} at step 20 of 20 (complete),"
    f" {second} at step 16 of 20 (not complete),"
    f" {third} at step 12 of 20 (not complete)"
    " on test[:70] of mnist: 70 examples"
  )
  folder = run / "evaluation/test_70,with=second,with=third"
  written = json.loads((folder / "metrics.json").read_text())
  names = [str(workdir) for workdir in workdirs]
  assert written.items() >= {**result, "run": names}.items()


def test_a_probability_of_0_has_a_finite_loss(tiny_run, tmp_path, monkeypatch):
  """Runs that are certain and wrong have the largest loss of a float32."""
  run = runs.open_run(tiny_run)
  params = jax.tree.map(jax.numpy.zeros_like, run.state.params)
  params["logits"]["bias"] = params["logits"]["bias"].at[3].set(1e4)
  certain = run._replace(state=run.state.replace(params=params))
  monkeypatch.setattr(runs, "open_ensemble", lambda *_: [certain, certain])
  result, _ = evaluate.evaluate([tiny_run] * 2, output=tmp_path / "out")
  largest = -np.log(np.finfo(np.float32).tiny)
  assert 0 < result["accuracy"] < 1
  assert result["loss"] == pytest.approx((1 - result["accuracy"]) * largest)


def test_an_ensemble_must_have_the_same_classes(run, tiny_run, tmp_path):
  dataset = json.loads((run / "dataset.json").read_text())
  dataset["class_names"][0] = "none"
  (run / "dataset.json").write_text(json.dumps(dataset))
  with pytest.raises(
    errors.UserError, match="was not trained on the images and"
  ):
    evaluate.evaluate([tiny_run, run], output=tmp_path / "both")


def test_images_of_another_shape_are_refused(run, monkeypatch):
  load = input_pipeline.load

  def load_larger(*args):
    data = load(*args)
    test = data.test.replace(image_shape=(32, 32, 3))
    return data._replace(splits={"test": test})

  monkeypatch.setattr(input_pipeline, "load", load_larger)
  expected = "images of shape .32, 32, 3.; must have the shape .28"
  with pytest.raises(errors.UserError, match=expected):
    evaluate.evaluate([run])


@pytest.fixture
def any_manual_dir(monkeypatch):
  """Finds MNIST in every manual_dir."""
  find = idx_dataset.find
  monkeypatch.setattr(
    idx_dataset, "find", lambda _, name: find(PROJECT / "data", name)
  )


@pytest.mark.usefixtures("any_manual_dir")
def test_each_set_of_options_has_its_own_folder(run, tmp_path, monkeypatch):
  write = mock.Mock()
  monkeypatch.setattr(evaluate, "_write", write)
  config = json.loads((run / "config.json").read_text())
  (tmp_path / "data").symlink_to(config["data_dir"])
  other = shutil.copytree(run, tmp_path / "more/b c")
  for workdirs, options in (
    ([run], {}),
    ([run], {"split": "test[:70]", "dataset": "mnist", "checkpoint": "last"}),
    ([run], {"data_dir": config["data_dir"]}),
    ([run], {"split": "train[:30]"}),
    ([run], {"split": "train[30:60]", "checkpoint": "best"}),
    ([run], {"data_dir": tmp_path / "data"}),
    ([run], {"manual_dir": tmp_path}),
    ([run, other], {}),
    ([run], {"output": tmp_path / "here"}),
  ):
    evaluate.evaluate(workdirs, **options)
  folders = [call.args[0] for call in write.call_args_list]
  assert {folder.parent for folder in folders[:-1]} == {run / "evaluation"}
  same, again, also, *names = [folder.name for folder in folders]
  assert same == again == also == "test_70"
  assert names[:2] == ["train_30", "train_30_60,checkpoint=best"]
  path = str(tmp_path).replace("/", "_")
  for name, readable in zip(
    names[2:5],
    (f"data_dir={path}_data", f"manual_dir={path}", "with=more_b_c"),
    strict=True,
  ):
    assert name == f"test_70,{readable}"
  assert folders[-1] == tmp_path / "here"


def test_different_splits_and_checkpoints_do_not_share_a_name():
  texts = """
    test train test,checkpoint=best test,checkpoint=12 test,dataset=my_set
    train[:2000] train[2000:] train[:50%] train[:50] train[-5:] train[:-5]
  """.split()
  names = [files.folder_name(text) for text in texts]
  assert names[:7] == [*texts[:5], "train_2000", "train_2000_"]
  assert len({*names}) == len(texts)


def test_another_data_set_is_read_from_its_folder(run, family, tmp_path):
  folder, images, labels = family
  where = {"data_dir": tmp_path / "data", "manual_dir": folder}
  result, _ = evaluate.evaluate([run], dataset="idx", **where)
  logits = jit(steps.eval_step)(
    runs.open_run(run).state, input_pipeline.to_float(images[:70, ..., None])
  )
  assert result["accuracy"] == (logits.argmax(axis=1) == labels[:70]).mean()
  (written,) = run.glob("evaluation/test_70,dataset=idx,*/metrics.json")
  assert json.loads(written.read_text())["dataset"] == "idx"
  assert (tmp_path / "data").is_dir()
  with pytest.raises(errors.UserError, match="the classes o, ki, .* has 0, 1,"):
    evaluate.evaluate([run], dataset="kmnist", **where)


@pytest.mark.usefixtures("any_manual_dir")
def test_a_tilde_works_in_every_path(run, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  config = json.loads((run / "config.json").read_text())
  (tmp_path / "data").symlink_to(config["data_dir"])
  edited = {**config, "data_dir": "none"}
  (run / "config.json").write_text(json.dumps(edited))
  where = {"data_dir": "~/data", "manual_dir": "~"}
  result, report = evaluate.evaluate(["~/run"], output="~/scores", **where)
  assert result["n"] == 70
  assert (tmp_path / "scores/metrics.json").exists()
  assert report.endswith(f"More in {tmp_path / 'scores'}")


def test_the_error_says_how_to_find_data_that_have_moved(run):
  config = json.loads((run / "config.json").read_text())
  gone = {"manual_dir": "/gone", "data_dir": "/gone"}
  (run / "config.json").write_text(json.dumps(config | gone))
  with pytest.raises(
    errors.UserError,
    match="config.manual_dir=/gone: .*; if the data have moved, use --data_dir",
  ):
    evaluate.evaluate([run])


def test_a_new_metric_is_reported(run, monkeypatch, tmp_path):
  compute = steps.compute_metrics

  def with_top3(logits, labels):
    top3 = jax.lax.top_k(logits, 3)[1] == labels[:, None]
    return {**compute(logits, labels), "top3": top3.any(axis=-1)}

  monkeypatch.setattr(steps, "compute_metrics", with_top3)
  one, report = evaluate.evaluate([run], output=tmp_path / "out")
  several, also = evaluate.evaluate([run, run], output=tmp_path / "all")
  assert one["accuracy"] < one["top3"] < 1
  assert several["top3"] == one["top3"]  # The same run twice.
  assert several["loss"] < one["loss"]  # Of calibrated probabilities.
  line = "loss {loss:.4f}  accuracy {accuracy:.4f}  top3 {top3:.4f}"
  for folder, text in (("out", report), ("all", also)):
    metrics = json.loads((tmp_path / folder / "metrics.json").read_text())
    assert metrics["top3"] == one["top3"]
    assert line.format_map(metrics) in text.splitlines()


def test_changed_test_data_causes_a_warning(run, monkeypatch):
  warn = mock.Mock()
  monkeypatch.setattr(logging, "warning", warn)
  monkeypatch.setattr(evaluate, "_write", mock.Mock())
  evaluate.evaluate([run])
  warn.assert_not_called()
  path = run / "dataset.json"
  dataset = json.loads(path.read_text())
  recorded = dataset["crc32"]["test"]
  path.write_text(json.dumps({**dataset, "crc32": {"test": recorded ^ 1}}))
  evaluate.evaluate([run], split="test[:60]")
  warn.assert_not_called()  # The run has no checksum of that split.
  result, _ = evaluate.evaluate([run])
  assert result["n"] == 70
  (call,) = warn.call_args_list
  assert call.args[0] % call.args[1:] == (
    f"test[:70] of mnist has checksum {recorded} but had {recorded ^ 1} in"
    f" {path}: its examples have changed"
  )
  del dataset["crc32"]
  for older in ({}, {"crc32": 7}):  # From an older version, or damaged.
    path.write_text(json.dumps({**dataset, **older}))
    evaluate.evaluate([run])
  assert warn.call_count == 1


def test_classes_are_matched_by_name(run, mnist, tmp_path, caplog):
  images, labels = pixels(mnist.test)[:40, ..., 0], mnist.test.labels[:40]
  words = "zero one two three four five six seven eight nine".split()

  def score(name, of_label):
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
      if of_label.get(int(label)):
        folder = tmp_path / name / "test" / of_label[int(label)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(image)).save(folder / f"{index:02}.png")
    return evaluate.evaluate(
      [run],
      split="test",
      dataset="image_folder",
      data_dir=tmp_path / "data",
      manual_dir=tmp_path / name,
    )[0]

  logits = jit(steps.eval_step)(
    runs.open_run(run).state, input_pipeline.to_float(images[..., None])
  )
  right = np.asarray(logits.argmax(axis=1) == labels)
  some = np.asarray(labels) > 6
  result = score("some", {digit: str(digit) for digit in (7, 8, 9)})
  assert (result["n"], result["accuracy"]) == (some.sum(), right[some].mean())
  for name, of_label in (
    ("words", dict(enumerate(words))),
    ("shifted", {digit: str(digit + 1) for digit in range(10)}),
  ):
    with pytest.raises(
      errors.UserError,
      match=r"has the classes .*; the run has 0, 1, .* 9; all must be among",
    ):
      score(name, of_label)
