"""Trains the CNN of TensorFlow's "Guide to TF Layers" tutorial.

    python train.py --config=configs/default.py --config.batch_size=256

Run the same command again to resume; a complete run is only evaluated again.
The last line on stdout is the result as JSON.
"""

from collections.abc import Sequence
import functools
import json
import os
import pathlib
import signal
import sys
from typing import Any
from typing import NamedTuple
from typing import NoReturn

from absl import app
from absl import logging
import jax
import ml_collections

import augmentation
import input_pipeline
from machine import compiling
from machine import console
from machine import devices
from machine import processes
from machine import profiling
from machine import signals
import optimizer
from report import network
from rundir import checkpoints
from rundir import command_line
from rundir import directory
from rundir import experiment
from rundir import files
from rundir import logs
from rundir import provenance
from rundir import runs
import steps


def train_and_evaluate(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  init_from: str | os.PathLike | None = None,
  profile_steps: int = 0,
) -> dict[str, Any]:
  """Trains up to `config.num_steps` and evaluates on the test split.

  Resumes from the newest checkpoint in the run directory, if there is one.

  Args:
    config: see configs/default.py.
    workdir: the run directory.
    init_from: a run directory; a new run starts from its last parameters.
    profile_steps: the number of steps to trace after the first log.

  Returns:
    The accuracy and loss on the test split, and global_step. result.json holds
    the same.

  Raises:
    app.UsageError: if the config, the data or a directory is invalid, or the
      loss is not finite.
    SystemExit: if a signal of machine/signals.py arrived; the state was saved.
  """
  console.setup()
  workdir = files.local_path(workdir)
  directory.check_path(workdir, directory.UNWRITABLE)
  init_from = init_from and files.local_path(init_from)
  if init_from and not checkpoints.all_steps(workdir):
    runs.open_run(init_from)  # Fail before creating anything.
  experiment.validate(config)
  data = input_pipeline.load(config)
  input_pipeline.check_batch_size(config, data)
  dataset = data.description()
  with processes.first_then_others("create the run directory"):
    directory.create(workdir, config, dataset)
  with directory.lock(workdir), signals.noted() as stop:
    logging.info("Run directory %s", workdir)
    init_from = provenance.check_init_from(
      workdir, init_from, bool(checkpoints.all_steps(workdir))
    )
    state, since_log = runs.restore_or_create(config, data, workdir, init_from)
    start_step = int(state.step)
    if processes.is_first():
      directory.update(workdir, config, dataset)
      provenance.record(
        workdir,
        start_step,
        own_keys=experiment.own_keys(config),
        init_from=init_from,
      )
    with (
      checkpoints.open_manager(workdir, start_step) as manager,
      logs.Logger(workdir, config, start_step) as logger,
    ):
      first_log = _following(start_step, config.log_every_steps)
      with profiling.Profiler(workdir, first_log, profile_steps) as profiler:
        state = _train(
          config, data, state, since_log, manager, logger, profiler, stop
        )
      test, _ = steps.evaluator(data.test, config.eval_batch_size)(state)
      if signal_ := stop.check():
        _stop(signal_, config.num_steps)
      logger.evaluation(config.num_steps, "test", test)
  result = {**test, "global_step": config.num_steps}
  if processes.is_first():
    files.write_json(workdir / "result.json", result)
    _draw_learning_curves(workdir, config.dropout_rate > 0)
  return result


def _draw_learning_curves(workdir: pathlib.Path, has_dropout: bool) -> None:
  from report import figures  # Importing matplotlib takes half a second.

  try:
    picture = figures.learning_curves(files.read_metrics(workdir), has_dropout)
    figures.save(picture, workdir / "learning_curve.png")
  except Exception as error:  # A failed plot must not cost the result.
    logging.warning("Cannot draw the learning curves: %s", error)


def _following(step: int, interval: int) -> int:
  """Returns the first multiple of `interval` after `step`."""
  return step - step % interval + interval


class Due(NamedTuple):
  """A step and what the host must do after it."""

  step: int
  show: bool
  log: bool
  evaluate: bool
  save: bool


def next_due(
  config: ml_collections.ConfigDict, step: int, stops: Sequence[int] = ()
) -> Due:
  """Returns the next step after which the host has work to do, and the work.

  Args:
    config: provides `num_steps` and the intervals, `*_every_steps`.
    step: the number of steps taken so far, less than `num_steps`.
    stops: other steps at which to return to the host.
  """
  every = {
    "show": config.log_probabilities_every_steps,
    "log": config.log_every_steps,
    "evaluate": config.eval_every_steps,
    "save": config.checkpoint_every_steps,
  }
  if compiling.takes_single_steps():  # Each step moves the progress bar.
    following = step + 1
  else:
    following = min(
      config.num_steps,
      *(_following(step, interval) for interval in every.values() if interval),
      *(stop for stop in stops if stop > step),
    )
  due = {name: n > 0 and following % n == 0 for name, n in every.items()}
  if following == config.num_steps:
    due.update(log=True, evaluate=True, save=True)
  return Due(following, **due)


def _train(
  config: ml_collections.ConfigDict,
  data: input_pipeline.Data,
  state: steps.TrainState,
  since_log: steps.Metrics,
  manager: checkpoints.Manager,
  logger: logs.Logger,
  profiler: profiling.Profiler,
  stop: signals.Stop,
) -> steps.TrainState:
  """Takes the remaining steps; logs, evaluates and saves along the way."""
  rngs = steps.rngs(config.seed)
  static = {
    "batch_size": config.batch_size,
    "label_smoothing": config.label_smoothing,
    "limits": augmentation.from_config(config),
  }
  # Takes many training steps in one dispatch, except on a CPU.
  train_steps = compiling.jit_loop(
    functools.partial(steps.train_on_next_batch, **static)
  )
  inspect = functools.partial(
    compiling.jit(functools.partial(network.inspect, **static)),
    examples=data.train,
    dropout_rng=rngs.dropout,
  )
  validate = steps.evaluator(data.validation, config.eval_batch_size)
  schedule = optimizer.schedule(config)
  step = start_step = int(state.step)
  training = steps.start_training(
    state,
    since_log,
    input_pipeline.order_at(
      rngs.order, step, config.batch_size, data.train.labels.size
    ),
    config.batch_size,
    len(data.class_names),
  )
  while step < config.num_steps:
    if profiler.at(step, training):
      logger.restart_clock(step)
    due = next_due(config, step, profiler.boundaries)
    training = train_steps(
      training, due.step - step, data.train, rngs.order, rngs.dropout
    )
    if step == start_step:  # Exclude compilation from the timing.
      jax.block_until_ready(training)
      logger.restart_clock(due.step)
    step = due.step
    logger.progress(step)
    signal_ = stop.check()  # Read once: a signal may arrive at any time.
    if not (any(due[1:]) or signal_):
      continue

    is_finite, metrics, *first = jax.device_get(  # In a single transfer.
      (
        steps.is_finite(training),
        training.metrics,
        training.labels,
        training.probabilities,
      )
    )
    if not is_finite:
      raise _not_finite(config, manager, step)
    if due.show:
      logger.probabilities(step, *first)
    if due.log:
      with devices.on_host():  # The rate that the last step used.
        rate = float(schedule(step - 1))
      logger.train(step, metrics.means(), rate)
      # If the last log comes early, keep the sums: the run may be extended.
      if step % config.log_every_steps == 0:
        training = steps.reset_metrics(training)
    accuracy = None
    if due.evaluate:
      validation, probabilities = validate(training.state)
      accuracy = validation.get("accuracy")
      logger.evaluation(step, "validation", validation)
      logger.usual_probability(step, probabilities)
      logger.inside(step, inspect, training.state, data, probabilities)
    if due.save or signal_:
      manager.save(step, training.state, training.metrics, accuracy)
    if signal_:
      manager.wait()
      _stop(signal_, step)
    if due.evaluate:
      logger.restart_clock(step)  # Exclude all this from the timing.
  manager.wait()
  return training.state


def _not_finite(
  config: ml_collections.ConfigDict, manager: checkpoints.Manager, step: int
) -> app.UsageError:
  manager.wait()
  last = manager.latest_step()
  if last:
    kept = f"the checkpoint of step {last} is kept"
  else:
    kept = "no checkpoint was saved"
  return app.UsageError(
    f"the loss is not finite at step {step} with"
    f" config.learning_rate={config.learning_rate}; {kept}"
  )


def _stop(signal_: signal.Signals, step: int) -> NoReturn:
  logging.info(
    "%s: stopped after step %d, which was saved; run the same command to"
    " resume",
    signal_.name,
    step,
  )
  sys.exit(128 + signal_)


def main() -> None:
  console.setup()
  with console.one_line_errors():
    args = command_line.parse(sys.argv, __doc__)
    with console.stdout_to_stderr():
      compiling.cache_compilations()
      compiling.keep_freed_memory()
      processes.join(
        args.coordinator_address, args.num_processes, args.process_id
      )
      devices.use_platform(args.platform)
      if not processes.is_first():
        logging.set_verbosity(logging.WARNING)
      result = train_and_evaluate(
        args.config, args.workdir, args.init_from, args.profile
      )
    if processes.is_first():
      print(json.dumps(result, sort_keys=True))


if __name__ == "__main__":
  main()
