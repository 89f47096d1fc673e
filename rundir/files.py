"""Checks paths; reads and writes whole files."""

from collections.abc import Collection
from collections.abc import Iterator
import json
import os
import pathlib
import re
import tempfile
from typing import Any
import zlib

from machine import errors

MAX_NAME_LENGTH = 200  # In bytes; file systems allow 255.
LOCAL = (
  "a path on this machine; mount a bucket (gcsfuse for gs://, mount-s3 for"
  " s3://) or copy its contents"
)
_MAX_JSON_SIZE = 2**20  # In bytes; ours take about a thousand.
# Texts that stay distinct as file names: a split, perhaps sliced, and then only
# characters that `to_file_name` keeps.
_PLAIN_NAME = re.compile(r"[^\W_]+(\[[\d%-]*:[\d%-]*\])?(,[\w.,=+%-]*)?")


def is_local(path: str | os.PathLike) -> bool:
  """Returns whether a path is not a URL.

  Recognizes `gs:/x` too, which is what pathlib turns `gs://x` into.
  """
  return not re.match(r"[A-Za-z][\w.+-]+:/", os.fspath(path))


def local_path(path: str | os.PathLike) -> pathlib.Path:
  """Expands a leading `~`; every path from the user goes through here.

  Raises:
    errors.UserError: if the path is a URL, or the home directory is unknown.
  """
  if not is_local(path):
    raise errors.UserError(f"{path}: must be {LOCAL}")
  # Unlike pathlib, this keeps `~name` if there is no such user.
  expanded = os.path.expanduser(path)
  if expanded == "~" or expanded.startswith("~/"):
    raise errors.UserError(f"{path}: HOME is not set; give the full path")
  return pathlib.Path(expanded)


def walk(
  folder: pathlib.Path,
) -> Iterator[tuple[pathlib.Path, list[str], list[str]]]:
  """Does what os.walk does, through links too, but yields no folder twice."""
  seen = set()
  for path, folders, names in os.walk(folder, followlinks=True):
    real = os.path.realpath(path)
    if real in seen:
      folders.clear()  # It may be a link to a folder above.
      continue
    seen.add(real)
    # Visit a folder by its own name if it is beside a link to it.
    folders.sort(key=lambda name: (os.path.islink(f"{path}/{name}"), name))
    yield pathlib.Path(path), folders, names


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    errors.UserError: if the file does not hold one; the message names it.
  """
  try:
    if path.stat().st_size > _MAX_JSON_SIZE:
      raise errors.UserError(f"{path}: has more than {_MAX_JSON_SIZE} bytes")
    found = json.loads(path.read_text("utf-8"))
  except FileNotFoundError as error:
    raise errors.UserError(
      f"{path}: no such file; expected a run directory made by train.py"
    ) from error
  except (OSError, ValueError, RecursionError) as error:
    raise errors.UserError(f"{path}: is not JSON: {error}") from error
  if not isinstance(found, dict):
    raise errors.UserError(f"{path}: holds {found!r}, not a JSON object")
  return found


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Reads metrics.jsonl: numbers, up to a line that is still being written."""
  path = workdir / "metrics.jsonl"
  records = []
  for line in (
    path.read_text(errors="replace").splitlines() if path.exists() else ()
  ):
    try:
      record = json.loads(line)
    except (ValueError, RecursionError):
      break
    if isinstance(record, dict) and isinstance(record.get("step"), int):
      numbers = {k: x for k, x in record.items() if isinstance(x, int | float)}
      records.append(numbers)
  return records


def check_same(
  path: pathlib.Path,
  found: dict[str, Any],
  ours: dict[str, Any],
  except_for: Collection[str] = (),
) -> None:
  """Raises errors.UserError if a run's file differs, and names the keys."""
  differing = [
    f"{key} ({found.get(key, 'none')} there, {ours.get(key, 'none')} here)"
    for key in sorted(found.keys() | ours.keys())
    if found.get(key) != ours.get(key) and key not in except_for
  ]
  if differing:
    raise errors.UserError(
      f"{path.parent} holds a run with another {path.stem}:"
      f" {', '.join(differing)}; name another --workdir, and add"
      f" --config.init_from={path.parent} to start from that run's parameters"
    )


def to_file_name(text: str) -> str:
  """Replaces slashes, and characters that Orbax would read as a pattern."""
  return re.sub(r"[^\w.,=+%-]", "_", text)


def unique_name(text: str) -> str:
  """Names a file after a text that starts with a split in TFDS's syntax.

  `train[:2000],checkpoint=best` gives `train_2000,checkpoint=best`. If another
  text might give the same name, or if the name is too long, it ends in a
  checksum.
  """
  name = to_file_name(re.sub(r"\[:?", "_", text).replace("]", ""))
  if _PLAIN_NAME.fullmatch(text) and len(name.encode()) <= MAX_NAME_LENGTH:
    return name
  checksum = f"-{zlib.crc32(os.fsencode(text)):08x}"
  kept = name.encode()[: MAX_NAME_LENGTH - len(checksum)]
  return kept.decode(errors="ignore") + checksum


def check_writable(folder: pathlib.Path) -> None:
  """Creates a folder and checks that files can be written to it.

  Raises:
    errors.UserError: if the folder is not writable.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
  except OSError as error:
    raise errors.UserError(
      f"{folder}: cannot be written ({error.strerror}); name another --output"
    ) from error


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  """Writes a JSON object with `write_text`, lists of numbers on one line."""
  text = json.dumps(value, indent=2, sort_keys=True)
  # Strings never match, because their line breaks are escaped.
  text = re.sub(
    r"\[\n\s*([-+.\deE,\s]+?)\s*\]",
    lambda match: f"[{' '.join(match[1].split())}]",
    text,
  )
  write_text(path, text + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes text with `write_bytes`."""
  write_bytes(path, text.encode())


def write_bytes(path: pathlib.Path, content: bytes) -> None:
  """Writes a file atomically: a crash leaves the old or the new one."""
  temporary = path.with_name(path.name + ".incomplete")
  try:
    temporary.write_bytes(content)
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
