"""Compares runs: how their configs differ and how well they did.

    python compare.py runs/ --plot=comparison.png

Runs that differ only in their seed share a row, with the mean and the standard
deviation, and a line of the plot, the mean in a band from lowest to highest.
"""

import collections
from collections.abc import Iterable
import os
import pathlib
import re
import statistics
import sys
from typing import Any
from typing import NamedTuple

from flax import traverse_util

from configs import default
from machine import console
from machine import directories
from machine import errors
from rundir import checkpoints
from rundir import experiment
from rundir import files

_CELL = 36  # The widest cell, except for the names of runs.


class Row(NamedTuple):
  """A run, its values of the settings that differ, and its results."""

  run: str
  settings: dict[str, Any]
  results: dict[str, Any]


def find_runs(folders: Iterable[str | os.PathLike]) -> list[pathlib.Path]:
  """Finds all run directories in the folders, at any depth, each once.

  Raises:
    errors.UserError: if a folder contains none.
  """
  runs: dict[pathlib.Path, pathlib.Path] = {}
  for folder in folders:
    folder = files.local_path(folder)
    found = []
    for path, inner, names in directories.walk(folder):
      if "config.json" in names:
        found.append(path)
        # Links inside of a run must not lead out of it.
        inner[:] = [name for name in inner if not (path / name).is_symlink()]
    if not found:
      raise errors.UserError(f"{folder}: contains no run directory")
    for path in found:
      runs.setdefault(path.resolve(), path)
  return list(runs.values())


def summarize(run: pathlib.Path, num_steps: Any) -> dict[str, Any]:
  """Returns the progress, newest metrics and median speed of a run.

  Args:
    run: the run directory.
    num_steps: the planned number of steps, if its config has one.
  """
  newest, tested, rates = {"step": 0}, 0, []
  for record in files.read_metrics(run):
    newest |= record
    if any(key.startswith("test_") for key in record):
      tested = record["step"]
    if "steps_per_second" in record:
      rates.append(record["steps_per_second"])
  # A run may stop, and save, between two logs.
  done = max([newest["step"], *checkpoints.all_steps(run)])
  summary = {"steps_done": done}
  if isinstance(num_steps, int):
    summary["steps_left"] = num_steps - done
  # An extended run still has the test results of its first end.
  for split in ("validation_", "test_") if tested == done else ("validation_",):
    summary |= {key: newest[key] for key in newest if key.startswith(split)}
  if rates:
    summary["steps_per_second"] = statistics.median(rates)
  return summary


def compare(runs: Iterable[pathlib.Path]) -> list[Row]:
  """Returns the rows of all readable runs, the best validation accuracy first.

  Says what is wrong with the others. Missing values are None.
  """
  defaults = default.get_config().to_dict()  # For older runs.
  configs, summaries = {}, {}
  for run in runs:
    try:
      config = defaults | files.read_json(run / "config.json")
      summaries[run] = summarize(run, config["num_steps"])
      configs[run] = traverse_util.flatten_dict(config, sep=".")
    except (errors.UserError, OSError) as error:
      console.complain(str(error))
  first: dict[str, Any] = next(iter(configs.values()), {})
  differing = [
    key
    for key in sorted(set().union(*configs.values()))
    if key not in experiment.INCIDENTAL
    and any(config.get(key) != first.get(key) for config in configs.values())
  ]
  metrics = dict.fromkeys(key for each in summaries.values() for key in each)
  rows = [
    Row(
      str(run),
      {key: configs[run].get(key) for key in differing},
      {key: summary.get(key) for key in metrics},
    )
    for run, summary in summaries.items()
  ]
  return sorted(rows, key=_error)


def _error(row: Row) -> float:
  return 1 - (row.results.get("validation_accuracy") or 0)


def _without_seed(path: str) -> str:
  """Returns the path of a run that train.py named, without its seed."""
  return re.sub(r",seed=\d+(?=,|$)", "", path)


def group_seeds(rows: list[Row]) -> list[list[Row]]:
  """Groups the runs that differ only in the seed, the best group first.

  A group has no seed twice: a second run with it starts another group.
  """
  groups: dict[tuple[str, int], list[Row]] = {}
  seen: list[tuple[str, Any]] = []
  # Runs that were named or stored together stay together.
  names = collections.Counter(_without_seed(row.run) for row in rows)
  for row in sorted(rows, key=lambda x: (-names[_without_seed(x.run)], x.run)):
    steps, test = map(row.results.get, ("steps_done", "test_accuracy"))
    same = str(({**row.settings, "seed": None}, steps, test is None))
    seen.append((same, row.settings.get("seed")))
    groups.setdefault((same, seen.count(seen[-1])), []).append(row)
  return sorted(groups.values(), key=lambda x: statistics.mean(map(_error, x)))


def _name(group: list[Row]) -> str:
  """Returns what the paths of a group have in common."""
  paths = [row.run for row in group]
  names = {_without_seed(path) for path in paths}
  common = [*names] if len(names) == 1 else [f"{os.path.commonprefix(paths)}*"]
  return console.printable((paths if len(group) == 1 else common)[0])


def _cell(key: str, group: list[Row]) -> str:
  """Returns the text of one column for a group of runs."""
  found = [{**row.results, **row.settings}[key] for row in group]
  values = [value for value in found if value is not None]
  if key == "steps_done" and (left := group[0].results.get("steps_left")):
    return f"{values[0]} of {values[0] + left}"
  if key in group[0].settings or key == "steps_done" or not values:
    return _short(", ".join(dict.fromkeys(map(str, values))) or "-")
  decimals = 1 if key == "steps_per_second" else 4
  text = f"{statistics.mean(values):.{decimals}f}"
  if len(values) > 1:
    has_sign = "±".encode(sys.stdout.encoding or "ascii", "ignore")
    deviation = f"{statistics.stdev(values):.{decimals}f}"
    text += f" {'±' if has_sign else '+-'} {deviation}"
  return text


def _short(text: str) -> str:
  """Returns the two ends of a text that is too long for a cell."""
  text, half = console.printable(text), _CELL // 2 - 2
  return text if len(text) <= _CELL else f"{text[:half]}...{text[-half:]}"


def _columns(keys: Iterable[str], groups: list[list[Row]]) -> list[list[str]]:
  """Returns columns of cells with two header cells each."""
  return [
    ["", *_short(key).split("_", 1)][-2:] + [_cell(key, x) for x in groups]
    for key in keys
  ]


def print_table(groups: list[list[Row]]) -> None:
  """Prints a row per group; the names come last, because they may be long."""
  settings, results = groups[0][0][1:]
  keys = [key for key in (*settings, *results) if key != "steps_left"]
  columns = _columns(keys, groups)
  sizes = [len(group) for group in groups]
  if max(sizes) > 1:
    columns.append(["", "runs", *map(str, sizes)])
  names = ["", "run", *map(_name, groups)]
  for line, name in zip(_align(columns), names, strict=True):
    print(f"{line}  {name}".rstrip())


def _align(columns: Iterable[list[str]]) -> list[str]:
  """Returns the lines of a table with right-aligned columns."""
  padded = []
  for column in columns:
    width = max(map(len, column))
    padded.append([cell.rjust(width) for cell in column])
  return ["  ".join(line).rstrip() for line in zip(*padded, strict=True)]


def legend(groups: list[list[Row]]) -> list[str]:
  """Returns the table's settings, or its names if they do not tell enough."""
  keys = [key for key in groups[0][0].settings if key != "seed"]
  columns = _columns(keys, groups)
  if len(set(zip(*columns, strict=True))) < len(groups) + 2:
    columns.insert(0, ["", "run", *map(_short, map(_name, groups))])
  return _align(columns)


def plot_curves(groups: list[list[Row]], path: pathlib.Path) -> None:
  """Draws the learning curves of all groups in a file."""
  from report import figures

  curves = [
    [files.read_metrics(pathlib.Path(row.run)) for row in group]
    for group in groups
  ]
  figures.save(figures.compare_curves(curves, legend(groups)), path)


def main() -> None:
  parser = console.Parser(__doc__)
  parser.add_argument(
    "folders", nargs="+", metavar="FOLDER", help="where to look for runs"
  )
  parser.add_argument(
    "--plot",
    type=files.local_path,
    help="a file to draw the learning curves in",
  )
  with console.program():
    args = parser.parse_args()
    found = find_runs(args.folders)
    rows = compare(found)
    if rows:
      groups = group_seeds(rows)
      print_table(groups)
      if args.plot:
        plot_curves(groups, args.plot)
  sys.exit(int(len(rows) < len(found)))


if __name__ == "__main__":
  main()
