"""Saves and restores a TrainState with Orbax."""

from collections.abc import Iterator
from concurrent import futures
import contextlib
import json
import math
import pathlib
import zlib

from absl import logging
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from machine import devices
from machine import errors
from machine import processes
from rundir import files
from rundir import trees
from steps import Metrics
from steps import TrainState

_NUM_NEWEST = 3
_BEST = "validation_accuracy"
_NO_STATE = TrainState.create(apply_fn=None, params={}, tx=optax.identity())
_UNKNOWN = -1.0  # The accuracy of a state that was not validated.


def all_steps(workdir: pathlib.Path) -> list[int]:
  """Returns the steps of the complete checkpoints, in ascending order."""
  return sorted(ocp.utils.checkpoint_steps(_folder(workdir)))


def best_step(workdir: pathlib.Path) -> int | None:
  """Returns the step with the best validation accuracy, if any has one."""
  accuracy = _accuracies(workdir)
  validated = [(x, step) for step, x in accuracy.items() if x != _UNKNOWN]
  return max(validated)[1] if validated else None


def restore(
  workdir: pathlib.Path,
  which: str | int = "last",
  state: TrainState | None = None,
) -> tuple[TrainState, Metrics]:
  """Restores a state to the device, and the sums since its last log.

  Args:
    workdir: the run directory.
    which: "best" by validation accuracy; one of `all_steps`; or "last", the
      newest that is not damaged.
    state: arrays, or just their shapes and dtypes; with None, any network and
      optimizer is restored, but the result has no functions.

  Raises:
    errors.UserError: if there is no such checkpoint, or it is damaged.
    trees.OtherNetworkError: if an array differs or is missing; the message
      names it.
  """
  readable, damaged = _accuracies(workdir), []
  for step in _candidates(workdir, str(which)):
    path = _folder(workdir) / str(step)
    try:
      if step not in readable:
        raise ValueError("bad metrics")
      restored = _restore(path, state)
    except trees.OtherNetworkError:
      raise
    except Exception as error:  # Orbax and TensorStore can raise anything.
      damaged.append(f"{path} is damaged: {_reason(error)}")
      continue
    for each in damaged:
      logging.warning("%s; it was skipped", each)
    return restored
  raise errors.UserError("; ".join(damaged))


def _candidates(workdir: pathlib.Path, which: str) -> list[int]:
  """Returns the steps to try to restore, in this order."""
  saved = all_steps(workdir)
  if not saved:
    raise errors.UserError(
      f"{workdir}: has no complete checkpoint; train.py saves them"
    )
  if which == "last":
    return saved[::-1]
  if which == "best":
    if best := best_step(workdir):
      return [best]
    raise errors.UserError(
      f"{workdir}: no checkpoint has a validation accuracy"
    )
  if which in map(str, saved):
    return [int(which)]
  raise errors.UserError(
    f"--checkpoint={which}: must be last, best or one of the steps"
    f" {', '.join(map(str, saved))}"
  )


def _restore(
  path: pathlib.Path, state: TrainState | None
) -> tuple[TrainState, Metrics]:
  # A Checkpointer would warn about other metadata, which we do not save.
  found = ocp.StandardCheckpointHandler().metadata(path / "default").tree
  if state is None:
    state, target = _NO_STATE, found
  else:
    trees.check_same_network(path, state, found["state"])
    # Older checkpoints lack some fields.
    fields = {key: getattr(state, key) for key in found["state"]}
    target = {**found, "state": fields}
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=devices.replicated()
    ),
    target,
  )
  with ocp.StandardCheckpointer() as checkpointer:
    saved = checkpointer.restore(path / "default", target)
  saved["state"] = state.replace(**saved["state"])
  # TensorStore does not notice a changed byte in an array.
  checksum = saved.pop("checksum")
  # Older versions took the arrays in the order of the state's fields.
  orders = (_by_name(saved), jax.tree.leaves(saved))
  if saved["state"].step != int(path.name) or not any(
    checksum == _checksum(arrays) for arrays in orders
  ):
    raise ValueError("its checksum is wrong")
  return saved["state"], Metrics(**saved["since_log"])


class Manager:
  """Saves in a thread, because Orbax prepares saves in the foreground."""

  def __init__(self, folder: pathlib.Path):
    policy = preservation_policy.AnyPreservationPolicy(
      [
        preservation_policy.LatestN(_NUM_NEWEST),
        preservation_policy.BestN(get_metric_fn=_accuracy, n=1),
      ]
    )
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policy,
      best_fn=_accuracy,  # Without it, Orbax saves no metrics.
      create=True,
      cleanup_tmp_directories=True,
      # Otherwise a failure leaves Orbax threads that block exit for minutes.
      async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    self._manager = ocp.CheckpointManager(folder, options=options)
    self.latest_step = self._manager.latest_step
    self._thread = futures.ThreadPoolExecutor(max_workers=1)
    self._saving: futures.Future | None = None

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
    metrics = {}
    if validation_accuracy is not None:
      metrics[_BEST] = validation_accuracy
    saved = {"state": state, "since_log": since_log}
    if jax.process_count() > 1:  # All processes must call Orbax together.
      with self._explain():
        self._save(step, saved, metrics)
      return
    self.wait()  # No more than one copy of the state is held in memory.
    self._saving = self._thread.submit(
      self._save_and_wait, step, jax.device_get(saved), metrics
    )

  def wait(self) -> None:
    """Waits until everything is saved.

    Raises:
      errors.UserError: if a checkpoint could not be saved.
    """
    with self._explain():
      if self._saving:
        self._saving.result()
      self._manager.wait_until_finished()

  def close(self) -> None:
    self._thread.shutdown()
    self._manager.close()

  def _save(self, step, saved, metrics):
    saved["checksum"] = _checksum(_by_name(saved))
    self._manager.save(step, args=ocp.args.StandardSave(saved), metrics=metrics)

  def _save_and_wait(self, *args):
    self._save(*args)
    self._manager.wait_until_finished()  # Attributes a failure to this save.

  @contextlib.contextmanager
  def _explain(self):
    try:
      yield
    except Exception as error:  # Orbax and TensorStore can raise anything.
      kept = ", ".join(map(str, self._manager.all_steps())) or "none"
      raise errors.UserError(
        f"{self._manager.directory.parent}: a checkpoint cannot be saved, so"
        f" training stops (steps kept: {kept}): {_reason(error)}"
      ) from error


@contextlib.contextmanager
def open_manager(workdir: pathlib.Path, start_step: int) -> Iterator[Manager]:
  """Opens `workdir/checkpoints`, which keeps the newest three and the best.

  Training resumes at `start_step`: newer checkpoints were skipped as damaged.
  They move to `workdir/damaged_checkpoints`, as do others without metrics.

  Raises:
    errors.UserError: if a checkpoint could not be saved.
  """
  processes.sync("restore a checkpoint")  # Until then, all may read the others.
  if processes.is_first():
    readable = _accuracies(workdir)
    for step in all_steps(workdir):
      if step > start_step or step not in readable:
        path = _folder(workdir) / str(step)
        moved = files.set_aside(path, workdir / "damaged_checkpoints")
        logging.warning("Moved the damaged checkpoint %d to %s", step, moved)
  processes.sync("set aside the damaged checkpoints")
  manager = Manager(_folder(workdir))
  try:
    yield manager
    manager.wait()
  finally:
    with contextlib.suppress(Exception):  # Its errors were raised before.
      manager.close()


def _folder(workdir: pathlib.Path) -> pathlib.Path:
  return workdir.absolute() / "checkpoints"


def _accuracy(metrics: dict[str, float]) -> float:
  return metrics.get(_BEST, _UNKNOWN)


def _accuracies(workdir: pathlib.Path) -> dict[int, float]:
  """Returns the validation accuracy of each checkpoint that can be read."""
  found = {}
  for step in all_steps(workdir):
    path = _folder(workdir) / str(step) / "metrics/metrics"
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
      accuracy = _accuracy(json.loads(path.read_text()))
      if math.isfinite(accuracy):
        found[step] = accuracy
  return found


def _by_name(tree: dict[str, TrainState | Metrics]) -> list[jax.Array]:
  """Returns all arrays in the order of their names."""
  return [x for _, x in sorted(trees.named(tree), key=lambda pair: pair[0])]


def _checksum(arrays: list[jax.Array]) -> np.uint32:
  """Returns the CRC-32 of all values."""
  checksum = 0
  for array in jax.device_get(arrays):
    checksum = zlib.crc32(np.ascontiguousarray(array).data, checksum)
  return np.uint32(checksum)


def _reason(error: Exception) -> str:
  """Returns the first line of a message, without its middle if it is long."""
  line = (str(error).strip() or type(error).__name__).splitlines()[0]
  return line if len(line) < 200 else f"{line[:100]} ... {line[-100:]}"
