"""Two processes that train together on virtual CPU devices."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from unittest import mock

from absl import logging
from conftest import read_jsonl
from conftest import run_program
from conftest import train_command
import jax
import numpy as np
import pytest

from configs import default
from machine import compiling
from machine import console
from machine import errors
from machine import processes
from rundir import checkpoints
from rundir import directory
from rundir import runs
import train

NUM_STEPS = 25
MAX_DIFFERENCE = 1e-5  # From rounding, as in test_devices.py.


def start(workdir, configs, devices):
  """Starts train.py once for each config, as a launcher on many hosts would."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  return [
    subprocess.Popen(
      [
        *train_command(config, workdir),
        f"--coordinator_address=localhost:{port}",
        f"--num_processes={len(configs)}",
        f"--process_id={process_id}",
      ],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env={
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
      },
    )
    for process_id, config in enumerate(configs)
  ]


def wait_for(text, process):
  lines = []
  # Processes that disagree may wait for each other forever.
  watchdog = threading.Timer(600, process.kill)
  watchdog.start()
  try:
    for line in process.stderr:
      lines.append(line)
      if text in line:
        return
  finally:
    watchdog.cancel()
  pytest.fail(f"{text!r} is not in: {''.join(lines)}")


def finish(running):
  """Returns the exit statuses, standard outputs and standard errors."""
  ended = [process.communicate(timeout=600) for process in running]
  return [process.returncode for process in running], *zip(*ended, strict=True)


@pytest.fixture
def config(tiny_config):
  tiny_config.update(num_steps=NUM_STEPS, eval_every_steps=NUM_STEPS)
  tiny_config.log_probabilities_every_steps = 0
  # With a higher rate, rounding at a ReLU would make a visible difference.
  tiny_config.learning_rate = 0.001
  tiny_config.update(
    schedule="cosine",
    warmup_steps=5,
    momentum=0.5,
    ema_decay=0.9,
    checkpoint_every_steps=8,
  )
  return tiny_config


@pytest.mark.slow
def test_two_processes_stop_and_resume_as_one(config, tmp_path):
  """They resume after one was killed, and after one got Ctrl-C."""
  run, alone = tmp_path / "run", tmp_path / "alone"

  running = start(run, [config] * 2, devices=2)
  # Step 8 is saved by then.
  wait_for(f"step 10/{NUM_STEPS}  train loss", running[0])
  running[0].kill()
  statuses, _, errors = finish(running)
  assert statuses[0] == -signal.SIGKILL
  assert statuses[1] != 0
  # From JAX's own check or the failed operation, whichever is first.
  assert re.search("another task died|another process has failed", errors[1])

  running = start(run, [config] * 2, devices=2)
  wait_for("Resuming after step", running[0])
  running[1].send_signal(signal.SIGINT)  # Passed on as SIGTERM.
  statuses, _, errors = finish(running)
  assert statuses == [128 + signal.SIGTERM] * 2, errors
  stopped = checkpoints.all_steps(run)[-1]
  assert stopped < NUM_STEPS
  assert f"SIGTERM: stopped after step {stopped}, which was saved" in errors[0]

  running = start(run, [config] * 2, devices=2)
  statuses, outputs, errors = finish(running)
  assert statuses == [0, 0], errors
  assert f"Resuming after step {stopped}" in errors[0]
  result = json.loads((run / "result.json").read_text())
  assert json.loads(outputs[0].splitlines()[-1]) == result
  assert "accuracy" not in outputs[1]
  assert "loss" not in errors[1]

  with mock.patch.object(train, "_draw"):
    train.train_and_evaluate(config, alone)  # On one device.
  states = [runs.open_run(each).state for each in (run, alone)]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=MAX_DIFFERENCE),
    *((state.params, state.ema_params) for state in states),
  )
  metrics, expected = (
    [
      value
      for record in read_jsonl(each)
      for key, value in record.items()
      if key.endswith(("loss", "accuracy"))
    ]
    for each in (run, alone)
  )
  assert len(metrics) == 2 * (NUM_STEPS // 5 + 2)  # Training and both splits.
  np.testing.assert_allclose(metrics, expected, rtol=1e-6)


@pytest.mark.parametrize(
  ("environment", "expected"),
  [
    ({}, False),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, False),  # sbatch, no srun.
    ({"SLURM_STEP_NUM_TASKS": "1"}, False),
    ({"SLURM_STEP_NUM_TASKS": "2"}, True),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),  # Colab and Kaggle.
    ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),
    ({"MEGASCALE_NUM_SLICES": "2"}, True),
  ],
)
def test_jax_joins_the_processes_of_a_launcher(
  monkeypatch, environment, expected
):
  joined = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda *args, **kwargs: joined.append(args)
  )
  for name in filter(re.compile("SLURM|OMPI|TPU|MEGASCALE").match, os.environ):
    monkeypatch.delenv(name)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  processes.join(None, None, None)
  assert joined == [(None, None, None)] * expected


def test_a_missing_coordinator_address_is_refused(tmp_path):
  done = run_program("train.py", "--process_id=1", cwd=tmp_path)
  assert done.returncode == 1
  (line,) = done.stderr.splitlines()[1:]  # After "Joining".
  assert "coordinator_address should be defined" in line
  assert "--num_processes" in line


def test_a_run_directory_that_is_not_shared_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(processes, "is_first", lambda: False)
  with pytest.raises(errors.UserError, match="that all processes share"):
    directory.create(tmp_path / "run", default.get_config(), {})


@pytest.mark.parametrize("is_first", [True, False])
def test_only_the_first_process_informs_and_prints(
  is_first, monkeypatch, capsys
):
  levels = []
  monkeypatch.setattr(processes, "is_first", lambda: is_first)
  monkeypatch.setattr(sys, "argv", ["train.py"])
  monkeypatch.setattr(console, "program", contextlib.nullcontext)
  monkeypatch.setattr(compiling, "keep_freed_memory", lambda: None)
  monkeypatch.setattr(logging, "set_verbosity", levels.append)
  monkeypatch.setattr(train, "train_and_evaluate", lambda *_: {"loss": 1})
  train.main()
  assert levels == [logging.WARNING] * (not is_first)
  assert capsys.readouterr().out == '{"loss": 1}\n' * is_first


@pytest.mark.slow
def test_processes_with_different_data_are_refused(config, tmp_path):
  other = config.copy_and_resolve_references()
  other.train_split = "train[:100]"  # The same number of other images.
  statuses, _, errors = finish(start(tmp_path / "run", [config, other], 1))
  assert statuses == [1, 1]
  for lines in errors:
    assert "not all processes have the same examples" in lines
    assert "Traceback" not in lines
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "address", ["8476", ":8476", "host:", "host:x", "host:0", "host:65536"]
)
def test_a_bad_address_is_refused(address):
  message = f"coordinator_address={address}: must be HOST:PORT"
  with pytest.raises(errors.UserError, match=message):
    processes.join(address, 1, 0)


def test_a_port_in_use_is_refused(monkeypatch):
  monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
  with socket.create_server(("", 0)) as server:
    address = f"localhost:{server.getsockname()[1]}"
    with pytest.raises(errors.UserError, match="cannot listen there: Address"):
      processes.join(address, 2, 0)
    processes.join(address, 2, 1)  # This one connects instead.
  processes.join(address, 2, 0)
