"""Records what made a run: code revision, library versions and device."""

import hashlib
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


def record(workdir: pathlib.Path, step: int) -> None:
  """Adds a start at this step to made_by.json, unless the last was like it."""
  starts = read(workdir)
  start = {
    **_git(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "flax": flax.__version__,
    "optax": optax.__version__,
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "model_sha256": _model_sha256(),
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
