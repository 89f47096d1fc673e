"""Files that are read and written whole."""

from collections.abc import Collection
import json
import os
import pathlib
import re
from typing import Any
import zlib

from absl import app

MAX_NAME_LENGTH = 200  # In bytes; file systems stop at 255.
LOCAL = (
  "a path on this machine; mount a bucket (gcsfuse for gs://, mount-s3 for"
  " s3://), or copy what is in it"
)
_MAX_JSON_SIZE = 2**20  # In bytes; ours have about a thousand.
# What `unique_name` can tell apart by its letters: a split, maybe a slice of
# it, and more of the characters that a file name keeps.
_PLAIN_NAME = re.compile(r"[^\W_]+(\[[\d%-]*:[\d%-]*\])?(,[\w.,=+%-]*)?")


def is_local(path: str | os.PathLike) -> bool:
  """Returns whether a path is no URL, nor one that pathlib made `gs:/x` of."""
  return not re.match(r"[A-Za-z][\w.+-]+:/", os.fspath(path))


def local_path(path: str | os.PathLike) -> pathlib.Path:
  """Replaces a leading `~`; every path that a user gives goes through here.

  Raises:
    app.UsageError: it is a URL, or there is no home directory.
  """
  if not is_local(path):
    raise app.UsageError(f"{path}: must be {LOCAL}")
  # Unlike pathlib's, it keeps the name of a user that there is not.
  expanded = os.path.expanduser(path)
  if expanded == "~" or expanded.startswith("~/"):
    raise app.UsageError(f"{path}: HOME is not set; name the directory in full")
  return pathlib.Path(expanded)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; app.UsageError names a file that is none."""
  try:
    if path.stat().st_size > _MAX_JSON_SIZE:
      raise app.UsageError(f"{path}: has more than {_MAX_JSON_SIZE} bytes")
    found = json.loads(path.read_text())
  except FileNotFoundError as error:
    raise app.UsageError(
      f"{path}: no such file; expected a run directory that train.py made"
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
  for line in (
    path.read_text(errors="replace").splitlines() if path.exists() else ()
  ):
    try:
      record = json.loads(line)
    except (ValueError, RecursionError):
      break
    if isinstance(record, dict):
      records.append(record)
  return records


def check_same(
  path: pathlib.Path,
  found: dict[str, Any],
  ours: dict[str, Any],
  except_for: Collection[str] = (),
) -> None:
  """Raises app.UsageError with the keys by which a run's file is another's."""
  differing = [
    f"{key} ({found.get(key, 'none')} there, {ours.get(key, 'none')} here)"
    for key in sorted(found.keys() | ours.keys())
    if found.get(key) != ours.get(key) and key not in except_for
  ]
  if differing:
    raise app.UsageError(
      f"{path.parent} holds a run of another {path.stem}:"
      f" {', '.join(differing)}; name another --workdir, with"
      f" --init_from={path.parent} if it is to begin with these parameters"
    )


def to_file_name(text: str) -> str:
  """Replaces what would nest, as a slash, or what Orbax takes for a pattern."""
  return re.sub(r"[^\w.,=+%-]", "_", text)


def unique_name(text: str) -> str:
  """Names a file after a text that begins with a split in TFDS's syntax.

  `train[:2000],checkpoint=best` gives `train_2000,checkpoint=best`. If another
  text might give the same name, or the name is too long, it ends in a checksum.
  """
  name = to_file_name(re.sub(r"\[:?", "_", text).replace("]", ""))
  if _PLAIN_NAME.fullmatch(text) and len(name.encode()) <= MAX_NAME_LENGTH:
    return name
  checksum = f"-{zlib.crc32(os.fsencode(text)):08x}"
  kept = name.encode()[: MAX_NAME_LENGTH - len(checksum)]
  return kept.decode(errors="ignore") + checksum


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  """Writes a JSON object with `write_text`, a list of numbers on one line."""
  text = json.dumps(value, indent=2, sort_keys=True)
  # No string has a line break that is not escaped.
  text = re.sub(
    r"\[\n\s*([-+.\deE,\s]+?)\s*\]",
    lambda match: f"[{' '.join(match[1].split())}]",
    text,
  )
  write_text(path, text + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a text with `write_bytes`."""
  write_bytes(path, text.encode())


def write_bytes(path: pathlib.Path, content: bytes) -> None:
  """Writes a file so that a crash leaves the old one or the new, whole."""
  temporary = path.with_name(path.name + ".incomplete")
  try:
    temporary.write_bytes(content)
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
