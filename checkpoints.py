"""Saves and restores a TrainState with Orbax."""

import pathlib

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from steps import Metrics
from steps import TrainState

_NUM_NEWEST = 3
_BEST = "validation_accuracy"


def _goodness(metrics: dict[str, float]) -> float:
  return metrics.get(_BEST, -1.0)  # Saved between two validations: not best.


def open_manager(
  workdir: pathlib.Path, read_only: bool = False
) -> ocp.CheckpointManager:
  """Opens `workdir/checkpoints`: the newest three and the best are kept."""
  policy = preservation_policy.AnyPreservationPolicy(
    [
      preservation_policy.LatestN(_NUM_NEWEST),
      preservation_policy.BestN(get_metric_fn=_goodness, n=1),
    ]
  )
  options = ocp.CheckpointManagerOptions(
    preservation_policy=policy,
    best_fn=_goodness,  # Without it, no metrics are saved for the policy.
    create=not read_only,
    # What is being written may be a running train.py's.
    cleanup_tmp_directories=not read_only,
  )
  return ocp.CheckpointManager(
    workdir.absolute() / "checkpoints", options=options
  )


def save(
  manager: ocp.CheckpointManager,
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
  """
  metrics = {}
  if validation_accuracy is not None:
    metrics = {_BEST: validation_accuracy}
  saved = {"state": state, "since_log": since_log}
  manager.save(step, args=ocp.args.StandardSave(saved), metrics=metrics)


def restore(
  manager: ocp.CheckpointManager, step: int, state: TrainState
) -> tuple[TrainState, Metrics]:
  """Restores the state and the sums since the last log to the device.

  Args:
    manager: from `open_manager`.
    step: one of its steps.
    state: arrays, or their shapes and dtypes alone.
  """
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    {"state": state, "since_log": Metrics.zero()},
  )
  saved = manager.restore(step, args=ocp.args.StandardRestore(abstract))
  return saved["state"], saved["since_log"]


def best_step(manager: ocp.CheckpointManager) -> int | None:
  """The step of the best validation accuracy, if one was validated."""
  step = manager.best_step()
  if step is None or _BEST not in (manager.metrics(step) or {}):
    return None
  return step
