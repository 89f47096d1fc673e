"""What the training loop is compiled to for TPUs; none is needed."""

import importlib.util
import json
import os
import subprocess
import sys

from conftest import PROJECT
import pytest

pytestmark = pytest.mark.skipif(
  not importlib.util.find_spec("libtpu"),
  reason="libtpu is not installed: see benchmarks/requirements-tpu.txt",
)


@pytest.mark.parametrize(
  ("topology", "collectives"), [("v5e:1x1", {}), ("v5e:2x4", {"all-reduce": 1})]
)
def test_a_step_leaves_the_chip_only_to_add_up_gradients(
  tmp_path, topology, collectives
):
  done = subprocess.run(
    [
      *(sys.executable, str(PROJECT / "benchmarks/tpu_program.py")),
      *(f"--topology={topology}", "--preset=default"),
      f"--json={tmp_path / 'program.json'}",
    ],
    env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  program = json.loads((tmp_path / "program.json").read_text())
  assert program["loop_collectives"] == collectives
  assert program["host_transfers"] == 0
  assert program["dataset_copies_in_loop"] == 0
  # The data set, the parameters and the order, each of them once.
  assert program["argument_bytes"] < 60e6
  # The plain program shows that these figures can differ.
  assert program["plain_flax"]["loop_collectives"] == collectives
  assert program["plain_flax"]["argument_bytes"] > 60e6
