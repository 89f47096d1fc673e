"""Saves and restores a TrainState with Orbax."""

import collections
from collections.abc import Iterator
from concurrent import futures
import contextlib
import math
import os
import pathlib
from typing import Any
import zlib

from absl import app
from absl import logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from machine import devices
from machine import processes
from steps import Metrics
from steps import TrainState

_NUM_NEWEST = 3
_MAX_PENDING = 3  # Copies in memory of states that are not written yet.
_BEST = "validation_accuracy"
# Orbax compresses, but parameters hardly: a checkpoint that declares more than
# this many times the size of its files is none of ours.
_MAX_COMPRESSION = 10


class DamagedError(Exception):
  """A checkpoint is not what was saved; the message says why."""


class OtherNetworkError(app.UsageError):
  """A checkpoint is of another network than model.py's."""


def all_steps(workdir: pathlib.Path) -> list[int]:
  """The steps of the complete checkpoints, ascending."""
  return sorted(ocp.utils.checkpoint_steps(_folder(workdir)))


def best_step(workdir: pathlib.Path) -> int | None:
  """The step of the best validation accuracy, if one was validated."""
  accuracies = {}
  for step in all_steps(workdir):
    with contextlib.suppress(DamagedError):
      accuracies[step] = _read_accuracy(workdir, step)
  validated = [step for step, a in accuracies.items() if a is not None]
  return max(validated, key=lambda step: (accuracies[step], step), default=None)


def restore(
  workdir: pathlib.Path,
  step: int,
  state: TrainState,
  since_log: Metrics | None = None,
) -> tuple[TrainState, Metrics | None]:
  """Restores the state and the sums since the last log to the device.

  Args:
    workdir: the run directory.
    step: one of `all_steps`.
    state: arrays, or their shapes and dtypes alone.
    since_log: sums to begin with where those that were saved are not of the
      same metrics.

  Raises:
    DamagedError: what is there is not what was saved.
    OtherNetworkError: names the first array that the state has and the
      checkpoint has not, or the other way round.
  """
  path = _folder(workdir) / str(step)
  found = _read_metadata(path)
  check_same_network(path, state, found.pop("state"))
  target = {"state": state, **found}
  _read_accuracy(workdir, step)
  declared = sum(
    math.prod(x.shape) * np.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(target)
  )
  size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
  if declared > _MAX_COMPRESSION * size:
    raise DamagedError(f"its files have {size} bytes for {declared} of arrays")
  replicated = devices.replicated()
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      saved = checkpointer.restore(
        path / "default",
        jax.tree.map(
          lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
          target,
        ),
      )
  except Exception as error:  # Orbax and TensorStore raise anything.
    raise DamagedError(_reason(error)) from error
  checksum = saved.pop("checksum")
  # TensorStore does not notice when a byte of an array has changed.
  if checksum != _checksum(saved) or saved["state"].step != step:
    raise DamagedError("its checksum is wrong")
  return saved["state"], _resumed(saved["since_log"], since_log)


def _read_metadata(path: pathlib.Path) -> dict[str, Any]:
  """The shapes and dtypes of what a checkpoint holds, in nested dicts."""
  try:
    # Not a Checkpointer, which warns of other metadata that we do not save.
    metadata = ocp.StandardCheckpointHandler().metadata(path / "default")
    found = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), metadata.tree
    )
    if found.keys() != {"state", "since_log", "checksum"}:
      raise ValueError(f"it holds {', '.join(found)}")
  except Exception as error:  # Orbax and the parser raise anything.
    raise DamagedError(f"its metadata: {_reason(error)}") from error
  return found


def check_same_network(path: pathlib.Path, state: Any, found: Any) -> None:
  """Checks that two trees have arrays of the same names, shapes and dtypes.

  Args:
    path: of what was found, to name it.
    state: what it is to be.
    found: what it is.

  Raises:
    OtherNetworkError: names the first array that differs.
  """
  ours, theirs = _shapes(state), _shapes(found)
  for name in sorted(ours.keys() | theirs.keys()):
    if ours.get(name) != theirs.get(name):
      raise OtherNetworkError(
        f"{path} is of another network than model.py's: {name} is"
        f" {theirs.get(name, 'missing')} there and"
        f" {ours.get(name, 'missing')} here"
      )


def _shapes(tree: Any) -> dict[str, str]:
  """Maps the name of each array, such as params/conv1/kernel, to its shape."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): (
      f"{np.dtype(x.dtype).name} {list(x.shape)}"
    )
    for path, x in leaves
  }


def _resumed(
  found: dict[str, Any], since_log: Metrics | None
) -> Metrics | None:
  """The sums that were saved, where they are of the metrics that are logged."""
  if since_log is None:
    return None
  if _shapes(found) != _shapes(since_log):
    logging.info("Other metrics were logged: the next log begins them here")
    return since_log
  return Metrics(**found)


def restore_newest(
  workdir: pathlib.Path, state: TrainState, since_log: Metrics | None = None
) -> tuple[TrainState, Metrics | None]:
  """Restores the newest checkpoint that is not damaged; see `restore`.

  Raises:
    app.UsageError: all of them are damaged.
    OtherNetworkError: as `restore` does.
  """
  for step in reversed(all_steps(workdir)):
    try:
      return restore(workdir, step, state, since_log)
    except DamagedError as error:
      path = _folder(workdir) / str(step)
      logging.warning("%s is damaged and passed over: %s", path, error)
      reason = f"{path}: {error}"
  raise app.UsageError(f"no checkpoint there can be restored; {reason}")


class Manager:
  """Wraps Orbax's CheckpointManager so that saving does not hold up training.

  Orbax writes in the background, but prepares each save in the foreground.
  """

  def __init__(self, manager: ocp.CheckpointManager):
    self.directory = manager.directory
    self.all_steps = manager.all_steps
    self.latest_step = manager.latest_step
    self._manager = manager
    self._thread = futures.ThreadPoolExecutor(max_workers=1)
    self._saves = collections.deque()  # Oldest first.

  def save(
    self, step: int, saved: dict[str, Any], metrics: dict[str, float]
  ) -> None:
    """Saves in the background; the caller may donate the arrays afterwards.

    Raises:
      Exception: an earlier save failed.
    """
    if jax.process_count() > 1:  # All processes must call Orbax together.
      self._save(step, saved, metrics)
      return
    while len(self._saves) >= _MAX_PENDING or (
      self._saves and self._saves[0].done()
    ):
      self._saves.popleft().result()
    self._saves.append(
      self._thread.submit(
        self._save_and_wait, step, jax.device_get(saved), metrics
      )
    )

  def _save(self, step, saved, metrics):
    saved["checksum"] = _checksum(saved)
    self._manager.save(step, args=ocp.args.StandardSave(saved), metrics=metrics)

  def _save_and_wait(self, step, saved, metrics):
    self._save(step, saved, metrics)
    self._manager.wait_until_finished()  # So that a failure is this save's own.

  def wait_until_finished(self) -> None:
    """Waits for all saves, and raises what one of them raised."""
    while self._saves:
      self._saves.popleft().result()
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._thread.shutdown()
    self._manager.close()


@contextlib.contextmanager
def open_manager(workdir: pathlib.Path, start_step: int) -> Iterator[Manager]:
  """Opens `workdir/checkpoints`: the newest three and the best are kept.

  Newer ones than `start_step`, and others that Orbax cannot open, are moved to
  `workdir/damaged_checkpoints`.

  Args:
    workdir: the run directory.
    start_step: from which the training goes on.

  Raises:
    app.UsageError: a checkpoint could not be saved.
  """
  damaged = []
  for step in all_steps(workdir):
    try:
      _read_accuracy(workdir, step)
      if step > start_step:  # For it was passed over.
        damaged.append(step)
    except DamagedError:
      damaged.append(step)
  processes.sync("know the damaged checkpoints")
  with processes.first_goes_first("set the damaged checkpoints aside"):
    if processes.is_first():
      for step in damaged:
        _set_aside(workdir, step)
  policy = preservation_policy.AnyPreservationPolicy(
    [
      preservation_policy.LatestN(_NUM_NEWEST),
      preservation_policy.BestN(get_metric_fn=_goodness, n=1),
    ]
  )
  options = ocp.CheckpointManagerOptions(
    preservation_policy=policy,
    best_fn=_goodness,  # Without it, no metrics are saved for the policy.
    create=True,
    cleanup_tmp_directories=True,
    # Else, where that fails, Orbax's threads hold the process for minutes.
    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
  )
  manager = Manager(ocp.CheckpointManager(_folder(workdir), options=options))
  try:
    yield manager
    wait(manager)
  finally:
    with contextlib.suppress(Exception):  # What it raises was raised before.
      manager.close()


def save(
  manager: Manager,
  step: int,
  state: TrainState,
  since_log: Metrics,
  validation_accuracy: float | None,
) -> None:
  """Saves in the background.

  Args:
    manager: from `open_manager`.
    step: the state's own, which the caller knows without asking the device.
    state: it is copied before this returns, so that a step may donate it.
    since_log: the sums since the last log, so that the next one is exact.
    validation_accuracy: of this state, where it was measured.

  Raises:
    app.UsageError: an earlier checkpoint could not be saved.
  """
  metrics = {}
  if validation_accuracy is not None:
    metrics = {_BEST: validation_accuracy}
  saved = {"state": state, "since_log": since_log}
  with _explained(manager):
    manager.save(step, saved, metrics)


def wait(manager: Manager) -> None:
  """Waits until all is saved; app.UsageError says why something is not."""
  with _explained(manager):
    manager.wait_until_finished()


@contextlib.contextmanager
def _explained(manager: Manager) -> Iterator[None]:
  try:
    yield
  except Exception as error:  # Orbax and TensorStore raise anything.
    kept = ", ".join(map(str, manager.all_steps())) or "none"
    raise app.UsageError(
      f"{manager.directory.parent}: a checkpoint cannot be saved, training"
      f" stops; those of the steps {kept} are kept: {_reason(error)}"
    ) from error


def _folder(workdir: pathlib.Path) -> pathlib.Path:
  return workdir.absolute() / "checkpoints"


def _goodness(metrics: dict[str, float]) -> float:
  return metrics.get(_BEST, -1.0)  # Saved between two validations: not best.


def _read_accuracy(workdir: pathlib.Path, step: int) -> float | None:
  """The validation accuracy that a checkpoint was saved with, if any."""
  try:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler("metrics")) as checkpointer:
      metrics = checkpointer.restore(_folder(workdir) / str(step) / "metrics")
    accuracy = metrics.get(_BEST)
    if accuracy is not None and not math.isfinite(accuracy):
      raise ValueError(f"{_BEST} is {accuracy}")
    return accuracy
  except Exception as error:  # Orbax and the parser raise anything.
    raise DamagedError(f"its metrics: {_reason(error)}") from error


def _checksum(tree: dict[str, TrainState | Metrics]) -> np.uint32:
  """The CRC-32 of all values."""
  checksum = 0
  for leaf in jax.tree.leaves(jax.device_get(tree)):
    checksum = zlib.crc32(np.ascontiguousarray(leaf), checksum)
  return np.uint32(checksum)


def _set_aside(workdir: pathlib.Path, step: int) -> None:
  """Moves a checkpoint to where training does not write."""
  folder = workdir / "damaged_checkpoints"
  folder.mkdir(exist_ok=True)
  path = folder / str(step)
  while path.exists():
    path = path.with_name(f"{path.name}_")
  os.rename(_folder(workdir) / str(step), path)
  logging.warning("The damaged checkpoint of step %d is now %s", step, path)


def _reason(error: Exception) -> str:
  """The beginning and the end of what may be pages of nested messages."""
  line = (str(error).strip() or type(error).__name__).splitlines()[0]
  return line if len(line) < 200 else f"{line[:100]} ... {line[-100:]}"
