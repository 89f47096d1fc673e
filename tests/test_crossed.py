"""Features that cross: averages, checkpoints, data of one's own, each program.

What a program writes is compared with the network computed here.
"""

import base64
import json
import re

from conftest import jit
from conftest import pixels
from conftest import read_jsonl
from conftest import temperature
import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors import numpy as safetensors_numpy

import compare
import evaluate
import export
from model import CNN
import predict
from report import evaluation
from report import pictures
from rundir import checkpoints
from rundir import runs

CHECKPOINTS = ("last", "best", "6")


@pytest.fixture(scope="module")
def validated(averaged_run):
  """The validation accuracy by step."""
  return {
    record["step"]: record["validation_accuracy"]
    for record in read_jsonl(averaged_run)
    if "validation_accuracy" in record
  }


@pytest.fixture(scope="module")
def compute(averaged_run, validated):
  """A function: the step of a checkpoint, and its probabilities of images."""
  accuracy = max(validated.values())
  best = max(step for step in validated if validated[step] == accuracy)
  steps = {"last": 10, "best": best}

  def compute(checkpoint, images):
    step = steps.get(checkpoint) or int(checkpoint)
    state, _ = checkpoints.restore(averaged_run, step)
    variables = {"params": state.ema_params}
    logits = jit(CNN().apply)(variables, np.float32(images) / 255)
    # The test would not notice if the last parameters were used.
    other = jit(CNN().apply)({"params": state.params}, np.float32(images) / 255)
    assert abs(logits - other).max() > 1e-3
    return step, np.asarray(jax.nn.softmax(logits))

  return compute


@pytest.fixture(scope="module")
def own(averaged_run):
  """The run's own test images and labels."""
  with np.load(averaged_run.parent / "own/digits.npz") as file:
    return file["x_test"], file["y_test"]


def scores(probabilities, labels):
  picked = np.float64(probabilities[np.arange(len(labels)), labels])
  accuracy = (probabilities.argmax(axis=1) == labels).mean()
  return {
    "accuracy": accuracy,
    "loss": pytest.approx(-np.log(picked).mean(), rel=1e-5),
  }


def test_only_a_validated_state_is_the_best(averaged_run, validated, compute):
  assert [*validated] == [4, 8, 10]
  step, _ = compute("best", np.zeros((1, 28, 28, 1), np.uint8))
  # The newest three are kept too.
  assert checkpoints.all_steps(averaged_run) == sorted({step, 6, 8, 10})
  assert runs.open_run(averaged_run, "best").step == step


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("data", ["own", "of another file", "mnist"])
def test_any_checkpoint_is_scored_on_any_data(
  checkpoint, data, averaged_run, compute, own, mnist, tmp_path, monkeypatch
):
  monkeypatch.setattr(evaluation, "drawings", lambda evaluated: {})
  images, labels = own
  where = {"output": tmp_path / "scores"}
  if data == "of another file":
    images, labels = images[::-1] // 2, np.roll(labels, 1)
    (tmp_path / "other").mkdir()
    np.savez(
      tmp_path / "other/x.npz",
      **{"x_train": images, "y_train": labels, "x_test": images},
      y_test=labels,
    )
    where |= {"manual_dir": tmp_path / "other", "data_dir": tmp_path / "data"}
  elif data == "mnist":  # In another folder than the run's manual_dir.
    images = np.asarray(pixels(mnist.test))[:40]
    labels = np.asarray(mnist.test.labels)[:40]
    data_dir = averaged_run.parent / "tensorflow_datasets"
    where |= {"dataset": "mnist", "split": "test[:40]", "data_dir": data_dir}
  result, _ = evaluate.evaluate([averaged_run], checkpoint=checkpoint, **where)
  step, probabilities = compute(checkpoint, images)
  assert result == {
    **scores(probabilities, labels),
    "global_step": step,
    "n": len(labels),
  }
  metrics = json.loads((tmp_path / "scores/metrics.json").read_text())
  assert metrics["checkpoint"] == checkpoint


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_any_checkpoint_predicts(
  checkpoint, averaged_run, compute, own, tmp_path, monkeypatch, capsys
):
  images, _ = own
  np.save(tmp_path / "images.npy", images[:5])
  monkeypatch.setattr(
    "sys.argv",
    [
      *("predict.py", f"--workdir={averaged_run}", "--raw", "--json"),
      *(f"--checkpoint={checkpoint}", str(tmp_path / "images.npy")),
    ],
  )
  with pytest.raises(SystemExit) as ended:
    predict.main()
  assert not ended.value.code
  found = [
    [*json.loads(line)["probabilities"].values()]
    for line in capsys.readouterr().out.splitlines()
  ]
  step, expected = compute(checkpoint, images[:5])
  # Step 6 was not validated, so its temperature is that of step 4.
  fitted = temperature(averaged_run, 4 if step == 6 else step)
  expected = jax.nn.softmax(np.log(expected) / fitted)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def probabilities_of(format, path, images):
  """Computes with an exported file and without this project's network."""
  if format == "onnx":
    session = onnxruntime.InferenceSession(path.read_bytes())
    (logits,) = session.run(None, {"images": images})
  elif format == "stablehlo":
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    logits = exported.call(images)
  else:
    params: dict = {}
    for name, array in safetensors_numpy.load_file(path).items():
      layer, kind = name.split("/")
      params.setdefault(layer, {})[kind] = array
    logits = jit(CNN().apply)({"params": params}, np.float32(images) / 255)
  return jax.nn.softmax(np.asarray(logits))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("format", ["onnx", "stablehlo", "safetensors"])
def test_any_checkpoint_is_exported(
  checkpoint, format, averaged_run, compute, own, tmp_path
):
  images, labels = own
  path = tmp_path / "network"
  result = export.export(averaged_run, format, path, checkpoint)
  step, expected = compute(checkpoint, images)
  accuracy = (expected.argmax(axis=1) == labels).mean()
  assert (result["global_step"], result["accuracy"]) == (step, accuracy)
  np.testing.assert_allclose(
    probabilities_of(format, path, images), expected, rtol=0, atol=1e-5
  )
  if format == "onnx":
    entries = onnx.load(path).metadata_props
    metadata = {entry.key: entry.value for entry in entries}
    assert metadata["global_step"] == str(step)
    assert metadata["accuracy"] == str(accuracy)
    assert metadata["dataset"] == "arrays"


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_page_of_any_checkpoint_has_its_averages(
  checkpoint, averaged_run, compute, own, tmp_path
):
  path = tmp_path / "page.html"
  export.export(averaged_run, "html", path, checkpoint)
  network, weights = (
    re.search(f'id="{name}">(.*?)</script>', path.read_text(), re.DOTALL)[1]
    for name in ("network", "weights")
  )
  description = json.loads(network)
  step, expected = compute(checkpoint, own[0])
  accuracy = (expected.argmax(axis=1) == own[1]).mean()
  assert description["subtitle"] == (
    f"averaged · test accuracy {accuracy:.2%} · {step} steps"
  )
  values = np.frombuffer(base64.b64decode(weights), np.float16)
  state, _ = checkpoints.restore(averaged_run, step)
  for name, size in description["params"]:
    found, values = np.split(values, [size])
    layer, kind = name.split("/")
    average = np.ravel(state.ema_params[layer][kind]).astype(np.float16)
    np.testing.assert_array_equal(found, average)
  assert not values.size


def test_the_picture_of_activations_is_of_the_averaged_network(
  averaged_run, compute, own
):
  images, _ = own
  run = runs.open_run(averaged_run)
  _, found = pictures.activations(run.state, np.float32(images[0]) / 255)
  _, expected = compute("last", images[:1])
  np.testing.assert_allclose(found, expected[0], rtol=1e-4, atol=1e-6)


def test_an_averaged_run_is_compared_with_another(
  averaged_run, tiny_run, validated, compute, own
):
  images, labels = own
  rows = compare.compare([averaged_run, tiny_run])
  (row,) = (row for row in rows if row.run == str(averaged_run))
  assert row.settings["ema_decay"] == 0.5
  assert row.settings["dataset"] == "arrays"
  _, expected = compute("last", images)
  tested = scores(expected, labels)
  assert row.results["test_accuracy"] == tested["accuracy"]
  assert row.results["test_loss"] == tested["loss"]
  assert row.results["validation_accuracy"] == validated[10]
