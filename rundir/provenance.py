"""Records what made a run: code revision, library versions and device."""

import hashlib
import json
import pathlib
import platform
import subprocess
from typing import Any

from absl import logging
import flax
import jax
import optax

from rundir import files

_PROJECT = pathlib.Path(__file__).resolve().parent.parent
_FILE = "made_by.json"


def record(workdir: pathlib.Path, step: int) -> None:
  """Adds a start at this step to made_by.json, unless the last was like it."""
  starts = read(workdir)
  start = {
    "git_revision": _git_revision(),
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
  try:
    starts = json.loads((workdir / _FILE).read_text())["starts"]
    return [{**start} for start in starts]
  except (OSError, ValueError, LookupError, TypeError):
    return []  # It is damaged, or the run is from an older version.


def warn_of_another_model(workdir: pathlib.Path) -> None:
  """Warns if model.py has changed since any start of the run."""
  ours = _model_sha256()
  if any(start.get("model_sha256") != ours for start in read(workdir)):
    logging.warning("model.py has changed since it trained %s", workdir)


def _model_sha256() -> str:
  return hashlib.sha256((_PROJECT / "model.py").read_bytes()).hexdigest()


def _git_revision() -> str | None:
  """Returns the commit, with -dirty if files have changed; None without git."""
  command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*"]
  try:
    return subprocess.run(
      [*command, "--dirty"],
      cwd=_PROJECT,
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return None
