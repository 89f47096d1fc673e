"""Exported networks, read again, give the same logits as this project."""

import json
import os
import shutil
import subprocess
import sys

from conftest import files_of_at_most
from conftest import pixels
from conftest import run_program
from conftest import temperature
from flax import linen as nn
import jax
from jax import lax
import jax.export
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import optax
import pytest
from safetensors import numpy as safetensors_numpy
from safetensors import safe_open

import export
from exporting import onnx_model
from exporting import page
from exporting import trace
from machine import errors
import model
from rundir import runs
from rundir import trees
import steps


@pytest.fixture(scope="module")
def run(tiny_run):
  return runs.open_run(tiny_run)


@pytest.fixture(scope="module")
def images(mnist):
  return np.asarray(pixels(mnist.test)[:70])


@pytest.fixture(scope="module")
def logits(run, images):
  """Logits as XLA computes them by default."""
  return np.asarray(jax.jit(steps.eval_step)(run.state, images))


@pytest.fixture(scope="module")
def accuracy(tiny_run):
  return json.loads((tiny_run / "result.json").read_text())["accuracy"]


def onnx_logits(proto, images):
  onnx.checker.check_model(proto, full_check=True)
  session = onnxruntime.InferenceSession(
    proto.SerializeToString(), providers=["CPUExecutionProvider"]
  )
  return session.run(None, {"images": images})[0]


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_an_onnx_model_gives_the_same_logits(
  dtype, tiny_run, images, logits, accuracy, tmp_path
):
  path = tmp_path / "new/network.onnx"
  result = export.export(tiny_run, "onnx", path, dtype=dtype)
  assert result == {
    "accuracy": accuracy,
    "bytes": path.stat().st_size,
    "global_step": 20,
  }
  proto = onnx.load(path)
  given = images if dtype == "uint8" else images / np.float32(255)
  for some in (slice(None), slice(0, 1)):
    np.testing.assert_allclose(
      onnx_logits(proto, given[some]), logits[some], rtol=0, atol=1e-5
    )
  assert [(entry.domain, entry.version) for entry in proto.opset_import] == [
    ("", 18)
  ]
  assert {entry.key: entry.value for entry in proto.metadata_props} == {
    "run": "tiny",
    "dataset": "mnist",
    "class_names": json.dumps([*"0123456789"]),
    "test_split": "test[:70]",
    "accuracy": str(accuracy),
    "temperature": str(temperature(tiny_run, 20)),
    "global_step": "20",
    "images": f"{dtype} [batch, 28, 28, 1], "
    + {"uint8": "0 to 255", "float32": "0 to 1"}[dtype],
  }
  names = {tensor.name for tensor in proto.graph.initializer}
  assert {"conv1/kernel", "dense/bias", "logits/kernel"} <= names


class Other(nn.Module):
  """A network with many kinds of layers."""

  image_shape = (28, 28, 1)

  @nn.compact
  def __call__(self, x):
    for _ in range(3):  # The third one pools 7x7.
      x = model.ConvPool(8)(x)
    x = nn.Conv(12, (2, 3), strides=2, feature_group_count=4)(nn.tanh(x))
    x = nn.LayerNorm()(nn.gelu(x)) + x
    x = nn.GroupNorm(4)(nn.leaky_relu(x))
    x = jnp.maximum(nn.elu(nn.silu(x)), -0.2)  # Not a ReLU.
    x = nn.avg_pool(x, (2, 2), (1, 1), "SAME")
    x = jnp.concatenate([x, nn.sigmoid(x)], axis=-1).transpose(0, 3, 1, 2)
    x = jnp.concatenate([x.mean((2, 3)), x.max((2, 3))], axis=-1)
    token = self.param("token", nn.initializers.normal(), (6,))
    token = jnp.broadcast_to(token, (x.shape[0], 6))
    x = jnp.concatenate([x, token], axis=-1)
    return nn.Dense(10)(nn.relu6(x))


class Cumulative(nn.Module):
  image_shape = (28, 28, 1)

  @nn.compact
  def __call__(self, x):
    return jnp.cumsum(
      nn.Dense(10, name="first")(x.reshape(x.shape[0], -1)), axis=-1
    )


def new_state(network):
  return steps.create_train_state(jax.random.key(0), network, optax.sgd(0.1))


def any_number_of(images):
  (batch,) = jax.export.symbolic_shape("batch")
  return jax.ShapeDtypeStruct((batch, *images.shape[1:]), images.dtype)


def build_onnx(state, images):
  symbolic = any_number_of(images)
  return onnx_model.build(trace.trace(state, symbolic), symbolic, {})


class Blurred(nn.Module):
  """Convolves with a kernel that is not trained, and slices nothing off."""

  image_shape = (28, 28, 1)

  @nn.compact
  def __call__(self, x):
    kernel = np.full((1, 1, 3, 3), 1 / 9, np.float32)
    x = lax.conv(x.transpose(0, 3, 1, 2), kernel, (1, 1), "SAME")
    x = lax.slice(x, (0,) * 4, x.shape, (1,) * 4)
    return nn.Dense(10)(x.reshape(x.shape[0], -1))


class Sown(nn.Module):
  """Computes what its logits do not depend on, also after them."""

  image_shape = (28, 28, 1)

  @nn.compact
  def __call__(self, x):
    x = x.reshape(x.shape[0], -1)
    self.sow("intermediates", "sums", jnp.cumsum(x, axis=-1))
    logits = nn.Dense(10)(x)
    self.sow("intermediates", "norms", (logits**2).sum(axis=-1))
    return logits


@pytest.mark.parametrize("network", [Other(), Blurred(), Sown()])
def test_onnx_can_express_another_network(images, network):
  state = new_state(network)
  np.testing.assert_allclose(
    onnx_logits(build_onnx(state, images), images),
    jax.jit(steps.eval_step)(state, images),
    rtol=0,
    atol=1e-5,
  )


def test_onnx_computes_a_bfloat16_network_in_float32(run, images, logits):
  network = model.CNN(dtype=jnp.bfloat16)
  proto = build_onnx(run.state.replace(apply_fn=network.apply), images)
  np.testing.assert_allclose(
    onnx_logits(proto, images), logits, rtol=0, atol=1e-5
  )


def test_a_layer_that_onnx_cannot_express_is_named(images):
  with pytest.raises(errors.UserError) as error:
    build_onnx(new_state(Cumulative()), images)
  assert str(error.value) == (
    "model.py: Cumulative computes cumsum in a way that this format cannot"
    " express; --format=stablehlo takes any network"
  )


class FixedBatchSize(nn.Module):
  image_shape = (28, 28, 1)

  @nn.compact
  def __call__(self, x):
    return nn.Dense(10)(x.reshape(int(x.shape[0]), -1))


def test_a_network_with_a_fixed_batch_size_is_refused(
  run, tiny_run, tmp_path, monkeypatch
):
  fixed = run._replace(state=new_state(FixedBatchSize()))
  monkeypatch.setattr(runs, "open_run", lambda *_: fixed)
  with pytest.raises(errors.UserError) as error:
    export.export(tiny_run, "stablehlo", tmp_path / "file")
  assert str(error.value).startswith(
    "model.py: must accept any batch size to be exported: "
  )


_READ_STABLEHLO = """
import sys
import jax
from jax import export
import numpy as np

with open(sys.argv[1], "rb") as file:
  exported = export.deserialize(bytearray(file.read()))
assert exported.platforms == ("cpu", "cuda", "tpu")
assert "flax" not in sys.modules
images = np.load(sys.argv[2])
for some in (slice(None), slice(0, 1)):
  np.save(sys.stdout.buffer, exported.call(images[some]))
"""


def test_stablehlo_gives_the_same_logits_without_this_project(
  tiny_run, images, logits, tmp_path
):
  path = tmp_path / "network.stablehlo"
  export.export(tiny_run, "stablehlo", path)
  np.save(tmp_path / "images.npy", images)
  done = subprocess.run(
    [sys.executable, "-c", _READ_STABLEHLO, path, tmp_path / "images.npy"],
    capture_output=True,
    cwd=tmp_path,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 0, done.stderr.decode()
  (tmp_path / "logits.npy").write_bytes(done.stdout)
  with open(tmp_path / "logits.npy", "rb") as file:
    np.testing.assert_array_equal(np.load(file), logits)
    np.testing.assert_allclose(np.load(file), logits[:1], rtol=0, atol=1e-6)


def test_stablehlo_can_take_floats(tiny_run, images, logits, tmp_path):
  path = tmp_path / "network.stablehlo"
  export.export(tiny_run, "stablehlo", path, dtype="float32")
  exported = jax.export.deserialize(bytearray(path.read_bytes()))
  found = exported.call(images / np.float32(255))
  np.testing.assert_allclose(found, logits, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def safetensors_file(tiny_run, tmp_path_factory):
  path = tmp_path_factory.mktemp("export") / "network.safetensors"
  export.export(tiny_run, "safetensors", path)
  return path


def test_safetensors_has_the_parameters_by_name(
  safetensors_file, run, accuracy
):
  found = safetensors_numpy.load_file(safetensors_file)
  expected = dict(trees.of_variables(run.state.eval_variables))
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array)
  with safe_open(safetensors_file, "numpy") as file:
    metadata = file.metadata()
  assert metadata["accuracy"] == str(accuracy)
  assert json.loads(metadata["class_names"]) == [*"0123456789"]


def test_safetensors_give_the_same_logits_in_pytorch(
  safetensors_file, images, logits
):
  torch = pytest.importorskip("torch", reason="only a benchmark needs PyTorch")
  from safetensors import torch as safetensors_torch

  F = torch.nn.functional
  p = safetensors_torch.load_file(safetensors_file)
  x = torch.tensor(images).permute(0, 3, 1, 2) / 255
  for name in ("conv1", "conv2"):
    kernel = p[f"{name}/kernel"].permute(3, 2, 0, 1)
    x = F.relu(F.conv2d(x, kernel, p[f"{name}/bias"], padding="same"))
    x = F.max_pool2d(x, 2)
  x = x.permute(0, 2, 3, 1).flatten(1)  # In NHWC order, as here.
  x = F.relu(x @ p["dense/kernel"] + p["dense/bias"])
  found = x @ p["logits/kernel"] + p["logits/bias"]
  np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5)


def test_the_accuracy_is_that_of_the_rounded_weights(
  tiny_run, mnist, tmp_path, monkeypatch
):
  monkeypatch.setattr(
    page, "round_weights", lambda params: jax.tree.map(np.zeros_like, params)
  )
  result = export.export(tiny_run, "html", tmp_path / "page.html")
  zeros = np.asarray(mnist.test.labels[:70]) == 0  # All are classified as 0.
  assert result["accuracy"] == pytest.approx(zeros.mean())


def test_an_option_without_effect_is_refused(tiny_run):
  with pytest.raises(errors.UserError) as error:
    export.export(tiny_run, "html", "unwritten", dtype="uint8")
  assert str(error.value) == "--dtype=uint8 has no effect with --format=html"


@pytest.mark.parametrize("format, package", export._NEEDS.items())
def test_a_missing_package_is_named(
  format, package, tiny_run, tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(errors.UserError) as error:
    export.export(tiny_run, format, tmp_path / "file")
  assert str(error.value) == (
    f"--format={format}: {package} cannot be imported (import of {package}"
    " halted; None in sys.modules); run `pip install -r"
    " requirements-export.txt`"
  )


def test_a_full_disk_leaves_the_old_file(tiny_run, tmp_path):
  path = tmp_path / "network.safetensors"
  path.write_text("old")
  with (
    files_of_at_most(10_000),
    pytest.raises(errors.UserError, match="too large"),
  ):
    export.export(tiny_run, "safetensors", path)
  assert path.read_text() == "old"
  assert [*tmp_path.iterdir()] == [path]


def test_the_program_prints_the_result(tiny_run, accuracy, tmp_path):
  done = run_program(
    *("export.py", "--workdir=.", "--checkpoint=20"),
    *("--format=safetensors", f"--output={tmp_path}/network"),
    cwd=tiny_run,
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert json.loads(done.stdout) == {
    "accuracy": accuracy,
    "bytes": (tmp_path / "network").stat().st_size,
    "global_step": 20,
  }
  with safe_open(tmp_path / "network", "numpy") as file:
    assert file.metadata()["run"] == tiny_run.name


def test_a_run_without_its_data_is_exported(
  tiny_run, accuracy, tmp_path, caplog
):
  run = shutil.copytree(tiny_run, tmp_path / "run")
  path = run / "config.json"
  config = json.loads(path.read_text())
  gone = str(tmp_path / "gone")
  path.write_text(json.dumps(config | {"manual_dir": gone, "data_dir": gone}))
  output = tmp_path / "digit.html"
  for checkpoint, expected, text in (
    ("last", accuracy, f"accuracy, {accuracy}, is that in {run}/result.json"),
    ("16", None, "accuracy is unknown"),
  ):
    result = export.export(run, "html", output, checkpoint)
    assert result["accuracy"] == expected
    assert text in caplog.text
  assert "not scored" in output.read_text()
