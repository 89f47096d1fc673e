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

from absl import logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from machine import devices
from machine import errors
from machine import processes
from rundir import trees
from steps import Metrics
from steps import TrainState

_NUM_NEWEST = 3
_MAX_PENDING = 3  # States held in memory until they are written.
_BEST = "validation_accuracy"
# Parameters barely compress: a checkpoint that declares more than this many
# times the size of its files is not ours.
_MAX_COMPRESSION = 10


class DamagedError(Exception):
  """Raised if a checkpoint is not what was saved; the message says why."""


def all_steps(workdir: pathlib.Path) -> list[int]:
  """Returns the steps of the complete checkpoints, in ascending order."""
  return sorted(ocp.utils.checkpoint_steps(_folder(workdir)))


def best_step(workdir: pathlib.Path) -> int | None:
  """Returns the step with the best validation accuracy, if any has one."""
  found = _read_accuracies(workdir)
  validated = [(x, step) for step, x in found.items() if x is not None]
  return max(validated)[1] if validated else None


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
    state: arrays, or just their shapes and dtypes.
    since_log: the sums to return if the saved ones are for other metrics; with
      None, no sums are returned.

  Raises:
    DamagedError: if the checkpoint is not what was saved.
    trees.OtherNetworkError: if an array differs or is missing; the message
      names it.
  """
  path = _folder(workdir) / str(step)
  found = _read_metadata(path)
  trees.check_same_network(path, state, found.pop("state"))
  target = {"state": state, **found, "checksum": np.uint32(0)}
  _read_accuracy(workdir, step)
  _check_size(path, target)
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=devices.replicated()
    ),
    target,
  )
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      saved = checkpointer.restore(path / "default", target)
  except Exception as error:  # Orbax and TensorStore can raise anything.
    raise DamagedError(_reason(error)) from error
  checksum = saved.pop("checksum")
  # TensorStore does not notice a changed byte in an array.
  if checksum != _checksum(saved) or saved["state"].step != step:
    raise DamagedError("its checksum is wrong")
  return saved["state"], _resumed(saved["since_log"], since_log)


def _read_metadata(path: pathlib.Path) -> dict[str, Any]:
  """Returns the shapes and dtypes in a checkpoint, as nested dicts."""
  try:
    # A Checkpointer would warn about other metadata, which we do not save.
    metadata = ocp.StandardCheckpointHandler().metadata(path / "default")
    found = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), metadata.tree
    )
    if found.keys() != {"state", "since_log", "checksum"}:
      raise ValueError(f"the keys are {', '.join(found)}")
  except Exception as error:  # Orbax and the parser can raise anything.
    raise DamagedError(f"bad metadata: {_reason(error)}") from error
  return found


def _check_size(path: pathlib.Path, target: Any) -> None:
  """Raises DamagedError if the files are too small for their arrays."""
  declared = sum(
    math.prod(x.shape) * np.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(target)
  )
  size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
  if declared > _MAX_COMPRESSION * size:
    raise DamagedError(
      f"its files have {size} bytes, too few for {declared} bytes of arrays"
    )


def _resumed(
  found: dict[str, Any], since_log: Metrics | None
) -> Metrics | None:
  """Returns the saved sums if they are for the metrics that are logged now."""
  if since_log is None:
    return None
  if trees.shapes(found) != trees.shapes(since_log):
    logging.info("The metrics have changed: their sums start over at this step")
    return since_log
  return Metrics(**found)


def restore_newest(
  workdir: pathlib.Path, state: TrainState, since_log: Metrics | None = None
) -> tuple[TrainState, Metrics | None]:
  """Restores the newest undamaged checkpoint; see `restore`.

  Raises:
    errors.UserError: if all checkpoints are damaged.
    trees.OtherNetworkError: as in `restore`.
  """
  for step in reversed(all_steps(workdir)):
    try:
      return restore(workdir, step, state, since_log)
    except DamagedError as error:
      path = _folder(workdir) / str(step)
      logging.warning("%s is damaged and was skipped: %s", path, error)
      reason = f"{path}: {error}"
  raise errors.UserError(f"none of the checkpoints can be restored: {reason}")


class Manager:
  """Saves in a thread, because Orbax prepares saves in the foreground."""

  def __init__(self, manager: ocp.CheckpointManager):
    self.latest_step = manager.latest_step
    self._manager = manager
    self._thread = futures.ThreadPoolExecutor(max_workers=1)
    # Oldest first.
    self._saves: collections.deque[futures.Future] = collections.deque()
    self._is_checked = False

  def save(
    self,
    step: int,
    state: TrainState,
    since_log: Metrics,
    validation_accuracy: float | None,
  ) -> None:
    """Saves a state while training continues.

    Args:
      step: the state's step; the caller knows it without asking the device.
      state: copied before this returns, so the next step may donate it.
      since_log: the sums since the last log, so that the next log is exact.
      validation_accuracy: the state's accuracy, if it was measured.

    Raises:
      errors.UserError: if an earlier checkpoint could not be saved.
    """
    validated = validation_accuracy is not None
    metrics = {_BEST: validation_accuracy} if validated else {}
    saved = {"state": state, "since_log": since_log}
    with self._explain():
      if jax.process_count() > 1:  # All processes must call Orbax together.
        self._save(step, saved, metrics)
        if not self._is_checked:
          self._wait_and_check(step)
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

  def wait(self) -> None:
    """Waits until everything is saved.

    Raises:
      errors.UserError: if a checkpoint could not be saved.
    """
    with self._explain():
      while self._saves:
        self._saves.popleft().result()
      self._manager.wait_until_finished()

  def close(self) -> None:
    self._thread.shutdown()
    self._manager.close()

  def _save(self, step, saved, metrics):
    saved["checksum"] = _checksum(saved)
    self._manager.save(step, args=ocp.args.StandardSave(saved), metrics=metrics)

  def _save_and_wait(self, step, saved, metrics):
    self._save(step, saved, metrics)
    self._wait_and_check(step)  # Attributes a failure to this save.

  def _wait_and_check(self, step):
    """Waits for a save; checks the first one without reading its arrays."""
    self._manager.wait_until_finished()
    if not self._is_checked:
      workdir = pathlib.Path(self._manager.directory).parent
      try:
        _read_accuracy(workdir, step)
        path = _folder(workdir) / str(step)
        _check_size(path, _read_metadata(path))
      except DamagedError as error:
        raise errors.UserError(
          f"{workdir}: the checkpoint of step {step} was saved but is"
          f" incomplete, so training stops: {error}; name another --workdir"
        ) from error
      self._is_checked = True

  @contextlib.contextmanager
  def _explain(self):
    try:
      yield
    except errors.UserError:
      raise
    except Exception as error:  # Orbax and TensorStore can raise anything.
      kept = ", ".join(map(str, self._manager.all_steps())) or "none"
      raise errors.UserError(
        f"{self._manager.directory.parent}: a checkpoint cannot be saved, so"
        f" training stops (steps kept: {kept}): {_reason(error)}"
      ) from error


@contextlib.contextmanager
def open_manager(workdir: pathlib.Path, start_step: int) -> Iterator[Manager]:
  """Opens `workdir/checkpoints`, which keeps the newest three and the best.

  Moves damaged checkpoints to `workdir/damaged_checkpoints`.

  Args:
    workdir: the run directory.
    start_step: where training resumes; newer checkpoints were skipped.

  Raises:
    errors.UserError: if a checkpoint could not be saved.
  """
  _set_aside(workdir, _find_damaged(workdir, start_step))
  manager = Manager(_orbax_manager(_folder(workdir)))
  try:
    yield manager
    manager.wait()
  finally:
    with contextlib.suppress(Exception):  # Its errors were raised before.
      manager.close()


def _find_damaged(workdir: pathlib.Path, start_step: int) -> list[int]:
  """Returns the steps that were skipped or have unreadable metrics."""
  readable = _read_accuracies(workdir)
  return [
    step
    for step in all_steps(workdir)
    if step > start_step or step not in readable
  ]


def _set_aside(workdir: pathlib.Path, damaged: list[int]) -> None:
  """Moves checkpoints to where training does not write."""
  processes.sync("find the damaged checkpoints")
  if damaged and processes.is_first():
    folder = workdir / "damaged_checkpoints"
    folder.mkdir(exist_ok=True)
    for step in damaged:
      path = folder / str(step)
      while path.exists():
        path = path.with_name(f"{path.name}_")
      os.rename(_folder(workdir) / str(step), path)
      logging.warning("Moved the damaged checkpoint %d to %s", step, path)
  processes.sync("set aside the damaged checkpoints")


def _orbax_manager(folder: pathlib.Path) -> ocp.CheckpointManager:
  policy = preservation_policy.AnyPreservationPolicy(
    [
      preservation_policy.LatestN(_NUM_NEWEST),
      preservation_policy.BestN(get_metric_fn=_accuracy_or_less, n=1),
    ]
  )
  options = ocp.CheckpointManagerOptions(
    preservation_policy=policy,
    best_fn=_accuracy_or_less,  # Without it, Orbax saves no metrics.
    create=True,
    cleanup_tmp_directories=True,
    # Otherwise a failure leaves Orbax threads that block exit for minutes.
    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
  )
  return ocp.CheckpointManager(folder, options=options)


def _folder(workdir: pathlib.Path) -> pathlib.Path:
  return workdir.absolute() / "checkpoints"


def _accuracy_or_less(metrics: dict[str, float]) -> float:
  """Returns the validation accuracy, or -1 if it was not measured."""
  return metrics.get(_BEST, -1.0)


def _read_accuracies(workdir: pathlib.Path) -> dict[int, float | None]:
  """Returns the validation accuracy of each checkpoint that can be read."""
  found = {}
  for step in all_steps(workdir):
    with contextlib.suppress(DamagedError):
      found[step] = _read_accuracy(workdir, step)
  return found


def _read_accuracy(workdir: pathlib.Path, step: int) -> float | None:
  """Returns the validation accuracy saved with a checkpoint, if any."""
  try:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler("metrics")) as checkpointer:
      metrics = checkpointer.restore(_folder(workdir) / str(step) / "metrics")
    accuracy = metrics.get(_BEST)
    if accuracy is not None and not math.isfinite(accuracy):
      raise ValueError(f"{_BEST} is {accuracy}")
    return accuracy
  except Exception as error:  # Orbax and the parser can raise anything.
    raise DamagedError(f"bad metrics: {_reason(error)}") from error


def _checksum(tree: dict[str, TrainState | Metrics]) -> np.uint32:
  """Returns the CRC-32 of all values."""
  checksum = 0
  for leaf in jax.tree.leaves(jax.device_get(tree)):
    checksum = zlib.crc32(np.ascontiguousarray(leaf).data, checksum)
  return np.uint32(checksum)


def _reason(error: Exception) -> str:
  """Returns the first line of a message, without its middle if it is long."""
  line = (str(error).strip() or type(error).__name__).splitlines()[0]
  return line if len(line) < 200 else f"{line[:100]} ... {line[-100:]}"
