"""Applies the changes in CONTRIBUTING.md to a copy, then trains it."""

import json
import re
import shutil
import subprocess
import sys

from conftest import PROJECT
from conftest import idx_bytes
import numpy as np
import pytest

SIZES = {"train": 300, "t10k": 100}


def changes():
  """Yields (file, old text, new text) for each change."""
  text = (PROJECT / "CONTRIBUTING.md").read_text()
  for block in re.findall(r"```diff\n(.*?)```", text, re.DOTALL):
    for change in block.split("--- ")[1:]:
      path, *lines = change.splitlines()
      old = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
      new = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
      yield path, old, new


@pytest.fixture
def copy(tmp_path):
  """A copy of the project without data, with all changes applied."""
  copy = tmp_path / "copy"
  for pattern in ("*.py", "*/*.py"):
    for path in PROJECT.glob(pattern):
      target = copy / path.relative_to(PROJECT)
      target.parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(path, target)
  for path, old, new in changes():
    source = (copy / path).read_text()
    assert source.count(old) == 1, f"{path} must contain exactly once:\n{old}"
    (copy / path).write_text(source.replace(old, new))
  # Rename a layer too: no other file may depend on layer names.
  source = (copy / "model.py").read_text()
  source = source.replace('name="conv2"', 'name="second"')
  (copy / "model.py").write_text(source)
  path = copy / "sources/idx_dataset.py"  # A few images are enough.
  source = path.read_text().replace("60_000", "300").replace("10_000", "100")
  path.write_text(source)
  return copy


@pytest.mark.slow
def test_the_changes_shown_are_sufficient(copy, tmp_path):
  rng = np.random.default_rng(0)
  for prefix, size in SIZES.items():
    for kind, array in (
      ("images-idx3", rng.integers(0, 256, (size, 28, 28))),
      ("labels-idx1", rng.integers(0, 10, size)),
    ):
      path = tmp_path / f"{prefix}-{kind}-ubyte"
      path.write_bytes(idx_bytes(array))

  def run(program, *args):
    command = [sys.executable, copy / program, *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr

  config = {
    "dataset": "my_letters",
    "manual_dir": tmp_path,
    "data_dir": tmp_path / "prepared",
    "train_split": "train[50:]",
    "validation_split": "train[:50]",
    "batch_size": 16,
    "num_steps": 4,
    "optimizer": "lion",
    "features": 64,
  }
  flags = [f"--config.{key}={value}" for key, value in config.items()]
  stdout, stderr = run("train.py", "--workdir=run", *flags)
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
  stdout, _ = run("compare.py", "run", "--csv")
  assert "validation_top3" in stdout and "test_top3" in stdout


def test_the_readme_names_the_right_lines():
  readme = (PROJECT / "README.md").read_text()
  found = re.findall(r"`(\w+)` in \[.*?\]\((\w+\.py)#L(\d+)\)", readme)
  assert len(found) == 4
  for name, path, number in found:
    line = (PROJECT / path).read_text().splitlines()[int(number) - 1]
    assert re.match(rf"(class |def )?{name}\b", line), f"{path}:{number}"
