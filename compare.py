"""Compares runs: what differs between their configs, and what came of it.

python compare.py runs/ --plot=comparison.png
"""

import argparse
from collections.abc import Iterable
import csv
import os
import pathlib
import statistics
import sys
from typing import Any

from absl import app

from machine import console
from rundir import directory
from rundir import files


def find_runs(folders: Iterable[str | os.PathLike]) -> list[pathlib.Path]:
  """All run directories at or below the folders.

  Raises:
    app.UsageError: names a folder without any.
  """
  runs = []
  for folder in folders:
    folder = files.local_path(folder)
    found = sorted(path.parent for path in folder.rglob("config.json"))
    if not found:
      raise app.UsageError(f"{folder}: there is no run directory in it")
    runs += [path for path in found if path not in runs]
  return runs


def is_readable(run: pathlib.Path) -> bool:
  """Says what is wrong with a run directory, if something is."""
  try:
    directory.check_contained(run)
    files.read_json(run / "config.json")
  except app.UsageError as error:
    console.complain(str(error))
    return False
  return True


def summarise(run: pathlib.Path) -> dict[str, Any]:
  """The newest metrics of a run, as far as it has any."""
  newest, rates = {}, []
  for record in files.read_metrics(run):
    newest.update(record)
    if "steps_per_second" in record:
      rates.append(record["steps_per_second"])
  summary = {"steps_done": newest["step"]} if newest else {}
  for split in ("validation_", "test_"):
    summary |= {key: newest[key] for key in newest if key.startswith(split)}
  if rates:
    summary["steps_per_second"] = statistics.median(rates)
  return summary


def compare(runs: list[pathlib.Path]) -> list[dict[str, Any]]:
  """One row for each run, the best by validation accuracy first.

  Returns:
    Of each run: its directory, the config keys that are not the same in all,
    and what `summarise` says; None where one run alone lacks it.
  """
  configs = [files.read_json(run / "config.json") for run in runs]
  keys = sorted(set().union(*configs))
  differing = [
    key
    for key in keys
    if any(config.get(key) != configs[0].get(key) for config in configs)
  ]
  summaries = [summarise(run) for run in runs]
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


def _format(value: Any) -> str:
  if value is None:
    return "-"
  if isinstance(value, float):
    return f"{value:.4g}" if abs(value) < 1e-2 or value > 10 else f"{value:.4f}"
  text = str(value)
  return text if text.isprintable() else ascii(text)


def print_table(rows: list[dict[str, Any]]) -> None:
  header = list(rows[0])
  cells = [header, *([_format(row[key]) for key in header] for row in rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  for line in cells:
    padded = (
      f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)
    )
    print("  ".join(padded).rstrip())


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.error = console.exit_with
  parser.add_argument("folders", nargs="+")
  parser.add_argument("--csv", action="store_true", help="print CSV")
  parser.add_argument("--plot", help="a picture file for the learning curves")
  args = parser.parse_args()
  with console.one_line_errors():
    plot = args.plot and files.local_path(args.plot)
    found = find_runs(args.folders)
    runs = [run for run in found if is_readable(run)]
    rows = compare(runs) if runs else []
    if args.csv and rows:
      writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
      writer.writeheader()
      writer.writerows(rows)
    elif rows:
      print_table(rows)
    if plot and rows:
      from report import figures

      curves = {
        row["run"]: files.read_metrics(pathlib.Path(row["run"])) for row in rows
      }
      figures.save(figures.compare_curves(curves), plot)
  sys.exit(int(runs != found))


if __name__ == "__main__":
  main()
