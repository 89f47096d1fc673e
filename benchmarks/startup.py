"""Measures the time until the first step is done, import times and peak memory.

    python benchmarks/startup.py --json=docs/startup.json

Runs train.py as a user would, in a temporary home directory: first with nothing
prepared, then with the data prepared but nothing compiled, then with both.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

_PROJECT = pathlib.Path(__file__).resolve().parent.parent
_PACKAGES = ("jax", "flax", "optax", "orbax.checkpoint", "tensorflow_datasets")


def seconds_to_first_step(home: pathlib.Path) -> float:
  """Starts the default run, and stops it after its first step."""
  environment = {**os.environ, "HOME": str(home)}
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  start = time.perf_counter()
  process = subprocess.Popen(
    [sys.executable, _PROJECT / "train.py", "--config.log_every_steps=1"],
    env=environment,
    cwd=home,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stderr is not None
  for line in process.stderr:
    if "step     1/" in line:
      break
  else:
    raise RuntimeError("train.py ended before its first step")
  seconds = time.perf_counter() - start
  process.kill()
  process.wait()
  shutil.rmtree(home / "runs")
  return seconds


def seconds_to_import(package: str) -> float:
  """Returns how long a package takes to import after those before it."""
  before = "; ".join(
    f"import {name}" for name in _PACKAGES[: _PACKAGES.index(package)]
  )
  code = (
    f"{before}\nimport time; start = time.perf_counter()\nimport {package}\n"
    "print(time.perf_counter() - start)"
  )
  return float(subprocess.check_output([sys.executable, "-c", code]))


def peak_megabytes(home: pathlib.Path) -> float:
  """Returns the peak memory of all starts and of a run that also evaluates."""
  subprocess.run(
    [sys.executable, _PROJECT / "train.py", "--config.num_steps=100"],
    env={**os.environ, "HOME": str(home)},
    cwd=home,
    check=True,
    capture_output=True,
  )
  kibibytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
  return kibibytes * 1024 / 1e6


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--json", help="where to write the result")
  args = parser.parse_args()
  kinds = ("nothing prepared", "data prepared", "and compiled")
  starts: dict[str, list[float]] = {kind: [] for kind in kinds}
  with tempfile.TemporaryDirectory() as folder:
    home = pathlib.Path(folder)
    for _ in range(args.rounds):
      shutil.rmtree(home)
      home.mkdir()
      starts["nothing prepared"].append(seconds_to_first_step(home))
      shutil.rmtree(home / ".cache")
      starts["data prepared"].append(seconds_to_first_step(home))
      starts["and compiled"].append(seconds_to_first_step(home))
    peak = peak_megabytes(home)
  result = {
    "seconds_to_first_step": {
      name: statistics.median(seconds) for name, seconds in starts.items()
    },
    "seconds_to_import": {
      package: statistics.median(
        seconds_to_import(package) for _ in range(args.rounds)
      )
      for package in _PACKAGES
    },
    "peak_megabytes": peak,
  }
  print(json.dumps(result, indent=2))
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  main()
