"""Kills a run again and again, and compares it with an uninterrupted one.

    python benchmarks/faults.py --rounds=50 --json=docs/faults.json

Each round starts `train.py` in the same run directory and ends it at a random
moment with SIGKILL or SIGTERM. In the end, the run's parameters, optimizer
state, metrics.jsonl and result.json must be identical, bit for bit, to those of
an uninterrupted run with the same config; otherwise this exits with status 1.
It prints, and writes as JSON, what the process was doing when the signals came
and how long it took to exit after SIGTERM.
"""

import argparse
import collections
import json
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

PROJECT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from rundir import checkpoints  # noqa: E402
from rundir import files  # noqa: E402
from rundir import runs  # noqa: E402

_STEPS_PER_ROUND = 60
_CONFIG = {
  "train_split": "train[5000:6000]",
  "validation_split": "train[:1000]",
  "test_split": "test[:1000]",
  "batch_size": 16,
  "learning_rate": 0.05,
  "log_every_steps": 5,
  "eval_every_steps": 15,
  "checkpoint_every_steps": 10,
}
_MEAN_LIFE = 2.0  # Seconds after the run directory is opened.


def start(folder: pathlib.Path, num_steps: int) -> subprocess.Popen:
  flags = {**_CONFIG, "num_steps": num_steps}
  return subprocess.Popen(
    [
      *(sys.executable, str(PROJECT / "train.py"), f"--workdir={folder}"),
      *(f"--config.{key}={value}" for key, value in flags.items()),
    ],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def phase(folder: pathlib.Path, records_before: int) -> str:
  """Infers from a run directory's files what its process is doing."""
  if list(folder.glob("checkpoints/*tmp*")):
    return "saving"
  records = files.read_metrics(folder)
  if len(records) <= records_before:
    return "starting"
  last = records[-1]
  is_validated = last["step"] % _CONFIG["eval_every_steps"] == 0
  if is_validated and "train_loss" in last:
    return "evaluating"
  return "training"


def interrupt(
  folder: pathlib.Path, num_steps: int, rng: random.Random
) -> dict[str, str | float] | None:
  """Starts the run and kills it; returns None if the run finished first."""
  process = start(folder, num_steps)
  assert process.stderr is not None
  for line in process.stderr:
    if "Run directory" in line:
      break
  records = len(files.read_metrics(folder))
  try:
    process.wait(rng.expovariate(1 / _MEAN_LIFE))
    return None
  except subprocess.TimeoutExpired:
    pass
  number = rng.choice([signal.SIGKILL, signal.SIGTERM])
  what = phase(folder, records)
  sent = time.monotonic()
  process.send_signal(number)
  stderr = process.stderr.read()
  process.wait()
  accepted = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, 0)}[number]
  if process.returncode not in accepted or "Traceback" in stderr:
    sys.exit(f"status {process.returncode} after {number.name}:\n{stderr}")
  seconds = time.monotonic() - sent
  return {"signal": number.name, "phase": what, "seconds": round(seconds, 2)}


def complete(folder: pathlib.Path, num_steps: int) -> None:
  process = start(folder, num_steps)
  _, stderr = process.communicate()
  if process.returncode:
    sys.exit(stderr)


def differences(a: pathlib.Path, b: pathlib.Path) -> list[str]:
  """Returns what is not identical, bit for bit, in two run directories."""
  found = []
  if (a / "result.json").read_text() != (b / "result.json").read_text():
    found.append("result.json")
  speed = {"steps_per_second", "images_per_second"}
  records = [
    [{k: r[k] for k in r if k not in speed} for r in read]
    for read in map(files.read_metrics, (a, b))
  ]
  if records[0] != records[1]:
    found.append("metrics.jsonl")
  states = [runs.open_run(folder).state for folder in (a, b)]
  for (path, x), y in zip(
    jax.tree.leaves_with_path(states[0]),
    jax.tree.leaves(states[1]),
    strict=True,
  ):
    if not np.array_equal(x, y):
      found.append(jax.tree_util.keystr(path))
  return found


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rounds", type=int, default=50)
  parser.add_argument(
    "--seed", type=int, default=0, help="decides when and how the run is killed"
  )
  parser.add_argument(
    "--json", type=pathlib.Path, help="where to write the result"
  )
  args = parser.parse_args()
  rng = random.Random(args.seed)
  num_steps = args.rounds * _STEPS_PER_ROUND
  with tempfile.TemporaryDirectory() as scratch:
    whole, broken = pathlib.Path(scratch, "whole"), pathlib.Path(scratch, "0")
    complete(whole, num_steps)
    rounds: list[dict[str, str | float]] = []
    found, num_runs = [], 1
    while len(rounds) < args.rounds:
      done = interrupt(broken, num_steps, rng)
      if done:
        rounds.append(done)
        step = checkpoints.all_steps(broken)[-1:]
        print(f"{len(rounds):3}/{args.rounds}", *done.values(), *step)
      else:  # The run finished before a signal: compare it, and start another.
        found += differences(whole, broken)
        broken = pathlib.Path(scratch, str(num_runs))
        num_runs += 1
    complete(broken, num_steps)
    found += differences(whole, broken)
  counts = collections.Counter(f"{r['signal']} {r['phase']}" for r in rounds)
  seconds = [float(r["seconds"]) for r in rounds if r["signal"] == "SIGTERM"]
  result = {
    "rounds": args.rounds,
    "steps": num_steps,
    "runs": num_runs,
    "signals": dict(sorted(counts.items())),
    "seconds_from_sigterm_to_exit": seconds
    and {"median": float(np.median(seconds)), "max": max(seconds)},
    "differences": found,
  }
  print(json.dumps(result, indent=2))
  if args.json:
    files.write_json(args.json, result)
  sys.exit(1 if found else 0)


if __name__ == "__main__":
  main()
