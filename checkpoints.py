"""Saves and restores a TrainState with Orbax."""

import pathlib

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from steps import TrainState

_NUM_NEWEST = 3
_BEST = "validation_accuracy"


def open_manager(workdir: pathlib.Path) -> ocp.CheckpointManager:
  """Opens `workdir/checkpoints`: the newest three and the best are kept."""
  policy = preservation_policy.AnyPreservationPolicy(
    [
      preservation_policy.LatestN(_NUM_NEWEST),
      preservation_policy.BestN(
        get_metric_fn=lambda metrics: metrics[_BEST],
        n=1,
        keep_checkpoints_without_metrics=False,
      ),
    ]
  )
  return ocp.CheckpointManager(
    workdir.absolute() / "checkpoints",
    options=ocp.CheckpointManagerOptions(
      preservation_policy=policy, cleanup_tmp_directories=True
    ),
  )


def save(
  manager: ocp.CheckpointManager,
  step: int,
  state: TrainState,
  validation_accuracy: float | None,
) -> None:
  """Saves the state in the background.

  Args:
    manager: from `open_manager`.
    step: the state's own, which the caller knows without asking the device.
    state: it is copied before this returns, so that a step may donate it.
    validation_accuracy: of this state, where it was measured.
  """
  metrics = None
  if validation_accuracy is not None:
    metrics = {_BEST: validation_accuracy}
  manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics)


def restore(
  manager: ocp.CheckpointManager, step: int, state: TrainState
) -> TrainState:
  """Restores a step, with the structure and the sharding of `state`."""
  abstract_state = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
  return manager.restore(step, args=ocp.args.StandardRestore(abstract_state))
