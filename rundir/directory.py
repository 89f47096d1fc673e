"""Run directories: their name, the config they hold, what was trained."""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import os
import pathlib
import platform
import stat
from typing import Any

from absl import app
import filelock
import jax
import ml_collections

from machine import processes
from rundir import files


def create(
  workdir: str | os.PathLike,
  config: ml_collections.ConfigDict,
  image_shape: Sequence[int],
  class_names: Sequence[str],
) -> None:
  """Creates a run directory, or checks that the one there is has this config.

  Besides config.json it gets dataset.json, so that `open_run` needs no data.

  Raises:
    app.UsageError: it cannot be created, or holds another config.
  """
  workdir = pathlib.Path(workdir)
  if forbidden := set("[]*?") & set(str(workdir)):
    raise app.UsageError(
      f"--workdir={workdir}: {' '.join(sorted(forbidden))} cannot be in its"
      " path: Orbax would take it for a pattern"
    )
  config = config.to_dict()
  dataset = {"image_shape": [*image_shape], "class_names": [*class_names]}
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    check_contained(workdir)
    if (workdir / "config.json").exists():
      _check_same(workdir / "config.json", config)
    elif not processes.is_first():
      raise app.UsageError(
        f"--workdir={workdir}: process {jax.process_index()} does not see what"
        " process 0 has written there; accepted is a directory that all share"
      )
    elif any(workdir.iterdir()):
      raise app.UsageError(
        f"--workdir={workdir}: has files but no config.json; accepted is a new"
        " or empty directory, or one of an earlier run"
      )
    else:
      files.write_json(workdir / "config.json", config)
    if (workdir / "dataset.json").exists():
      _check_same(workdir / "dataset.json", dataset)
    else:
      files.write_json(workdir / "dataset.json", dataset)
  except OSError as error:
    raise app.UsageError(f"--workdir={workdir}: {error}") from error


def _check_same(path: pathlib.Path, ours: dict[str, Any]) -> None:
  found = files.read_json(path)
  differing = [
    f"{key} ({found.get(key, 'none')} there, {ours.get(key, 'none')} here)"
    for key in sorted(found.keys() | ours.keys())
    if found.get(key) != ours.get(key)
  ]
  if differing:
    raise app.UsageError(
      f"{path.parent} holds a run of another {path.stem}:"
      f" {', '.join(differing)}; name another --workdir"
    )


def check_contained(workdir: pathlib.Path) -> None:
  """Checks that a run directory, maybe a stranger's, is files and no more.

  Raises:
    app.UsageError: names a link that leads out of it, a pipe or a device.
  """
  root = workdir.resolve()
  for folder, folders, names in os.walk(workdir):
    for path in (pathlib.Path(folder, name) for name in (*folders, *names)):
      try:
        mode = path.lstat().st_mode
      except FileNotFoundError:
        continue  # A running train.py replaced it.
      if stat.S_ISLNK(mode) and not path.resolve().is_relative_to(root):
        raise app.UsageError(f"{path}: is a link out of the run directory")
      if not (stat.S_ISLNK(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise app.UsageError(f"{path}: is neither a file nor a directory")


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps other processes from training in this run directory.

  The operating system lets go of the lock when its holder ends, however. Of
  several processes that train together, the first one holds it.

  Raises:
    app.UsageError: names the process that holds it.
  """
  if not processes.is_first():
    yield
    return
  holder = workdir / ".lock_holder"
  lock_file = filelock.FileLock(workdir / ".lock", timeout=0)
  try:
    lock_file.acquire()
  except filelock.Timeout as error:
    name = holder.read_text() if holder.exists() else "another process"
    raise app.UsageError(f"{workdir}: {name} is training there") from error
  try:
    files.write_text(holder, f"process {os.getpid()} on {platform.node()}")
    yield
  finally:
    lock_file.release()
