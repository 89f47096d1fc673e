"""Records what made a run: code revision, library versions and device."""

import hashlib
import os
import pathlib
import platform
import subprocess
from typing import Any

from absl import logging
import flax
import jax
import optax

from machine import errors
from rundir import files

_PROJECT = pathlib.Path(__file__).resolve().parent.parent
_FILE = "made_by.json"


def record(workdir: pathlib.Path, step: int, **more: Any) -> None:
  """Adds this start to made_by.json, unless it is like the last one.

  Args:
    workdir: the run directory.
    step: the step at which the run starts or resumes.
    **more: other JSON values to record.
  """
  starts = read(workdir)
  start = {
    **_git(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "flax": flax.__version__,
    "optax": optax.__version__,
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "model_sha256": _model_sha256(),
    **more,
  }
  if not starts or {**starts[-1], "step": step} != {**start, "step": step}:
    starts.append({"step": step, **start})
    files.write_json(workdir / _FILE, {"starts": starts})


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns what each start of a run recorded, oldest first."""
  path = workdir / _FILE
  if not path.exists():  # The run is from an older version.
    return []
  try:
    starts = files.read_json(path).get("starts")
  except errors.UserError as error:
    logging.warning("%s", error)
    return []
  if not isinstance(starts, list):
    return []
  return [start for start in starts if isinstance(start, dict)]


def check_init_from(
  workdir: pathlib.Path, given: str | os.PathLike | None, has_checkpoints: bool
) -> str | None:
  """Returns the run that provides the initial parameters of this one, if any.

  Args:
    workdir: the run directory.
    given: the directory of that run, as given for this start, or None.
    has_checkpoints: whether this run has any checkpoints.

  Raises:
    errors.UserError: if this run did not begin with those parameters.
  """
  named = str(files.local_path(given).absolute()) if given else None
  starts = read(workdir)
  if not (starts or has_checkpoints):
    return named
  began = starts[0].get("init_from") if starts else None
  name, known = (pathlib.Path(str(x)).name if x else "" for x in (named, began))
  # Compare only the names, because the directory may have moved. Once there are
  # checkpoints, the option is not needed.
  if name != known and (named or not has_checkpoints):
    raise errors.UserError(
      f"--init_from={named or ''}: {workdir} began with"
      f" {began or 'random parameters'}; keep that, or name another --workdir"
    )
  return named or (began and str(began))


def own_keys(workdir: pathlib.Path) -> set[str]:
  """Returns the keys that the run's config file added to the default ones."""
  return {
    key
    for start in read(workdir)
    if isinstance(start.get("own_keys"), list)
    for key in start["own_keys"]
    if isinstance(key, str)
  }


def warn_of_another_model(workdir: pathlib.Path) -> None:
  """Warns if model.py has changed since any start of the run."""
  ours = _model_sha256()
  if any(start.get("model_sha256") != ours for start in read(workdir)):
    logging.warning("model.py has changed since it trained %s", workdir)


def _model_sha256() -> str:
  return hashlib.sha256((_PROJECT / "model.py").read_bytes()).hexdigest()


def _git() -> dict[str, Any]:
  """Returns the revision and whether files have changed; None without git."""

  def run(*command):
    return subprocess.run(
      ["git", "-C", _PROJECT, *command],
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()

  try:
    revision = run("rev-parse", "HEAD")
    changed = bool(run("status", "--porcelain", "--untracked-files=no"))
  except (OSError, subprocess.CalledProcessError):
    return {"git_revision": None, "git_changed": None}
  return {"git_revision": revision, "git_changed": changed}
