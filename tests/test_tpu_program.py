"""Checks what the training loop compiles to for TPUs, without a TPU."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from unittest import mock

from conftest import PROJECT
import pytest

PROGRAM = """
HloModule jit_loop

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add = f32[] add(%x, %y)
}

%transposed (images: u8[55000,784]) -> u8[55000,784] {
  %images = u8[55000,784]{1,0} parameter(0)
  ROOT %copy.1 = u8[55000,784]{0,1:T(8,128)(4,1)} copy(%images)
}

%body (carry: (f32[], u8[55000,784])) -> (f32[], u8[55000,784]) {
  %carry = (f32[], u8[55000,784]{1,0}) parameter(0)
  %loss = f32[] get-tuple-element(%carry), index=0
  %rows = u8[55000,784]{1,0} get-tuple-element(%carry), index=1
  %columns = u8[55000,784]{0,1:T(8,128)(4,1)} call(%rows), to_apply=%transposed
  %batch = u8[100,784]{1,0} slice(%columns), slice={[0:100], [0:784]}
  %total = f32[] all-reduce(%loss), to_apply=%sum
  %token = token[] after-all()
  %sent = (f32[], u32[], token[]) send(%total, %token), is_host_transfer=true
  ROOT %next = (f32[], u8[55000,784]{1,0}) tuple(%total, %rows)
}

%condition (carry: (f32[], u8[55000,784])) -> pred[] {
  %carry = (f32[], u8[55000,784]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (start: f32[], given: u8[55000,784]) -> f32[] {
  %start = f32[] parameter(0)
  %given = u8[55000,784]{1,0} parameter(1)
  %copy.2 = u8[55000,784]{1,0} copy(%given)
  %first = (f32[], u8[55000,784]{1,0}) tuple(%start, %copy.2)
  %last = (f32[], u8[55000,784]) while(%first), condition=%condition, body=%body
  %result = f32[] get-tuple-element(%last), index=0
  %mean = f32[] all-reduce(%result), to_apply=%sum
  ROOT %seen = f32[] custom-call(%mean), custom_call_target="xla_host_callback"
}
"""


@pytest.fixture
def tpu_program(monkeypatch):
  """Imports benchmarks/tpu_program.py, and undoes its environment changes."""
  monkeypatch.syspath_prepend(PROJECT / "benchmarks")
  with mock.patch.dict(os.environ):
    return importlib.import_module("tpu_program")


def test_transfers_and_copies_of_the_data_set_are_found(tpu_program):
  program = mock.Mock()
  program.as_text.return_value = PROGRAM
  found = tpu_program.describe(program)
  assert found["host_transfers"] == 2  # In the loop and after it.
  assert found["dataset_copies_in_loop"] == 2  # The call and what it calls.
  assert found["loop_collectives"] == {"all-reduce": 1}


@pytest.mark.skipif(
  not importlib.util.find_spec("libtpu"),
  reason="libtpu is not installed: see benchmarks/requirements-tpu.txt",
)
@pytest.mark.parametrize(
  ("topology", "collectives"), [("v5e:1x1", {}), ("v5e:2x4", {"all-reduce": 1})]
)
def test_the_loop_needs_at_most_one_all_reduce(tmp_path, topology, collectives):
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
  # That is room for the data set, the parameters and the order, each once.
  assert program["argument_bytes"] < 60e6
  # The plain program exceeds 60 MB, so this test can fail.
  assert program["plain_flax"]["loop_collectives"] == collectives
  assert program["plain_flax"]["argument_bytes"] > 60e6
