from concurrent import futures
import os
import shutil
import threading

from conftest import assert_same_state
from conftest import files_of_at_most
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from machine import errors
from model import CNN
from rundir import checkpoints
from rundir import trees
import steps

ZERO = steps.Metrics.zero(10)


def state_at(step):
  """Returns a state with random parameters, seeded with the step."""
  state = steps.create_train_state(jax.random.key(step), CNN(), optax.sgd(0.1))
  return state.replace(step=jnp.int32(step))


def save_all(workdir, steps_and_accuracies, start_step=0):
  """Saves small states and returns the steps that are kept."""
  with checkpoints.open_manager(workdir, start_step) as manager:
    for step, accuracy in steps_and_accuracies:
      state = small_state(step)
      manager.save(step, state, ZERO, accuracy)
  return checkpoints.all_steps(workdir)


def small_state(step):
  return train_state.TrainState(
    step=jnp.int32(step),
    apply_fn=None,
    params={"small": step + jnp.arange(1000.0)},
    tx=None,
    opt_state=(),
  )


def test_a_restored_state_is_the_same_to_the_bit(tmp_path):
  state = state_at(3)
  with checkpoints.open_manager(tmp_path, 0) as manager:
    sums = {"loss": np.float32(1.5), "accuracy": np.int32(4)}
    since_log = steps.Metrics(np.int32(20), sums)
    manager.save(3, state, since_log, None)
  restored, since_log = checkpoints.restore(tmp_path, 3, state_at(0))
  assert_same_state(restored, state)
  assert (since_log.num_examples, since_log.sums) == (20, sums)


@pytest.mark.parametrize(
  ("params", "difference"),
  [
    (
      {"other": np.zeros(3, np.float32)},
      "params/other is missing there and float32 [3] here",
    ),
    ({}, "params/small is float32 [1000] there and missing here"),
    (
      {"small": np.zeros(9, np.float32)},
      "params/small is float32 [1000] there and float32 [9] here",
    ),
  ],
)
def test_a_checkpoint_of_another_network_is_refused_and_kept(
  params, difference, four_steps
):
  other = small_state(0).replace(params=params)
  for restore in (
    lambda: checkpoints.restore(four_steps, 4, other),
    lambda: checkpoints.restore(four_steps, "last", other),
  ):
    with pytest.raises(trees.OtherNetworkError) as error:
      restore()
    assert str(error.value) == (
      f"{four_steps}/checkpoints/4 is from another network or optimizer:"
      f" {difference}"
    )
  assert checkpoints.all_steps(four_steps) == [1, 2, 3, 4]


def test_keeps_the_newest_three_and_the_best(tmp_path):
  accuracies = [0.5, 0.9, 0.8, None, 0.7, 0.6, None]
  assert save_all(tmp_path, enumerate(accuracies, 1)) == [2, 5, 6, 7]
  later = save_all(tmp_path, [(8, 0.1)], start_step=7)
  assert later == [2, 6, 7, 8]
  assert checkpoints.best_step(tmp_path) == 2
  rest = [(9, 0.95), (10, 0.1), (11, 0.1), (12, 0.1)]
  assert save_all(tmp_path, rest, start_step=8) == [9, 10, 11, 12]
  assert checkpoints.best_step(tmp_path) == 9


def test_only_a_validated_checkpoint_can_be_the_best(tmp_path):
  assert checkpoints.best_step(tmp_path) is None
  for step, accuracy, best in ((1, None, None), (2, 0.1, 2), (3, None, 2)):
    save_all(tmp_path, [(step, accuracy)], start_step=step - 1)
    assert checkpoints.best_step(tmp_path) == best


def test_the_newest_of_equally_good_checkpoints_is_the_best(tmp_path):
  assert save_all(tmp_path, [(1, 0.9), (2, 0.9)]) == [1, 2]
  assert checkpoints.best_step(tmp_path) == 2
  later = [(3, 0.8), (4, 0.1), (5, 0.1)]
  assert save_all(tmp_path, later, start_step=2) == [2, 3, 4, 5]
  assert save_all(tmp_path, [(6, 0.9)], start_step=5) == [4, 5, 6]


def test_a_state_may_change_while_it_is_saved(tmp_path):
  """Saving is asynchronous: training does not wait for it."""
  state = small_state(1).replace(
    params=jnp.arange(1_000_000, dtype=jnp.float32)
  )
  overwrite = jax.jit(
    lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0
  )
  with checkpoints.open_manager(tmp_path, 0) as manager:
    manager.save(1, state, ZERO, None)
    state = overwrite(state)
    jax.block_until_ready(state)
  restored, _ = checkpoints.restore(tmp_path, 1, state)
  np.testing.assert_array_equal(restored.params, np.arange(1_000_000))


def data_file(step):
  """Returns the file that holds most of a checkpoint's arrays."""
  files = [file for file in step.rglob("*") if file.is_file()]
  return max(files, key=lambda file: file.stat().st_size)


def flip_a_byte(step):
  content = bytearray(data_file(step).read_bytes())
  content[len(content) // 2] ^= 1
  data_file(step).write_bytes(content)


def delete_half(step):
  files = sorted(file for file in step.rglob("*") if file.is_file())
  for file in files[::2]:
    file.unlink()


def replace_by(step, other):
  shutil.rmtree(step)
  if other:
    shutil.copytree(other, step)
  else:
    step.mkdir()


DAMAGES = {
  "a byte changed": flip_a_byte,
  "truncated": lambda step: os.truncate(data_file(step), 100),
  "array emptied": lambda step: os.truncate(data_file(step), 0),
  "half deleted": delete_half,
  "without arrays": lambda step: shutil.rmtree(step / "default"),
  "without metrics": lambda step: shutil.rmtree(step / "metrics"),
  "metrics emptied": lambda step: os.truncate(step / "metrics/metrics", 0),
  "metrics of another type": lambda step: (step / "metrics/metrics").write_text(
    '{"validation_accuracy": "0.5"}'
  ),
  "index emptied": lambda step: os.truncate(step / "default/manifest.ocdbt", 0),
  "metadata emptied": lambda step: os.truncate(step / "default/_METADATA", 0),
  "nothing left": lambda step: replace_by(step, None),
  "of another step": lambda step: replace_by(step, step.with_name("2")),
}


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
  """A run directory with checkpoints 1, 2, 3 and 4; 1 is the best."""
  workdir = tmp_path_factory.mktemp("four_steps")
  accuracies = [(1, 0.9), (2, 0.1), (3, None), (4, 0.2)]
  assert save_all(workdir, accuracies) == [1, 2, 3, 4]
  return workdir


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_skipped_and_kept(
  damage, four_steps, tmp_path, caplog
):
  workdir = tmp_path / "run"
  shutil.copytree(four_steps, workdir)
  damage(workdir / "checkpoints/4")

  def content(folder):
    return {
      path.relative_to(folder): path.read_bytes()
      for path in folder.rglob("*")
      if path.is_file()
    }

  damaged = content(workdir / "checkpoints/4")
  restored, _ = checkpoints.restore(workdir, "last", small_state(0))
  assert_same_state(restored, small_state(3))
  (warning,) = [r for r in caplog.records if r.levelname == "WARNING"]
  assert f"{workdir}/checkpoints/4 is damaged" in warning.getMessage()
  assert content(workdir / "checkpoints/4") == damaged  # Reading moves nothing.

  # Training resumes from step 3 and saves step 4 again.
  assert save_all(workdir, [(4, 0.3), (5, None)], start_step=3) == [1, 3, 4, 5]
  restored, _ = checkpoints.restore(workdir, "last", small_state(0))
  assert_same_state(restored, small_state(5))
  assert content(workdir / "damaged_checkpoints/4") == damaged


def test_a_step_damaged_twice_is_kept_twice(four_steps, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(four_steps, workdir)
  contents = []
  for accuracy in (0.3, 0.4):
    flip_a_byte(workdir / "checkpoints/4")
    contents.append(data_file(workdir / "checkpoints/4").read_bytes())
    assert save_all(workdir, [(4, accuracy)], start_step=3)[-1] == 4
  kept = (workdir / "damaged_checkpoints").iterdir()
  assert sorted(data_file(x).read_bytes() for x in kept) == sorted(contents)


def test_a_second_save_waits_for_the_first(tmp_path, monkeypatch):
  """At most one unsaved state is held in memory."""
  order, is_waiting = [], threading.Event()
  save, wait, copy = (
    checkpoints.Manager._save,
    checkpoints.Manager.wait,
    jax.device_get,
  )

  def save_later(manager, step, *args):
    assert is_waiting.wait(60)  # Nothing is written before somebody waits.
    save(manager, step, *args)
    order.append(f"saved {step}")

  def note_wait(manager):
    if order:
      is_waiting.set()
    wait(manager)

  def note_copy(tree):
    if isinstance(tree, dict):  # The state to save, not arrays to check.
      order.append(f"copied {tree['state'].step}")
    return copy(tree)

  monkeypatch.setattr(checkpoints.Manager, "_save", save_later)
  monkeypatch.setattr(checkpoints.Manager, "wait", note_wait)
  monkeypatch.setattr(jax, "device_get", note_copy)
  with checkpoints.open_manager(tmp_path, 0) as manager:
    for step in (1, 2):
      manager.save(step, small_state(step), ZERO, None)
  assert order == ["copied 1", "saved 1", "copied 2", "saved 2"]
  assert checkpoints.all_steps(tmp_path) == [1, 2]


def test_a_damaged_older_checkpoint_does_not_stop_training(
  four_steps, tmp_path
):
  workdir = tmp_path / "run"
  shutil.copytree(four_steps, workdir)
  os.truncate(workdir / "checkpoints/1/metrics/metrics", 0)
  assert checkpoints.best_step(workdir) == 4
  assert save_all(workdir, [(5, 0.1)], start_step=4) == [3, 4, 5]
  assert (workdir / "damaged_checkpoints/1/default").is_dir()


def test_nothing_is_touched_if_all_checkpoints_are_damaged(
  four_steps, tmp_path
):
  workdir = tmp_path / "run"
  shutil.copytree(four_steps, workdir)
  for step in checkpoints.all_steps(workdir):
    flip_a_byte(workdir / f"checkpoints/{step}")
  with pytest.raises(errors.UserError) as error:
    checkpoints.restore(workdir, "last", small_state(0))
  assert str(error.value).count("is damaged") == 4
  assert checkpoints.all_steps(workdir) == [1, 2, 3, 4]


def test_an_interrupted_save_is_ignored_and_cleaned_up(four_steps, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(four_steps, workdir)
  folder = workdir / "checkpoints"
  # Everything is written but not renamed; older Orbax adds the time.
  for name in ("5.orbax-checkpoint-tmp", "6.orbax-checkpoint-tmp-1700000000"):
    shutil.copytree(folder / "4", folder / name)
  assert checkpoints.all_steps(workdir) == [1, 2, 3, 4]
  restored, _ = checkpoints.restore(workdir, "last", small_state(0))
  assert_same_state(restored, small_state(4))
  assert save_all(workdir, [(7, None)], start_step=4) == [1, 3, 4, 7]
  assert {path.name for path in folder.iterdir()} == {"1", "3", "4", "7"}
  assert not (workdir / "damaged_checkpoints").exists()


def test_a_full_disk_is_reported_and_earlier_checkpoints_stay(tmp_path):
  large = small_state(2).replace(params=jnp.zeros(300_000).at[::2].set(1 / 3))
  save_all(tmp_path, [(1, None)])
  with pytest.raises(errors.UserError, match=r"\(steps kept: 1\): .*too large"):
    with checkpoints.open_manager(tmp_path, 1) as manager:
      with files_of_at_most(1000):
        manager.save(2, large, ZERO, None)
        manager.wait()
  restored, _ = checkpoints.restore(tmp_path, "last", small_state(0))
  assert_same_state(restored, small_state(1))
  assert save_all(tmp_path, [(2, None)], start_step=1) == [1, 2]
  folder = tmp_path / "checkpoints"
  assert {path.name for path in folder.iterdir()} == {"1", "2"}


def test_the_next_save_reports_that_the_last_one_failed(tmp_path):
  large = small_state(2).replace(params=jnp.zeros(300_000).at[::2].set(1 / 3))
  with pytest.raises(errors.UserError, match=r"cannot be saved.*too large"):
    with checkpoints.open_manager(tmp_path, 0) as manager:
      with files_of_at_most(1000):
        manager.save(2, large, ZERO, None)
        futures.wait([manager._saving])
      manager.save(3, small_state(3), ZERO, None)
      pytest.fail("The failed save was not reported.")


def test_a_folder_that_cannot_be_created_does_not_block_exit(tmp_path):
  save_all(tmp_path, [(1, None)])
  threads = set(threading.enumerate())
  with pytest.raises(
    errors.UserError, match="cannot be saved.*Not a directory"
  ):
    with checkpoints.open_manager(tmp_path, 1) as manager:
      (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
      (tmp_path / "checkpoints").touch()
      manager.save(2, small_state(2), ZERO, None)
      manager.wait()
  left = set(threading.enumerate()) - threads
  # At exit, Python would wait minutes for these threads to find the folder.
  assert not [x for x in left if type(x).__name__ == "_SignalingThread"]
