"""Creates, checks and locks run directories."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import platform
import re
import stat
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

# TensorStore reads a backslash as a slash and accepts only UTF-8; in Python,
# other bytes are surrogates. When saving, Orbax reads []*? as a pattern.
_UNREADABLE = re.compile(r"[\\\ud800-\udfff]")
UNWRITABLE = re.compile(r"[][*?\\\ud800-\udfff]")


def create(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  dataset: dict[str, Any],
) -> None:
  """Creates a run directory, or checks that an existing one holds this run.

  Args:
    workdir: the run directory.
    config: the config of the run, for config.json.
    dataset: a description of the data, for dataset.json; with it, the run can
      be opened without the data.

  Raises:
    errors.UserError: if it cannot be created, or it holds another run.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    check_contained(workdir)
    if (workdir / "config.json").exists():
      _check_same(workdir, config, dataset)
    elif not processes.is_first():
      raise errors.UserError(
        f"--workdir={workdir}: process {jax.process_index()} does not see what"
        " process 0 wrote there; must be a directory that all processes share"
      )
    elif any(workdir.iterdir()):
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


def _check_same(workdir, config, dataset) -> None:
  path = workdir / "config.json"
  found = experiment.to_json(experiment.read(path))
  ours = experiment.to_json(config)
  if "init_from" not in files.read_json(path) and ours["init_from"]:
    # An older version recorded it elsewhere, and resumed without it too.
    starts = provenance.read(workdir) or [{}]
    found["init_from"] = str(starts[0].get("init_from", ""))
  done = checkpoints.all_steps(workdir)
  experiment.check_same(path, found, ours, steps_done=done[-1] if done else 0)
  path = workdir / "dataset.json"
  if path.exists():
    found = files.read_json(path)
    # Older runs have no checksums.
    older = (dataset.keys() - found.keys()) & {"crc32"}
    files.check_same(path, found, dataset, except_for=older)


def check_path(
  workdir: pathlib.Path, characters: re.Pattern = _UNREADABLE
) -> None:
  """Raises errors.UserError if checkpoints would not be saved at this path."""
  path = workdir.absolute().as_posix()
  if found := sorted(set(characters.findall(path))):
    raise errors.UserError(
      f"{path}: {' '.join(found)} cannot be in the path of a run directory:"
      " its checkpoints would be saved elsewhere or not at all"
    )


def check_contained(workdir: pathlib.Path) -> None:
  """Rejects a run directory with pipes, devices or links out of it.

  Raises:
    errors.UserError: if it has any; the message names the first.
  """
  root = workdir.resolve()
  for folder, folders, names in os.walk(workdir):
    for path in (pathlib.Path(folder, name) for name in (*folders, *names)):
      try:
        mode = path.lstat().st_mode
      except FileNotFoundError:
        continue  # A running train.py replaced it.
      if stat.S_ISLNK(mode) and not path.resolve().is_relative_to(root):
        raise errors.UserError(f"{path}: is a link out of the run directory")
      if not (stat.S_ISLNK(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise errors.UserError(f"{path}: is neither a file nor a directory")


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

  holder = workdir / ".lock_holder"
  with open(workdir / ".lock", "w") as file:  # Closing it releases the lock.
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
      # SMB raises PermissionError.
      name = holder.read_text() if holder.exists() else "another process"
      raise errors.UserError(f"{workdir}: {name} is training there") from error
    except OSError as error:
      logging.warning(
        "%s: its file system has no locks (%s); make sure that no other process"
        " trains there: it would go unnoticed and damage the run",
        *(workdir, error.strerror),
      )
    files.write_text(holder, f"process {os.getpid()} on {platform.node()}")
    yield
