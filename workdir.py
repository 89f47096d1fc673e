"""Run directories: their name, and the config they hold."""

import json
import math
import os
import pathlib
import re
from typing import Any

from absl import app
import ml_collections

_MAX_NAME_LENGTH = 200  # In bytes; file systems stop at 255.


def _at_least(minimum):
  return lambda value: value >= minimum, f"an integer of at least {minimum}"


_ACCEPTED = {
  "dataset": (bool, "the name of a data set, such as mnist"),
  "batch_size": _at_least(1),
  "eval_batch_size": _at_least(1),
  "num_steps": (lambda n: 1 <= n < 2**31, "an integer of 1 to 2147483647"),
  "learning_rate": (lambda x: 0 < x < math.inf, "a number above 0"),
  "dropout_rate": (lambda x: 0 <= x < 1, "a number from 0 to below 1"),
  "dtype": (("float32", "bfloat16").__contains__, "float32 or bfloat16"),
  "seed": (lambda n: 0 <= n < 2**32, "an integer of 0 to 4294967295"),
  "log_every_steps": _at_least(1),
  "log_probabilities_every_steps": _at_least(0),
  "eval_every_steps": _at_least(1),
  "checkpoint_every_steps": _at_least(1),
}


def validate(config: ml_collections.ConfigDict) -> None:
  """Raises app.UsageError where a value is impossible whatever the data."""
  for key, (is_accepted, accepted) in _ACCEPTED.items():
    if not is_accepted(config[key]):
      raise app.UsageError(
        f"config.{key}={config[key]}: accepted is {accepted}"
      )


def name(
  config: ml_collections.ConfigDict,
  base: ml_collections.ConfigDict,
  base_name: str,
) -> str:
  """Names a run after its experiment: `default,batch_size=256,seed=1`.

  Args:
    config: of the run.
    base: the config as its file has it, without overrides.
    base_name: the name of that file.

  Raises:
    app.UsageError: the name would be too long for a file system.
  """
  overrides = [
    f"{key}={config[key]}" for key in sorted(config) if config[key] != base[key]
  ]
  # Paths and split slices: a slash would nest, and Orbax fails on brackets.
  result = re.sub(r"[^\w.,=+%-]", "_", ",".join([base_name, *overrides]))
  if len(result.encode()) > _MAX_NAME_LENGTH:
    raise app.UsageError(
      f"too many overrides to name a run directory after: {result}; name one"
      " with --workdir"
    )
  return result


def create(
  workdir: str | os.PathLike, config: ml_collections.ConfigDict
) -> None:
  """Creates a run directory with its config.json, or checks the one there is.

  Raises:
    app.UsageError: it cannot be created, or holds another config.
  """
  workdir = pathlib.Path(workdir)
  if forbidden := set("[]*?") & set(str(workdir)):
    raise app.UsageError(
      f"--workdir={workdir}: {' '.join(sorted(forbidden))} cannot be in its"
      " path: Orbax would take it for a pattern"
    )
  path = workdir / "config.json"
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if path.exists():
      _check_same(path, config.to_dict())
    elif any(workdir.iterdir()):
      raise app.UsageError(
        f"--workdir={workdir}: has files but no config.json; accepted is a new"
        " or empty directory, or one of an earlier run"
      )
    else:
      write_json(path, config.to_dict())
  except OSError as error:
    raise app.UsageError(f"--workdir={workdir}: {error}") from error


def _check_same(path: pathlib.Path, config: dict[str, Any]) -> None:
  try:
    found = json.loads(path.read_text())
  except ValueError as error:
    raise app.UsageError(f"{path}: is not JSON: {error}") from error
  if not isinstance(found, dict):
    raise app.UsageError(f"{path}: holds {found!r}, not a config")
  differing = [
    f"{key} ({found.get(key, 'none')} there, {config.get(key, 'none')} here)"
    for key in sorted(found.keys() | config.keys())
    if found.get(key) != config.get(key)
  ]
  if differing:
    raise app.UsageError(
      f"{path.parent} holds a run of another config: {', '.join(differing)};"
      " name another --workdir"
    )


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  """Writes a JSON object with `write_text`."""
  write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file: after a crash, there is the old one or the new, whole."""
  temporary = path.with_name(path.name + ".incomplete")
  temporary.write_text(text)
  os.replace(temporary, path)
