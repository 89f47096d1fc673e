"""Files that are read and written whole."""

import json
import os
import pathlib
from typing import Any

from absl import app

_MAX_JSON_SIZE = 2**20  # In bytes; ours have about a thousand.


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; app.UsageError names a file that is none."""
  try:
    if path.stat().st_size > _MAX_JSON_SIZE:
      raise app.UsageError(f"{path}: has more than {_MAX_JSON_SIZE} bytes")
    found = json.loads(path.read_text())
  except FileNotFoundError as error:
    raise app.UsageError(
      f"{path}: there is none; accepted is a run directory, such as train.py"
      " makes in runs/"
    ) from error
  except (OSError, ValueError, RecursionError) as error:
    raise app.UsageError(f"{path}: is not JSON: {error}") from error
  if not isinstance(found, dict):
    raise app.UsageError(f"{path}: holds {found!r}, not a JSON object")
  return found


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl, but for one that is being written."""
  path = workdir / "metrics.jsonl"
  records = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      records.append(json.loads(line))
    except ValueError:
      break
  return records


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  """Writes a JSON object with `write_text`."""
  write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file: after a crash, there is the old one or the new, whole."""
  temporary = path.with_name(path.name + ".incomplete")
  temporary.write_text(text)
  os.replace(temporary, path)
