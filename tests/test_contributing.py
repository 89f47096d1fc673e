"""Applies the changes in CONTRIBUTING.md to a copy, then trains it."""

import json
import re
import shutil

from conftest import PROJECT
from conftest import idx_bytes
from conftest import run_program
from conftest import warm_python
import numpy as np
import pytest

SIZES = {"train": 300, "t10k": 100}


def changes(is_residual):
  """Yields (file, old text, new text) for each change.

  "Another network" and "A layer" exclude each other.
  """
  text = (PROJECT / "CONTRIBUTING.md").read_text()
  excluded = "A layer" if is_residual else "Another network"
  text = re.sub(rf"^## {excluded}\n.*?^## ", "", text, flags=re.S | re.M)
  if is_residual:
    text = re.sub(r"^## A config key\n.*?^## ", "", text, flags=re.S | re.M)
  for block in re.findall(r"```diff\n(.*?)```", text, re.DOTALL):
    for change in block.split("--- ")[1:]:
      path, *lines = change.splitlines()
      old = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
      new = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
      yield path, old, new


@pytest.fixture
def copy(request, tmp_path):
  """A copy of the project without data, with the changes applied."""
  copy = tmp_path / "copy"
  for pattern in ("*.py", "*/*.py", "exporting/*.html"):
    for path in PROJECT.glob(pattern):
      target = copy / path.relative_to(PROJECT)
      target.parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(path, target)
  for path, old, new in changes(request.param):
    source = (copy / path).read_text()
    assert source.count(old) == 1, f"{path} must contain exactly once:\n{old}"
    (copy / path).write_text(source.replace(old, new))
  # Rename a layer too: no other file may depend on layer names.
  source = (copy / "model.py").read_text()
  source = source.replace('name="conv1"', 'name="first"')
  (copy / "model.py").write_text(source)
  if request.param:  # The other test draws; it takes longer than training.
    (copy / "report/pictures.py").write_text("def draw(*args):\n  pass\n")
  path = copy / "sources/idx_dataset.py"  # A few images are enough.
  source = path.read_text().replace("60_000", "300").replace("10_000", "100")
  path.write_text(source)
  return copy


@pytest.fixture
def run(copy, tmp_path):
  """A function that runs a program of the copy on a few random images."""
  rng = np.random.default_rng(0)
  for prefix, size in SIZES.items():
    for kind, array in (
      ("images-idx3", rng.integers(0, 256, (size, 28, 28))),
      ("labels-idx1", rng.integers(0, 10, size)),
    ):
      path = tmp_path / f"{prefix}-{kind}-ubyte"
      path.write_bytes(idx_bytes(array))

  def run(program, *args, **environment):
    done = run_program(
      program, *args, cwd=tmp_path, project=copy, **environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr

  yield run
  warm_python(copy).stdin.close()
  warm_python(copy).wait()


def flags(**overrides):
  config = {
    "dataset": "my_letters",
    "manual_dir": ".",
    "data_dir": "prepared",
    "train_split": "train[50:]",
    "validation_split": "train[:50]",
    "test_split": "test[:50]",  # As many, so that one program serves both.
    "batch_size": 16,
    "num_steps": 4,
    "checkpoint_every_steps": 2,
    "optimizer": "lion",
    **overrides,
  }
  return [f"--config.{key}={value}" for key, value in config.items()]


@pytest.mark.slow
@pytest.mark.parametrize("copy", [False], indirect=True)
def test_the_changes_shown_are_sufficient(run):
  stdout, stderr = run("train.py", "--workdir=run", *flags(features=64))
  layers = 5 * 5 * 32 + 32, 5 * 5 * 32 * 64 + 64
  layers += 7 * 7 * 64 * 64 + 64, 64 * 128 + 128, 128 * 10 + 10
  assert f"{sum(layers):,} parameters, 250 training images" in stderr
  assert re.search(r"step 4/4  train loss .* train top3 0\.\d{4}", stderr)
  assert "not shown" not in stderr and "cannot be drawn" not in stderr
  trained = json.loads(stdout.splitlines()[-1])
  assert {"loss", "accuracy", "top3"} <= {*trained}

  stdout, _ = run("evaluate.py", "--workdir=run")
  scored = json.loads(stdout.splitlines()[-1])
  assert scored["top3"] == trained["top3"]
  assert re.search(r"^ +a +\d\.\d{4}", stdout, re.MULTILINE)  # Its own classes.
  stdout, _ = run("compare.py", "run")
  _, names, _ = stdout.splitlines()
  assert names.split().count("top3") == 2  # Of validation and test.


EXPORTED = """
import jax, numpy, onnxruntime, safetensors.numpy
from rundir import runs
import steps

opened = runs.open_run("whole")
arrays = safetensors.numpy.load_file("weights")
images = numpy.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), "uint8")
mean = arrays["batch_stats/block1/BatchNorm_0/mean"]
assert mean.shape == (32,) and mean.any()
assert not (mean == opened.state.model_state["batch_stats"]["block1"]
            ["BatchNorm_0"]["mean"]).all()  # It is the average.
expected = steps.eval_step(opened.state, images / numpy.float32(255))
exported = jax.export.deserialize(open("program", "rb").read()).call(images)
session = onnxruntime.InferenceSession("network.onnx")
(onnx,) = session.run(None, {"images": images})
for found in (exported, onnx):
  numpy.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)

# Another head: with other classes, all but the logits is kept.
zeros = jax.tree.map(numpy.zeros_like, opened.state.eval_variables)
zeros["params"]["logits"] = {
  name: numpy.zeros((*x.shape[:-1], 7), "float32")
  for name, x in zeros["params"]["logits"].items()
}
fresh = opened.state.starting_from(zeros)
started = runs.starting_from("whole", fresh)
assert started.params["logits"]["kernel"].shape[1] == 7
for found, kept in (
  (started.params["block1"], opened.state.ema_params["block1"]),
  (started.model_state, opened.state.ema_model_state),
):
  jax.tree.map(numpy.testing.assert_array_equal, found, kept)
"""


@pytest.mark.slow
@pytest.mark.parametrize("copy", [True], indirect=True)
def test_a_residual_network_is_trained_resumed_scored_and_exported(
  run, copy, tmp_path
):
  config = flags(ema_decay=0.5, schedule="constant", label_smoothing=0.1)
  shorter = [*config, "--config.num_steps=2"]
  results = []
  for workdir, *starts in (
    ("whole", config),
    ("parts", shorter, config),  # Resumes after step 2.
    ("eight", config),
  ):
    devices = "--xla_force_host_platform_device_count=8"
    environment = {"XLA_FLAGS": devices} if workdir == "eight" else {}
    for start in starts:
      stdout, _ = run("train.py", f"--workdir={workdir}", *start, **environment)
    results.append(json.loads(stdout.splitlines()[-1]))
  assert results[0] == results[1]
  assert results[0]["loss"] == pytest.approx(results[2]["loss"], rel=1e-4)
  stdout, _ = run("evaluate.py", "--workdir=whole")
  scored = json.loads(stdout.splitlines()[-1])
  assert scored["loss"] == results[0]["loss"]
  run("evaluate.py", "--workdir=whole", "--workdir=parts")

  for form, output in (
    ("safetensors", "weights"),
    ("stablehlo", "program"),
    ("onnx", "network.onnx"),
    ("html", "page.html"),
  ):
    stdout, _ = run(
      "export.py", "--workdir=whole", f"--format={form}", f"--output={output}"
    )
    accuracy = json.loads(stdout.splitlines()[-1])["accuracy"]
    assert accuracy == pytest.approx(scored["accuracy"], abs=0.011)
  (copy / "check.py").write_text(EXPORTED)
  run("check.py")


def test_the_readme_names_the_right_lines():
  readme = (PROJECT / "README.md").read_text()
  found = re.findall(r"`(\w+)` in \[.*?\]\((\w+\.py)#L(\d+)\)", readme)
  assert len(found) == 5
  for name, path, number in found:
    line = (PROJECT / path).read_text().splitlines()[int(number) - 1]
    assert re.match(rf"(class |def )?{name}\b", line), f"{path}:{number}"
