"""Checks paths; reads and writes whole files."""

import contextlib
import json
import os
import pathlib
import re
from typing import Any

from machine import errors

LOCAL = (
  "a path on this machine; mount a bucket (gcsfuse for gs://, mount-s3 for"
  " s3://) or copy its contents"
)


def is_local(path: str | os.PathLike) -> bool:
  """Returns whether a path is not a URL.

  Recognizes `gs:/x` too, which is what pathlib turns `gs://x` into.
  """
  return not re.match(r"[A-Za-z][\w.+-]+:/", os.fspath(path))


def local_path(path: str | os.PathLike) -> pathlib.Path:
  """Expands a leading `~`; every path from the user goes through here.

  Raises:
    errors.UserError: if the path is empty or a URL, or the home directory is
      unknown.
  """
  if not os.fspath(path):
    raise errors.UserError("'' is not a path")
  if not is_local(path):
    raise errors.UserError(f"{path}: must be {LOCAL}")
  # Unlike pathlib, this keeps `~name` if there is no such user.
  expanded = os.path.expanduser(path)
  if expanded == "~" or expanded.startswith("~/"):
    raise errors.UserError(f"{path}: HOME is not set; give the full path")
  return pathlib.Path(expanded)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    errors.UserError: if the file does not hold one; the message names it.
  """
  if not path.is_file():
    raise errors.UserError(
      f"{path}: no such file; expected a run directory made by train.py"
    )
  try:
    found = json.loads(path.read_text("utf-8"))
  except (ValueError, RecursionError) as error:
    raise errors.UserError(f"{path}: is not JSON: {error}") from error
  if not isinstance(found, dict):
    raise errors.UserError(f"{path}: holds {found!r}, not a JSON object")
  return found


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the numbers in metrics.jsonl, without lines that are cut off."""
  path = workdir / "metrics.jsonl"
  if not path.exists():
    return []
  records = []
  for line in path.read_text(errors="replace").splitlines():
    with contextlib.suppress(ValueError, RecursionError):
      record = json.loads(line)
      if isinstance(record, dict) and isinstance(record.get("step"), int):
        numbers = record.items()
        records.append({k: x for k, x in numbers if isinstance(x, int | float)})
  return records


def to_file_name(text: str) -> str:
  """Replaces slashes, and characters that Orbax would read as a pattern."""
  return re.sub(r"[^\w.,=+%-]", "_", text)


def folder_name(text: str) -> str:
  """Names a folder after a text that starts with a split in TFDS's syntax.

  `train[:2000],checkpoint=best` gives `train_2000,checkpoint=best`.
  """
  return to_file_name(re.sub(r"\[:?", "_", text).replace("]", ""))


def set_aside(path: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  """Moves a file or folder into another folder, and returns its new path."""
  folder.mkdir(exist_ok=True)
  target = folder / path.name
  while target.exists():
    target = target.with_name(f"{target.name}_")
  return path.rename(target)


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  """Writes a JSON object with `write_text`."""
  write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes text with `write_bytes`."""
  write_bytes(path, text.encode())


def write_bytes(path: pathlib.Path, content: bytes) -> None:
  """Writes a file atomically: a crash leaves the old or the new one.

  Creates its folder if that is missing.

  Raises:
    errors.UserError: if it cannot be written; the message names it.
  """
  if os.path.exists(path) and not os.path.isfile(path):
    what = "a directory" if os.path.isdir(path) else "a device"
    raise errors.UserError(f"{path}: is {what}; must be a file")
  temporary = path.with_name(path.name + ".incomplete")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(content)
    os.replace(temporary, path)
  except OSError as error:
    raise errors.UserError(
      f"{path}: cannot be written ({error.strerror})"
    ) from error
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink()
