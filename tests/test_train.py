"""Whole runs: what they write, how they resume, what the program prints."""

import json
import os
import shutil
import signal
import subprocess
import sys
from unittest import mock

from conftest import PROJECT
from conftest import assert_same_state
from conftest import files_of_at_most
from conftest import jit
from conftest import pixels
from conftest import read_events
from conftest import read_jsonl
from conftest import run_program
from conftest import run_train
from conftest import train_command
import jax
from matplotlib import image
import numpy as np
import optax
import pytest

import input_pipeline
from machine import compiling
from machine import devices
from machine import errors
from machine import signals
from model import CNN
import optimizer
from rundir import checkpoints
from rundir import directory
from rundir import logs
from rundir import runs
import steps
import train


@pytest.fixture
def no_pictures(monkeypatch):
  """Skips drawing, which takes longer than a tiny run."""
  monkeypatch.setattr(train, "_draw", lambda *args: None)


def restore(workdir, step=None):
  state = steps.create_train_state(jax.random.key(0), CNN(), optax.sgd(0.05))
  step = step or checkpoints.all_steps(workdir)[-1]
  return checkpoints.restore(workdir, step, state)[0]


def without_speed(records):
  speed = {"steps_per_second", "images_per_second"}
  return [{k: r[k] for k in r if k not in speed} for r in records]


def test_a_run_directory_is_complete(tiny_run, tiny_config):
  result = json.loads((tiny_run / "result.json").read_text())
  config = json.loads((tiny_run / "config.json").read_text())
  records = read_jsonl(tiny_run)
  assert config == tiny_config.to_dict()
  assert result["global_step"] == 20
  test = records[-1]
  assert test == {
    "step": 20,
    "test_loss": result["loss"],
    "test_accuracy": result["accuracy"],
  }
  trained = [r["step"] for r in records if "train_loss" in r]
  validated = [r["step"] for r in records if "validation_loss" in r]
  assert trained == [5, 10, 15, 20]
  assert validated == [4, 8, 12, 16, 20]
  histograms = [
    event.step
    for event in read_events(tiny_run)
    for value in event.summary.value
    if value.tag == "probabilities"
  ]
  assert histograms == [10, 20]
  shown = {
    (value.tag, event.step)
    for event in read_events(tiny_run)
    for value in event.summary.value
  }
  for name in (
    "learning_curve",
    "confusion_matrix",
    "mistakes",
    "calibration",
    "activations",
    "filters",
  ):
    assert (name, 20) in shown
    assert image.imread(tiny_run / f"{name}.png").std() > 0.05
  # It has learned something in 20 steps.
  losses = [r["train_loss"] for r in records if "train_loss" in r]
  assert losses[-1] < losses[0] - 0.3


def test_the_result_is_that_of_the_saved_state(tiny_run, mnist):
  examples = jax.tree.map(lambda x: x[:70], mnist.test)
  means, _ = steps.evaluator(examples, 70)(restore(tiny_run))
  result = json.loads((tiny_run / "result.json").read_text())
  assert means["accuracy"] == result["accuracy"]
  np.testing.assert_allclose(means["loss"], result["loss"], rtol=1e-5)


def test_each_log_covers_the_steps_since_the_last_one(tiny_run):
  state = restore(tiny_run)
  since_log = {
    step: int(checkpoints.restore(tiny_run, step, state)[1].num_examples)
    for step in (12, 16, 20)
  }
  # There is a log every 5 steps, and a step has 16 examples.
  assert since_log == {12: 2 * 16, 16: 1 * 16, 20: 0}


def test_parameters_order_and_dropout_use_separate_keys(tiny_run, tiny_config):
  key = jax.random.key(tiny_config.seed)
  init_rng, order_rng, dropout_rng = jax.random.split(key, 3)
  data = input_pipeline.load(tiny_config)
  training = devices.replicate(
    steps.Training(
      steps.create_train_state(init_rng, CNN(), optax.sgd(0.1)),
      input_pipeline.order_at(order_rng, 0, 16, data.train.labels.size),
      steps.Metrics.zero(10),
    )
  )
  run = compiling.jit_loop(steps.train_on_next_batch, batch_size=16)
  training = run(training, 12, data.train, order_rng, dropout_rng)
  assert_same_state(training.state, restore(tiny_run, 12))


def test_the_newest_and_the_best_checkpoints_are_kept(tiny_run):
  accuracy = {
    record["step"]: record["validation_accuracy"]
    for record in read_jsonl(tiny_run)
    if "validation_accuracy" in record
  }
  kept = {int(path.name) for path in (tiny_run / "checkpoints").glob("[0-9]*")}
  assert {12, 16, 20} <= kept
  assert max(accuracy.values()) in {accuracy[step] for step in kept}
  assert len(kept) <= 4


def stop_after(monkeypatch, save_step):
  """Makes a run crash right after it has saved at a step."""
  save = checkpoints.Manager.save

  class Crash(Exception):
    pass

  def crashing_save(manager, step, *args):
    save(manager, step, *args)
    if step == save_step:
      manager.wait()
      raise Crash

  monkeypatch.setattr(checkpoints.Manager, "save", crashing_save)
  return Crash


def test_a_state_saved_between_two_validations_is_not_the_best(
  tiny_config, tmp_path, monkeypatch
):
  tiny_config.checkpoint_every_steps = 2  # It is validated every 4.
  with pytest.raises(stop_after(monkeypatch, 6)):
    train.train_and_evaluate(tiny_config, tmp_path)
  assert checkpoints.all_steps(tmp_path) == [2, 4, 6]
  assert runs.open_run(tmp_path, "best").step == 4


@pytest.mark.usefixtures("no_pictures")
def test_a_resumed_run_equals_an_uninterrupted_one(
  tiny_run, tiny_config, tmp_path, monkeypatch
):
  stop = 8
  with monkeypatch.context() as patch, pytest.raises(stop_after(patch, stop)):
    train.train_and_evaluate(tiny_config, tmp_path)
  assert not (tmp_path / "result.json").exists()
  result = train.train_and_evaluate(tiny_config, tmp_path)
  assert result == json.loads((tiny_run / "result.json").read_text())
  assert_same_state(restore(tmp_path), restore(tiny_run))
  # Each line appears once, in order, with the same numbers, although the run
  # was stopped between two logs.
  assert without_speed(read_jsonl(tmp_path)) == without_speed(
    read_jsonl(tiny_run)
  )


def scored_by_numpy(logits, labels):
  """Returns the mean loss and the accuracy."""
  logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
  losses = np.log(np.exp(logits).sum(axis=1))
  losses -= logits[np.arange(len(labels)), labels]
  return losses.mean(), (logits.argmax(axis=1) == labels).mean()


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_recipe_resumes_exactly_and_scores_its_average(
  tiny_config, mnist, tmp_path, monkeypatch
):
  tiny_config.update(
    num_steps=8,
    log_every_steps=2,
    optimizer="adamw",
    weight_decay=0.02,
    schedule="one_cycle",
    warmup_steps=3,
    learning_rate=0.002,
    label_smoothing=0.1,
    ema_decay=0.9,
    augment_rotation=10.0,
    augment_elastic=8.0,
    clean_steps=2,
  )
  stopped, whole = tmp_path / "stopped", tmp_path / "whole"
  smooth_loss = mock.Mock(wraps=steps.smooth_loss)
  with monkeypatch.context() as patch, pytest.raises(stop_after(patch, 4)):
    patch.setattr(steps, "smooth_loss", smooth_loss)
    train.train_and_evaluate(tiny_config, stopped)
  assert smooth_loss.call_args.args[2] == 0.1
  result = train.train_and_evaluate(tiny_config, stopped)
  assert result == train.train_and_evaluate(tiny_config, whole)
  states = [runs.open_run(each).state for each in (stopped, whole)]
  assert_same_state(*states)
  records = without_speed(read_jsonl(whole))
  assert without_speed(read_jsonl(stopped)) == records
  rates = [r["learning_rate"] for r in records if "learning_rate" in r]
  schedule = optimizer.schedule(tiny_config)
  assert rates == [float(schedule(step - 1)) for step in (2, 4, 6, 8)]
  # At step 4, training images are still deformed; these are not.
  for step, split, examples, size in (
    (4, "validation", mnist.validation, 50),
    (8, "test", mnist.test, 70),
  ):
    params = runs.open_run(whole, str(step)).state.ema_params
    images = np.float32(pixels(examples)[:size]) / 255
    logits = jit(CNN().apply)({"params": params}, images)
    loss, accuracy = scored_by_numpy(logits, examples.labels[:size])
    (record,) = (
      r for r in records if r["step"] == step and f"{split}_loss" in r
    )
    assert record[f"{split}_accuracy"] == accuracy
    np.testing.assert_allclose(record[f"{split}_loss"], loss, rtol=1e-5)


def test_a_complete_run_is_only_evaluated_and_drawn(
  tiny_run, tiny_config, tmp_path, monkeypatch, caplog
):
  shutil.copytree(tiny_run, tmp_path / "run")
  (tmp_path / "run/result.json").write_text("{}")
  os.link(tmp_path / "run/result.json", tmp_path / "before")
  monkeypatch.setattr(steps, "train_step", None)  # Training would fail.
  draw = mock.Mock()
  monkeypatch.setattr(train, "_draw", draw)
  with caplog.at_level("INFO"):
    result = train.train_and_evaluate(tiny_config, tmp_path / "run")
  assert "Complete at step 20" in caplog.text
  assert draw.call_args.args[0] == tmp_path / "run"
  assert result == json.loads((tiny_run / "result.json").read_text())
  assert result == json.loads((tmp_path / "run/result.json").read_text())
  assert (tmp_path / "before").read_text() == "{}"  # Not overwritten.
  assert without_speed(read_jsonl(tmp_path / "run")) == without_speed(
    read_jsonl(tiny_run)
  )


@pytest.mark.usefixtures("no_pictures")
def test_a_run_without_its_checkpoints_starts_over_and_keeps_its_records(
  run, tiny_run, tiny_config, caplog
):
  before = [(run / x).read_text() for x in ("metrics.jsonl", "result.json")]
  for folder in ("before_restart", "before_restart"):
    shutil.rmtree(run / "checkpoints")
    train.train_and_evaluate(tiny_config, run)
    assert f"{run} has no checkpoint, so training starts over" in caplog.text
    kept = [run / folder / x for x in ("metrics.jsonl", "result.json")]
    assert [path.read_text() for path in kept] == before
  assert (run / "before_restart/metrics.jsonl_").exists()
  assert without_speed(read_jsonl(run)) == without_speed(read_jsonl(tiny_run))


@pytest.mark.usefixtures("no_pictures")
def test_another_seed_gives_another_run_and_the_step_is_compiled_once(
  tiny_config, tiny_run, tmp_path, monkeypatch
):
  """The same seed gives the same: see the tests of runs that resume."""
  train_step = mock.Mock(wraps=steps.train_step)
  monkeypatch.setattr(steps, "train_step", train_step)
  tiny_config.update(seed=1, num_steps=5)
  train.train_and_evaluate(tiny_config, tmp_path)
  assert train_step.call_count == 1
  losses = [
    next(r["train_loss"] for r in read_jsonl(run) if "train_loss" in r)
    for run in (tmp_path, tiny_run)
  ]
  assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.usefixtures("no_pictures")
def test_a_new_seed_compiles_nothing(tiny_config, tmp_path):
  compiled, minimum = [], "jax_persistent_cache_min_compile_time_secs"
  jax.monitoring.register_event_listener(
    lambda event, **_: compiled.append(event.endswith("cache_misses"))
  )
  tiny_config.num_steps = 2
  before = getattr(jax.config, minimum)
  jax.config.update(minimum, 0.0)
  try:
    for seed in (1, 2):
      compiled.clear()
      tiny_config.seed = seed
      train.train_and_evaluate(tiny_config, tmp_path / str(seed))
  finally:
    jax.config.update(minimum, before)
  assert compiled and not any(compiled)  # Other events are cache hits.


@pytest.mark.usefixtures("no_pictures")
def test_a_run_on_an_accelerator_is_the_same(
  tiny_run, tiny_config, tmp_path, monkeypatch
):
  """An accelerator takes all steps up to the next boundary in one dispatch."""
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  dues, step = [], 0
  while step < 20:
    dues.append(train.next_due(tiny_config, step))
    step = dues[-1].step
  # Logs come every 5 steps, validations every 4, probabilities every 10.
  assert [due.step for due in dues] == [4, 5, 8, 10, 12, 15, 16, 20]
  assert [due.step for due in dues if due.log] == [5, 10, 15, 20]
  assert [due.step for due in dues if due.evaluate] == [4, 8, 12, 16, 20]
  assert [due.step for due in dues if due.show] == [10, 20]
  tiny_config.num_steps = 8
  train.train_and_evaluate(tiny_config, tmp_path)
  expected = {r["step"]: r for r in read_jsonl(tiny_run) if "train_loss" in r}
  validated = {
    r["step"]: r for r in read_jsonl(tiny_run) if "validation_loss" in r
  }
  found = read_jsonl(tmp_path)
  assert [r["step"] for r in found if "train_loss" in r] == [5, 8]
  for record in found:
    for key, records in (
      ("train_loss", expected),
      ("validation_loss", validated),
    ):
      if key in record and record["step"] in records:
        # The two programs round differently.
        np.testing.assert_allclose(
          record[key], records[record["step"]][key], rtol=1e-4
        )


@pytest.mark.usefixtures("no_pictures")
def test_the_logged_speed_is_that_of_training_only(
  tiny_config, tmp_path, monkeypatch
):
  """The clock counts 1 second for a step and 1,000 for anything else."""
  now = 0.0

  def passes(seconds, result):
    nonlocal now
    now += seconds
    return result

  def timed(loop):
    to_compile = iter([1000])

    def run(carry, num_steps, *args):
      is_training = isinstance(carry, steps.Training)
      seconds = num_steps if is_training else 1000
      seconds += next(to_compile, 0)
      return passes(seconds, loop(carry, num_steps, *args))

    return run

  jit_loop, save = compiling.jit_loop, checkpoints.Manager.save
  schedule = optimizer.schedule

  def timed_schedule(config):
    to_compile, rate = iter([1000]), schedule(config)
    return lambda step: passes(next(to_compile, 0), rate(step))

  monkeypatch.setattr(
    compiling, "jit_loop", lambda *args, **kw: timed(jit_loop(*args, **kw))
  )
  monkeypatch.setattr(
    checkpoints.Manager, "save", lambda *args: passes(1000, save(*args))
  )
  monkeypatch.setattr(optimizer, "schedule", timed_schedule)
  monkeypatch.setattr(logs.time, "perf_counter", lambda: now)
  # The first log comes before the first evaluation and checkpoint.
  tiny_config.update(eval_every_steps=7, checkpoint_every_steps=7)
  train.train_and_evaluate(tiny_config, tmp_path)
  records = [r for r in read_jsonl(tmp_path) if "train_loss" in r]
  assert [r["step"] for r in records] == [5, 10, 15, 20]
  for record in records:
    assert record["steps_per_second"] == 1
    assert record["images_per_second"] == 16


def test_a_batch_larger_than_the_split_is_refused(tiny_config, tmp_path):
  tiny_config.batch_size = 101
  with pytest.raises(errors.UserError) as error:
    train.train_and_evaluate(tiny_config, tmp_path / "run")
  message = str(error.value)
  assert message.startswith("config.batch_size=101: must be at most 100")
  assert not (tmp_path / "run").exists()


def test_the_directory_of_another_run_is_refused(tiny_run, tiny_config):
  def content():
    return {path: path.read_bytes() for path in tiny_run.glob("*.json*")}

  before = content()
  tiny_config.seed = 1
  with pytest.raises(errors.UserError, match="another config: seed .0 there"):
    train.train_and_evaluate(tiny_config, tiny_run)
  assert content() == before


@pytest.mark.slow
def test_the_command_trains_resumes_and_needs_no_tensorflow(
  tiny_config, tmp_path
):
  # A TensorFlow that raises an error if it is imported.
  (tmp_path / "path/tensorflow").mkdir(parents=True)
  (tmp_path / "path/tensorflow/__init__.py").write_text("1 / 0")
  environment = {"PYTHONPATH": str(tmp_path / "path")}
  tiny_config.num_steps = 6
  args = train_command(tiny_config, "")[3:]
  first = run_train(*args, cwd=tmp_path, **environment)
  assert first.returncode == 0, first.stderr
  result = json.loads(first.stdout.splitlines()[-1])
  assert result["global_step"] == 6
  (workdir,) = (tmp_path / "runs").iterdir()
  assert workdir.name.startswith(
    "default,batch_size=16,learning_rate=0.1,num_steps=6,"
  )
  assert json.loads((workdir / "result.json").read_text()) == result
  again = run_program(
    *("train.py", f"--config={PROJECT}/configs/default.py", *args), cwd=tmp_path
  )
  assert again.stdout == first.stdout, again.stderr
  assert "Complete at step 6" in again.stderr
  assert "Traceback" not in first.stderr + again.stderr


def test_a_command_line_error_is_one_line(tmp_path):
  done = run_train("--config.batch_size=0", cwd=tmp_path)
  assert done.returncode == 1
  assert done.stdout == ""
  (line,) = done.stderr.splitlines()
  assert line.startswith("train.py: config.batch_size=0: must be an int")
  assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_repeatedly_stopped_run_equals_an_uninterrupted_one(
  tiny_config, tmp_path
):
  values = dict(num_steps=60, log_every_steps=7, checkpoint_every_steps=20)
  tiny_config.update(values, eval_every_steps=25)
  train.train_and_evaluate(tiny_config, tmp_path / "whole")
  flags = [f"--config.{key}={value}" for key, value in tiny_config.items()]
  for text, number, code in (
    ("Run directory", signal.SIGTERM, 143),  # While it compiles.
    ("step  7/60", signal.SIGINT, 130),
    ("step 25/60  validation", signal.SIGUSR1, 138),
    ("step 42/60", signal.SIGKILL, -9),
    ("step 60/60  test", None, 0),
  ):
    process = subprocess.Popen(
      [
        *(sys.executable, str(PROJECT / "train.py"), *flags),
        f"--workdir={tmp_path / 'stopped'}",
      ],
      stderr=subprocess.PIPE,
      text=True,
    )
    assert any(text in line for line in process.stderr), text
    if number:
      process.send_signal(number)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    if code > 0:
      last = stderr.splitlines()[-1]
      assert f"{number.name}: stopped after step" in last
      assert last.endswith("run the same command to resume")
  whole, stopped = (tmp_path / name for name in ("whole", "stopped"))
  assert_same_state(restore(stopped), restore(whole))
  assert without_speed(read_jsonl(stopped)) == without_speed(read_jsonl(whole))
  results = [(path / "result.json").read_text() for path in (whole, stopped)]
  assert results[0] == results[1]


@pytest.mark.usefixtures("no_pictures", "warnings_fail")
def test_a_run_stopped_during_its_last_evaluation_has_no_result(
  tiny_run, tiny_config, tmp_path, monkeypatch, caplog
):
  run = tmp_path / "run"
  ignored = shutil.ignore_patterns("20", "result.json")
  shutil.copytree(tiny_run, run, ignore=ignored)
  evaluator = steps.evaluator

  def interrupted(examples, batch_size):
    def evaluate(state):
      if examples.labels.size == 70:  # The test split.
        signal.raise_signal(number)
      return evaluator(examples, batch_size)(state)

    return evaluate

  # Once after training, and twice when only the evaluation is left.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    caplog.clear()
    with monkeypatch.context() as patch, caplog.at_level("INFO"):
      patch.setattr(steps, "evaluator", interrupted)
      with pytest.raises(SystemExit) as ended:
        train.train_and_evaluate(tiny_config, run)
    assert ended.value.code == 128 + number
    assert (
      f"{number.name}: stopped after step 20, which was saved; run the same"
      " command to resume"
    ) in caplog.messages
    assert_same_state(restore(run, 20), restore(tiny_run))
    assert not (run / "result.json").exists()
    assert "test_loss" not in (run / "metrics.jsonl").read_text()
  result = train.train_and_evaluate(tiny_config, run)
  assert result == json.loads((tiny_run / "result.json").read_text())
  assert without_speed(read_jsonl(run)) == without_speed(read_jsonl(tiny_run))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("stop", ["signal", "signal at the end", "bad loss"])
def test_only_what_is_on_disk_is_reported_as_saved(
  stop, tiny_config, tmp_path, monkeypatch, caplog
):
  tiny_config.num_steps = 2
  noted = iter([None] * 2 + [signal.SIGTERM])
  if stop == "signal":
    noted = iter([signal.SIGTERM])
  if stop == "bad loss":  # While step 1 is still being written.
    tiny_config.checkpoint_every_steps = 1
    monkeypatch.setattr(steps, "is_finite", lambda t: t.state.step < 2)
  monkeypatch.setattr(signals.Stop, "check", lambda self: next(noted))
  # A checkpoint is larger than this limit.
  with caplog.at_level("INFO"), files_of_at_most(10**6):
    with pytest.raises(errors.UserError) as error:
      train.train_and_evaluate(tiny_config, tmp_path)
  assert "a checkpoint cannot be saved" in str(error.value)
  assert "(steps kept: none)" in str(error.value)
  assert "which was saved" not in caplog.text
  assert not (tmp_path / "result.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tiny_config, tmp_path):
  tiny_config.learning_rate = 1e30
  with pytest.raises(errors.UserError) as error:
    train.train_and_evaluate(tiny_config, tmp_path / "run")
  assert str(error.value) == (
    "the loss is not finite at step 4 with config.learning_rate=1e+30;"
    " no checkpoint was saved"
  )
  assert not list((tmp_path / "run/checkpoints").glob("[0-9]*"))
  assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()


def test_only_one_process_can_lock_a_run_directory(tiny_config, tmp_path):
  path = tmp_path / "run"
  path.mkdir()
  holder = rf"run: process {os.getpid()} on \S+ is training there"
  for _ in range(2):  # It is free again.
    with directory.lock(path):
      with pytest.raises(errors.UserError, match=holder):
        with directory.lock(path):
          pass


def test_training_locks_its_directory(tiny_config, tmp_path):
  path = tmp_path / "run"
  dataset = input_pipeline.load(tiny_config).description()
  directory.create(path, tiny_config, dataset)
  with directory.lock(path):
    with pytest.raises(errors.UserError, match=f"process {os.getpid()} on"):
      train.train_and_evaluate(tiny_config, path)
  assert not (path / "checkpoints").exists()


def test_validation_uses_the_validation_split(tiny_run, tiny_config):
  record = next(
    r
    for r in read_jsonl(tiny_run)
    if r.get("validation_loss") and r["step"] == 20
  )
  data = input_pipeline.load(tiny_config)
  state = restore(tiny_run)
  means, probabilities = steps.evaluator(data.validation, 50)(state)
  assert record["validation_accuracy"] == means["accuracy"]
  np.testing.assert_allclose(
    record["validation_loss"], means["loss"], rtol=1e-6
  )
  histogram = next(
    value.histo
    for event in read_events(tiny_run)
    for value in event.summary.value
    if value.tag == "probabilities" and event.step == 20
  )
  np.testing.assert_allclose(
    histogram.sum_squares, np.square(probabilities[:5]).sum(), rtol=1e-5
  )
  # The first images of the test split would give another loss.
  other = jax.tree.map(lambda x: x[:50], data.test)
  other_means, _ = steps.evaluator(other, 50)(state)
  assert abs(other_means["loss"] - means["loss"]) > 1e-3
