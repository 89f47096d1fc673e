"""Slurm and Open MPI start two processes, which train as one.

Slurm's daemons are started here, as the current user and apart from any that
the machine has already.
"""

import contextlib
import getpass
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time

from conftest import assert_same_state
from conftest import read_jsonl
from conftest import train_command
import pytest
import test_processes

from rundir import checkpoints
from rundir import files
from rundir import runs

pytestmark = pytest.mark.slow

NUM_STEPS = 100  # Some seconds, so that a signal arrives before the end.
STOPPED = 128 + signal.SIGTERM
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
# A requeued job waits until its credentials have expired, and then until Slurm
# looks for jobs to start: by default, 120 s and up to 60 s.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SchedulerParameters=sched_interval=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=test Nodes={host} Default=YES
"""


def need(*programs):
  missing = [program for program in programs if not shutil.which(program)]
  if missing:
    pytest.skip(f"not installed: {', '.join(missing)}")


def free_ports(number):
  with contextlib.ExitStack() as stack:
    servers = [
      stack.enter_context(socket.create_server(("", 0))) for _ in range(number)
    ]
    return [server.getsockname()[1] for server in servers]


def wait_until(is_true, output, timeout=120):
  """Waits until `is_true()`; fails with the content of the file `output`."""
  deadline = time.monotonic() + timeout
  while not is_true():
    assert time.monotonic() < deadline, output.read_text()
    time.sleep(0.2)


def wait_for(text, output):
  wait_until(lambda: text in output.read_text(), output)


@pytest.fixture(scope="module", autouse=True)
def environment():
  """Variables for this file, which all programs below inherit."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_PLATFORMS", "cpu")
    yield patch


@pytest.fixture(scope="module")
def slurm(environment, tmp_path_factory):
  """A cluster of one node."""
  need("munged", "slurmctld", "slurmd", "srun", "sbatch")
  folder = tmp_path_factory.mktemp("slurm")
  for name in ("state", "spool"):
    (folder / name).mkdir()
  key = folder / "munge.key"
  key.write_bytes(os.urandom(128))
  key.chmod(0o400)
  conf = folder / "slurm.conf"
  conf.write_text(
    SLURM_CONF.format(
      folder=folder,
      host=socket.gethostname().split(".")[0],
      ports=free_ports(2),
      user=getpass.getuser(),
    )
  )
  munged = [
    *("munged", "--foreground", "--force", f"--key-file={key}"),
    *(f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed"),
    f"--socket={folder}/munge.socket",
  ]
  output = folder / "output"
  environment.setenv("SLURM_CONF", str(conf))
  with contextlib.ExitStack() as stack:
    log = stack.enter_context(output.open("w"))
    for daemon in (munged, ["slurmctld", "-D"], ["slurmd", "-D"]):
      process = stack.enter_context(  # At the end, this waits for it.
        subprocess.Popen(daemon, stdout=log, stderr=log)
      )
      stack.callback(process.terminate)
    wait_until(lambda: "idle" in run("sinfo"), output, timeout=30)
    yield
    run("scancel", f"--user={getpass.getuser()}")  # After a failed test.
    wait_until(lambda: not run("squeue", "--noheader"), output)


def run(*command):
  """Runs a command to its end and returns its standard output."""
  return subprocess.run(
    command, stdout=subprocess.PIPE, text=True, timeout=60
  ).stdout


def submit(config, workdir, output, *options):
  """Submits a job of two tasks and returns its number."""
  command = shlex.join(train_command(config, workdir))
  return run(
    *("sbatch", "--parsable", "--ntasks=2", f"--output={output}"),
    *("--open-mode=append", *options, f"--wrap=srun {command}"),
  ).strip()


def state(job):
  """Returns a job's state and exit status."""
  shown = run("scontrol", "show", "job", job)
  (found,) = re.findall(r"JobState=(\w+)", shown)
  (status,) = re.findall(r" ExitCode=(\d+):", shown)
  return found, int(status)


@pytest.fixture(scope="module")
def config(_tiny_config):
  config = _tiny_config.copy_and_resolve_references()
  config.update(num_steps=NUM_STEPS, eval_every_steps=NUM_STEPS)
  config.update(checkpoint_every_steps=NUM_STEPS)
  config.log_probabilities_every_steps = 0
  return config


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
  """The run of two processes without a launcher and without a stop."""
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  statuses, *_, errors = test_processes.finish(
    test_processes.start(workdir, [config] * 2, devices=1)
  )
  assert statuses == [0, 0], errors
  return workdir


def assert_equal(workdir, whole):
  first, *_ = files.read_json(workdir / "made_by.json")["starts"]
  assert first["device"] == "2 x cpu"
  assert_same_state(runs.open_run(workdir).state, runs.open_run(whole).state)
  results, losses = zip(
    *(
      (
        files.read_json(each / "result.json"),
        [r["train_loss"] for r in read_jsonl(each) if "train_loss" in r],
      )
      for each in (workdir, whole)
    ),
    strict=True,
  )
  assert results[0] == results[1]
  assert losses[0] == losses[1]


def test_two_tasks_of_open_mpi_stop_and_resume_as_one(config, whole, tmp_path):
  need("mpirun")
  workdir, output = tmp_path / "run", tmp_path / "output"
  # By default each process has one core, which changes the rounding.
  command = "mpirun --allow-run-as-root --oversubscribe -np 2 --bind-to none"
  command = [*command.split(), *train_command(config, workdir)]

  with output.open("w") as file:
    process = subprocess.Popen(command, stdout=file, stderr=file)
  wait_for(f"step   5/{NUM_STEPS}  train loss", output)
  # mpirun passes SIGUSR1 on; after SIGTERM it kills them in a second.
  process.send_signal(signal.SIGUSR1)
  assert process.wait(60) == STOPPED, output.read_text()
  stopped = checkpoints.all_steps(workdir)[-1]
  assert stopped < NUM_STEPS
  wait_for(f"SIGTERM: stopped after step {stopped}, which was saved", output)

  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  assert f"Resuming after step {stopped}" in done.stderr
  assert done.stdout.count('{"accuracy":') == 1
  assert_equal(workdir, whole)


@pytest.mark.usefixtures("slurm")
def test_a_requeued_job_resumes(config, whole, tmp_path):
  """While it runs, as when another job takes its place: Slurm sends SIGTERM."""
  workdir, output = tmp_path / "run", tmp_path / "output"
  output.touch()
  job = submit(config, workdir, output, "--requeue")
  wait_for(f"step   5/{NUM_STEPS}  train loss", output)
  run("scontrol", "requeue", job)
  wait_until(lambda: state(job) == ("COMPLETED", 0), output)
  text = output.read_text()
  stopped = re.findall(r"SIGTERM: stopped after step (\d+), which was", text)
  assert len(stopped) == 1, text
  assert re.findall(r"Resuming after step (\d+)", text) == stopped
  assert text.count('{"accuracy":') == 1
  assert_equal(workdir, whole)


@pytest.mark.usefixtures("slurm")
def test_a_time_limit_stops_a_job(config, tmp_path):
  workdir, output = tmp_path / "run", tmp_path / "output"
  output.touch()
  config = config.copy_and_resolve_references()
  config.num_steps = 10**4  # More than two minutes.
  for key in ("log", "eval", "checkpoint"):
    config[f"{key}_every_steps"] = config.num_steps
  # The shortest limit is one minute. Slurm looks every 30 seconds, and sends
  # the signal if it would be late the next time: here after 25 to 55 seconds.
  job = submit(config, workdir, output, "--time=1", "--signal=TERM@5")
  wait_until(lambda: state(job) == ("FAILED", STOPPED), output)
  (stopped,) = checkpoints.all_steps(workdir)
  assert f"SIGTERM: stopped after step {stopped}, which" in output.read_text()
