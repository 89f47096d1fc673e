"""Creates, checks and locks run directories."""

from collections.abc import Collection
from collections.abc import Iterator
import contextlib
import os
import pathlib
import platform
import re
from typing import Any

from absl import logging
import jax
import ml_collections

from machine import errors
from machine import processes
from rundir import checkpoints
from rundir import experiment
from rundir import files
from rundir import provenance

# Orbax reads []*? as a pattern. TensorStore reads a backslash as a slash and
# accepts only UTF-8; in Python, other bytes are surrogates.
_IMPOSSIBLE = re.compile(r"[][*?\\\ud800-\udfff]")

# Shells and schedulers may write our output to the directory.
_LOGS = (".err", ".log", ".out", ".txt")


def create(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  dataset: dict[str, Any],
) -> None:
  """Creates a run directory, or checks that an existing one holds this run.

  `dataset` describes the data, so that the run can be opened without them.

  Raises:
    errors.UserError: if it cannot be created, or it holds another run.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if (workdir / "config.json").exists():
      _check_same(workdir, config, dataset)
    elif not processes.is_first():
      raise errors.UserError(
        f"--workdir={workdir}: process {jax.process_index()} does not see what"
        " process 0 wrote there; must be a directory that all processes share"
      )
    elif any(path.suffix not in _LOGS for path in workdir.iterdir()):
      raise errors.UserError(
        f"--workdir={workdir}: has files but no config.json; must be a new or"
        " empty directory, or that of an earlier run"
      )
    else:
      write(workdir, config, dataset)
  except OSError as error:
    raise errors.UserError(f"--workdir={workdir}: {error}") from error


def write(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  dataset: dict[str, Any],
) -> None:
  """Writes config.json and dataset.json if they are missing or differ."""
  for name, ours in (
    ("config.json", experiment.to_json(config)),
    ("dataset.json", dataset),
  ):
    path = workdir / name
    if not path.exists() or files.read_json(path) != ours:
      files.write_json(path, ours)


def _check_same(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  dataset: dict[str, Any],
) -> None:
  """Raises errors.UserError if the directory holds another run."""
  path = workdir / "config.json"
  found = experiment.to_json(experiment.read(path))
  ours = experiment.to_json(config)
  if "init_from" not in files.read_json(path) and ours["init_from"]:
    # An older version recorded it elsewhere, and resumed without it too.
    starts = provenance.read(workdir) or [{}]
    found["init_from"] = str(starts[0].get("init_from", ""))
  may_differ = {*experiment.INCIDENTAL}
  steps_done = max(checkpoints.all_steps(workdir), default=0)
  if ours["num_steps"] >= steps_done and not experiment.needs_num_steps(config):
    may_differ.add("num_steps")
  # Runs may move; the name of this one says no more either.
  names = {pathlib.Path(each["init_from"]).name for each in (found, ours)}
  if len(names) == 1:
    may_differ.add("init_from")
  _check_equal(path, found, ours, may_differ)
  path = workdir / "dataset.json"
  if path.exists():
    found = files.read_json(path)
    # Older runs have no checksums.
    _check_equal(path, found, dataset, {"crc32"} - found.keys())


def _check_equal(
  path: pathlib.Path,
  found: dict[str, Any],
  ours: dict[str, Any],
  may_differ: Collection[str],
) -> None:
  """Raises errors.UserError if a run's file differs, and names the keys."""
  differing = [
    f"{key} ({found.get(key, 'none')} there, {ours.get(key, 'none')} here)"
    for key in sorted(found.keys() | ours.keys())
    if found.get(key) != ours.get(key) and key not in may_differ
  ]
  if differing:
    raise errors.UserError(
      f"{path.parent} holds a run with another {path.stem}:"
      f" {', '.join(differing)}; name another --workdir, and add"
      f" --config.init_from={path.parent} to start from that run's parameters"
    )


def check_path(workdir: pathlib.Path) -> None:
  """Raises errors.UserError if checkpoints would not be saved at this path."""
  path = workdir.absolute().as_posix()
  if found := sorted(set(_IMPOSSIBLE.findall(path))):
    raise errors.UserError(
      f"{path}: {' '.join(found)} cannot be in the path of a run directory:"
      " its checkpoints would be saved elsewhere or not at all"
    )


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps other processes from training in this run directory.

  The operating system releases the lock whenever its holder ends. If several
  processes train together, the first one holds it. If the file system has no
  locks, a warning says so.

  Raises:
    errors.UserError: if another process holds it; the message names that one.
  """
  if not processes.is_first():
    yield
    return
  import fcntl  # Not on Windows, where training is not supported.

  with open(workdir / ".lock", "a+") as file:  # Closing it releases the lock.
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
      # SMB raises PermissionError.
      file.seek(0)
      name = file.read() or "another process"
      raise errors.UserError(f"{workdir}: {name} is training there") from error
    except OSError as error:
      logging.warning(
        "%s: its file system has no locks (%s); make sure that no other process"
        " trains there: it would go unnoticed and damage the run",
        *(workdir, error.strerror),
      )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    yield
