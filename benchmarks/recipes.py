"""Trains presets with several seeds, and prints their rows of docs/recipes.md.

    python benchmarks/recipes.py fast --seeds=20 --json=docs/recipes.json

Runs train.py as a user would, one seed after another, and passes any --config
flags on to it. Complete runs in --runs are only evaluated, not trained again.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
from typing import Any

_PROJECT = pathlib.Path(__file__).resolve().parent.parent


def run(
  preset: str, seed: int, workdir: pathlib.Path, flags: list[str]
) -> dict[str, Any]:
  """Trains, and returns the result and how many seconds the steps took."""
  done = subprocess.run(
    [
      *(sys.executable, _PROJECT / "train.py"),
      f"--config={_PROJECT / 'configs' / preset}.py",
      f"--config.seed={seed}",
      f"--workdir={workdir}",
      *flags,
    ],
    stdout=subprocess.DEVNULL,
  )
  if done.returncode:
    sys.exit(done.returncode)  # train.py has printed why.
  result = json.loads((workdir / "result.json").read_text())
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  seconds, last_step = 0.0, 0
  for record in map(json.loads, lines):
    if "steps_per_second" in record:
      # The first interval excludes the step that compiled; here that step
      # counts as much as the others.
      seconds += (record["step"] - last_step) / record["steps_per_second"]
      last_step = record["step"]
  return {
    "seed": seed,
    "accuracy": result["accuracy"],
    "loss": result["loss"],
    "training_seconds": seconds,
  }


def summarize(
  config: dict[str, Any], runs: list[dict[str, Any]]
) -> dict[str, Any]:
  accuracies = [run["accuracy"] for run in runs]
  return {
    "steps": config["num_steps"],
    "examples": config["num_steps"] * config["batch_size"],
    "mean": statistics.mean(accuracies),
    "deviation": statistics.stdev(accuracies) if len(runs) > 1 else None,
    "min": min(accuracies),
    "median_training_seconds": statistics.median(
      run["training_seconds"] for run in runs
    ),
    "python": platform.python_version(),
    "cpus": os.cpu_count(),
    "runs": runs,
  }


def row(preset: str, summary: dict[str, Any]) -> str:
  deviation = summary["deviation"]
  spread = "" if deviation is None else f" ± {100 * deviation:.2f}"
  seconds = summary["median_training_seconds"]
  time = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
  return (
    f"| `configs/{preset}.py` | {summary['steps']:,} | {summary['examples']:,}"
    f" | {time} | {100 * summary['mean']:.2f}{spread}"
    f" | {100 * summary['min']:.2f} | {len(summary['runs'])} |"
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("presets", nargs="+", help="such as fast")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument(
    "--runs", type=pathlib.Path, default=pathlib.Path("runs/recipes")
  )
  parser.add_argument(
    "--json", type=pathlib.Path, help="a file to add the results to"
  )
  args, flags = parser.parse_known_args()
  for flag in flags:
    if not flag.startswith("--config."):
      parser.error(f"{flag}: flags for train.py must begin with --config.")
  for preset in args.presets:
    workdirs = [
      args.runs / f"{preset},seed={seed}" for seed in range(args.seeds)
    ]
    runs = [
      run(preset, seed, workdir, flags) for seed, workdir in enumerate(workdirs)
    ]
    config = json.loads((workdirs[0] / "config.json").read_text())
    summary = summarize(config, runs)
    print(row(preset, summary))
    if args.json:
      results = json.loads(args.json.read_text()) if args.json.exists() else {}
      results[preset] = summary
      args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
  main()
