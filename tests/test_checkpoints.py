from conftest import assert_same_state
import jax
import jax.numpy as jnp
import numpy as np

import checkpoints
from model import CNN
import steps

ZERO = steps.Metrics.zero()


def state_at(step):
  """A state whose parameters are random but follow from the step."""
  state = steps.create_train_state(jax.random.key(step), CNN(), 0.1)
  return state.replace(step=jnp.int32(step))


def test_restores_to_the_bit(tmp_path):
  state = state_at(3)
  with checkpoints.open_manager(tmp_path) as manager:
    since_log = steps.Metrics(np.float32(1.5), np.int32(4), np.int32(20))
    checkpoints.save(manager, 3, state, since_log, None)
  with checkpoints.open_manager(tmp_path) as manager:
    restored, since_log = checkpoints.restore(manager, 3, state_at(0))
  assert_same_state(restored, state)
  assert (since_log.loss, since_log.num_examples) == (1.5, 20)


def test_keeps_the_newest_three_and_the_best(tmp_path):
  accuracies = [0.5, 0.9, 0.8, None, 0.7, 0.6, None]
  state = {"small": jnp.zeros(3)}
  with checkpoints.open_manager(tmp_path) as manager:
    for step, accuracy in enumerate(accuracies, 1):
      checkpoints.save(manager, step, state, ZERO, accuracy)
    manager.wait_until_finished()
    assert manager.all_steps() == [2, 5, 6, 7]
  with checkpoints.open_manager(tmp_path) as manager:  # In a later process.
    checkpoints.save(manager, 8, state, ZERO, 0.1)
    manager.wait_until_finished()
    assert manager.all_steps() == [2, 6, 7, 8]
    assert checkpoints.best_step(manager) == 2
    checkpoints.save(manager, 9, state, ZERO, 0.95)
    for step in (10, 11, 12):
      checkpoints.save(manager, step, state, ZERO, 0.1)
    manager.wait_until_finished()
    assert manager.all_steps() == [9, 10, 11, 12]
  with checkpoints.open_manager(tmp_path, read_only=True) as manager:
    assert (checkpoints.best_step(manager), manager.latest_step()) == (9, 12)


def test_the_best_is_one_that_was_validated(tmp_path):
  with checkpoints.open_manager(tmp_path) as manager:
    for step, accuracy, best in ((1, None, None), (2, 0.1, 2), (3, None, 2)):
      checkpoints.save(manager, step, {"small": jnp.zeros(3)}, ZERO, accuracy)
      manager.wait_until_finished()
      assert checkpoints.best_step(manager) == best


def test_a_state_may_change_while_it_is_saved(tmp_path):
  """Saving is asynchronous, and training does not wait for it."""
  state = {"params": jnp.arange(1_000_000, dtype=jnp.float32)}
  expected = np.arange(1_000_000)
  overwrite = jax.jit(
    lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0
  )
  with checkpoints.open_manager(tmp_path) as manager:
    checkpoints.save(manager, 1, state, ZERO, None)
    state = overwrite(state)
    jax.block_until_ready(state)
    manager.wait_until_finished()
    restored, _ = checkpoints.restore(manager, 1, state)
  np.testing.assert_array_equal(restored["params"], expected)
