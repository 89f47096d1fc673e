"""Compares runs: how their configs differ and how well they did.

    python compare.py runs/ --plot=comparison.png

Runs that differ only in their seed share a row: mean ± standard deviation.
"""

import argparse
from collections.abc import Iterable
import csv
import os
import pathlib
import re
import statistics
import sys
from typing import Any

from configs import default
from machine import console
from machine import errors
from rundir import directory
from rundir import experiment
from rundir import files

_WIDTH = 100  # The widest table, in characters.


def find_runs(folders: Iterable[str | os.PathLike]) -> list[pathlib.Path]:
  """Finds all run directories in the folders, at any depth.

  Raises:
    errors.UserError: if a folder contains none.
  """
  runs = []
  for folder in folders:
    folder = files.local_path(folder)
    found = sorted(path.parent for path in folder.rglob("config.json"))
    if not found:
      raise errors.UserError(f"{folder}: contains no run directory")
    runs += [path for path in found if path not in runs]
  return runs


def is_readable(run: pathlib.Path) -> bool:
  """Returns whether a run can be read; if not, prints what is wrong."""
  try:
    directory.check_contained(run)
    files.read_json(run / "config.json")
    files.read_metrics(run)
  except (errors.UserError, OSError) as error:
    console.complain(str(error))
    return False
  return True


def summarize(run: pathlib.Path, num_steps: int | None) -> dict[str, Any]:
  """Returns the progress, newest metrics and median speed of a run.

  Args:
    run: the run directory.
    num_steps: the planned number of steps, if its config has one.
  """
  newest, rates = {}, []
  for record in files.read_metrics(run):
    numbers = {k: x for k, x in record.items() if isinstance(x, int | float)}
    newest.update(numbers)
    if "steps_per_second" in numbers:
      rates.append(numbers["steps_per_second"])
  summary = {"steps_done": newest.get("step", 0)}
  if isinstance(num_steps, int):
    summary["steps_left"] = num_steps - summary["steps_done"]
  for split in ("validation_", "test_"):
    summary |= {key: newest[key] for key in newest if key.startswith(split)}
  if rates:
    summary["steps_per_second"] = statistics.median(rates)
  return summary


def compare(runs: list[pathlib.Path]) -> list[dict[str, Any]]:
  """Returns one row per run, the best validation accuracy first.

  A row has the run directory, the config keys that differ between the runs, and
  what `summarize` returns. Missing values are None.
  """
  defaults = default.get_config().to_dict()  # For older runs.
  configs = [defaults | files.read_json(run / "config.json") for run in runs]
  keys = sorted(set().union(*configs) - {*experiment.INCIDENTAL})
  differing = [
    key
    for key in keys
    if any(config.get(key) != configs[0].get(key) for config in configs)
  ]
  summaries = [
    summarize(run, config.get("num_steps"))
    for run, config in zip(runs, configs, strict=True)
  ]
  metrics = dict.fromkeys(key for summary in summaries for key in summary)
  rows = [
    {
      "run": str(run),
      **{key: config.get(key) for key in differing},
      **{key: summary.get(key) for key in metrics},
    }
    for run, config, summary in zip(runs, configs, summaries, strict=True)
  ]
  return sorted(rows, key=lambda row: -(row.get("validation_accuracy") or 0))


def _is_result(key: str) -> bool:
  """Returns whether a column holds results; test_split is a config key."""
  is_named_so = key.startswith(("run", "steps_", "validation_", "test_"))
  return is_named_so and not key.endswith("_split")


def group_seeds(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
  """Groups the rows that differ only in the seed and the results."""
  groups: dict[str, list[dict[str, Any]]] = {}
  for row in rows:
    same = {key: x for key, x in row.items() if not _is_result(key)}
    same |= {"seed": None, "steps_done": row["steps_done"]}
    groups.setdefault(str(same), []).append(row)
  return list(groups.values())


def _cell(key: str, group: list[dict[str, Any]]) -> str:
  """Returns the text of one column for a group of runs."""
  values = [row[key] for row in group if row[key] is not None]
  if not values:
    return "-"
  if key == "run":
    if len(values) == 1:
      return console.printable(values[0])
    prefix = os.path.commonprefix(values)
    name = re.sub(r",seed=\d*$", "", prefix)
    # If the runs were named by hand, the common prefix is not a name.
    is_named = name != prefix or name in values
    return console.printable(name if is_named else f"{prefix}…")
  if key == "steps_done" and (left := group[0].get("steps_left")):
    return f"{values[0]} of {values[0] + left}"
  if _is_result(key) and isinstance(values[0], float):
    decimals = 1 if key == "steps_per_second" else 4
    text = f"{statistics.mean(values):.{decimals}f}"
    if len(values) > 1:
      text += f" ± {statistics.stdev(values):.{decimals}f}"
    return text
  return console.printable(", ".join(map(str, dict.fromkeys(values))))


def print_table(rows: list[dict[str, Any]]) -> None:
  """Prints a row per group of seeds; two tables if one is too wide."""
  groups = group_seeds(rows)
  columns = {
    key: [
      *["", *key.split("_", 1)][-2:],
      *(_cell(key, group) for group in groups),
    ]
    for key in rows[0]
    if key != "steps_left"
  }
  if len(groups) < len(rows):
    columns["runs"] = ["", "runs", *(str(len(group)) for group in groups)]
  lines = _align(columns.values())
  if max(map(len, lines)) > _WIDTH:
    settings = [cells for key, cells in columns.items() if not _is_result(key)]
    results = [cells for key, cells in columns.items() if _is_result(key)]
    lines = [*_align([columns["run"], *settings]), "", *_align(results)]
  print("\n".join(lines))


def _align(columns: Iterable[list[str]]) -> list[str]:
  """Returns the lines of a table with only the first column left-aligned."""
  first, *others = columns
  padded = [[cell.ljust(max(map(len, first))) for cell in first]]
  for column in others:
    padded.append([cell.rjust(max(map(len, column))) for cell in column])
  return ["  ".join(line).rstrip() for line in zip(*padded, strict=True)]


def show(
  rows: list[dict[str, Any]], as_csv: bool, plot: pathlib.Path | None
) -> None:
  """Prints a table or CSV and, if asked, plots the learning curves."""
  if as_csv:
    writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
  else:
    print_table(rows)
  if plot:
    from report import figures

    curves = {
      row["run"]: files.read_metrics(pathlib.Path(row["run"])) for row in rows
    }
    figures.save(figures.compare_curves(curves), plot)


def main() -> None:
  parser = console.Parser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "folders", nargs="+", metavar="FOLDER", help="where to look for runs"
  )
  parser.add_argument(
    "--csv", action="store_true", help="print CSV instead of a table"
  )
  parser.add_argument("--plot", help="a file to draw the learning curves in")
  args = parser.parse_args()
  with console.program():
    plot = args.plot and files.local_path(args.plot)
    found = find_runs(args.folders)
    runs = [run for run in found if is_readable(run)]
    if runs:
      show(compare(runs), args.csv, plot)
  sys.exit(int(runs != found))


if __name__ == "__main__":
  main()
