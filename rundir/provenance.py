"""What made a run: the revision of the code, the versions and the device."""

import hashlib
import os
import pathlib
import platform
import subprocess
from typing import Any

from absl import app
from absl import logging
import flax
import jax
import optax

from rundir import files

_PROJECT = pathlib.Path(__file__).resolve().parent.parent
_FILE = "made_by.json"


def record(workdir: pathlib.Path, step: int, **more: Any) -> None:
  """Adds to made_by.json what goes on with a run, if it is not what did.

  Args:
    workdir: the run directory.
    step: at which it goes on.
    **more: what else to keep, as JSON takes it.
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
  """What the starts of a run recorded, the first one first."""
  path = workdir / _FILE
  if not path.exists():  # The run is older than these records.
    return []
  match files.read_json(path):
    case {"starts": [dict(), *_] as starts}:
      return [start for start in starts if isinstance(start, dict)]
  return []


def init_from(
  workdir: pathlib.Path, given: str | os.PathLike | None
) -> str | None:
  """Returns the run whose parameters this run began with, or now begins with.

  Args:
    workdir: the run directory.
    given: the directory of that run; None where none is named.

  Raises:
    app.UsageError: another one is named than the run began with.
  """
  given = given and str(pathlib.Path(given).expanduser().absolute())
  starts = read(workdir)
  began = starts[0].get("init_from") if starts else given
  if given and given != began:
    raise app.UsageError(
      f"--init_from={given}: {workdir} began with"
      f" {began or 'random parameters'}; name another --workdir"
    )
  return began


def warn_of_another_model(workdir: pathlib.Path) -> None:
  """Says if model.py is no longer what trained the run."""
  starts = read(workdir)
  if starts and starts[-1].get("model_sha256") != _model_sha256():
    logging.warning("model.py is no longer what trained %s", workdir)


def _model_sha256() -> str:
  return hashlib.sha256((_PROJECT / "model.py").read_bytes()).hexdigest()


def _git() -> dict[str, Any]:
  """The revision, and whether files have changed since; None without git."""

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
