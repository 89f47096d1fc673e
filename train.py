"""Trains the CNN of TensorFlow's "Guide to TF Layers" tutorial.

    python train.py --config=configs/default.py --config.batch_size=256

Run the same command again to resume; a complete run is only evaluated again.
The last line on stdout is the result as JSON.
"""

import contextlib
import json
import os
import pathlib
import signal
import sys
from typing import Any
from typing import NamedTuple
from typing import NoReturn

from absl import logging
import jax
import ml_collections

import augmentation
import calibration
import input_pipeline
from machine import compiling
from machine import console
from machine import devices
from machine import errors
from machine import processes
from machine import profiling
import optimizer
from rundir import checkpoints
from rundir import command_line
from rundir import files
from rundir import runs
import steps


def train_and_evaluate(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  profile: bool = False,
) -> dict[str, Any]:
  """Trains up to `config.num_steps` and evaluates on the test split.

  Resumes from the newest checkpoint in the run directory, if there is one.

  Args:
    config: see configs/default.py.
    workdir: the run directory.
    profile: whether to trace the steps between the first two logs.

  Returns:
    The accuracy and loss on the test split, and global_step. result.json holds
    the same.

  Raises:
    errors.UserError: if the config, the data or a directory is invalid, or the
      loss is not finite.
    SystemExit: if a signal of machine/signals.py arrived; the state was saved.
  """
  console.setup()
  with runs.opened_for_training(workdir, config) as run:
    tracer = profiling.Tracer(run.workdir, profile)
    with contextlib.closing(tracer):
      state = _train(config, run, tracer)
    evaluate = steps.evaluator(run.data.test, config.eval_batch_size)
    test, probabilities = evaluate(state)
    if signal_ := run.stop.check():
      _stop(signal_, config.num_steps)
    run.logger.evaluation(config.num_steps, "test", test)
    result = {**test, "global_step": config.num_steps}
    if processes.is_first():
      files.write_json(run.workdir / "result.json", result)
      _draw(run.workdir, config, run.data, state, probabilities)
  return result


def _draw(workdir: pathlib.Path, *args: Any) -> None:
  try:
    from report import pictures  # Importing matplotlib takes half a second.

    pictures.draw(workdir, *args)
  except Exception as error:  # It must not cost the result.
    logging.warning("Cannot draw %s: %s", workdir, error)


_NUM_SHOWN = 5  # Validation images whose probabilities are logged.


class Due(NamedTuple):
  """A step and what the host must do after it."""

  step: int
  show: bool
  log: bool
  evaluate: bool
  save: bool


def next_due(config: ml_collections.ConfigDict, step: int) -> Due:
  """Returns the next step after which the host has work to do, and the work.

  Args:
    config: provides `num_steps` and the intervals, `*_every_steps`.
    step: the number of steps taken so far, less than `num_steps`.
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
    multiples = (step - step % n + n for n in every.values() if n)
    following = min(config.num_steps, *multiples)
  due = {name: n > 0 and following % n == 0 for name, n in every.items()}
  if following == config.num_steps:
    due.update(log=True, evaluate=True, save=True)
  return Due(following, **due)


def _train(
  config: ml_collections.ConfigDict,
  run: runs.TrainingRun,
  tracer: profiling.Tracer,
) -> steps.TrainState:
  """Takes the remaining steps; logs, evaluates and saves along the way."""
  data, logger, manager = run.data, run.logger, run.manager
  train_steps = compiling.jit_loop(
    steps.train_on_next_batch,
    batch_size=config.batch_size,
    label_smoothing=config.label_smoothing,
    limits=augmentation.from_config(config),
  )
  validate = steps.evaluator(data.validation, config.eval_batch_size)
  shown = jax.tree.map(lambda x: x[:_NUM_SHOWN], data.validation)
  predict_shown = steps.evaluator(shown, _NUM_SHOWN)
  rngs = steps.rngs(config.seed)
  schedule = optimizer.schedule(config)
  step = start_step = int(run.state.step)
  order = input_pipeline.order_at(
    rngs.order, step, config.batch_size, data.train.labels.size
  )
  # Commit the arrays to the devices, like restored ones; otherwise JAX
  # recompiles for each mix of committed and uncommitted arrays.
  training = devices.replicate(steps.Training(run.state, order, run.since_log))
  while step < config.num_steps:
    due = next_due(config, step)
    training = train_steps(
      training, due.step - step, data.train, rngs.order, rngs.dropout
    )
    if step == start_step:  # Exclude compilation from the timing.
      schedule(step)
      jax.block_until_ready(training)
      logger.restart_clock(due.step)
    step = due.step
    logger.progress(step)
    signal_ = run.stop.check()  # Read once: a signal may arrive at any time.
    if not (any(due[1:]) or signal_):
      continue

    is_finite, metrics, rate = jax.device_get(  # In a single transfer.
      (steps.is_finite(training), training.metrics, schedule(step - 1))
    )
    if not is_finite:
      raise _not_finite(config, manager, step)
    if due.log:
      logger.train(step, metrics.means(), float(rate))
      # If the last log comes early, keep the sums: the run may be extended.
      if step % config.log_every_steps == 0:
        training = steps.reset_metrics(training)
      tracer.at_log()
    if due.show:
      logger.probabilities(step, shown.labels, predict_shown(training.state)[1])
    accuracy = None
    if due.evaluate:
      validation, probabilities = validate(training.state)
      accuracy = validation.get("accuracy")
      logger.evaluation(step, "validation", validation)
      fitted = jax.device_get((probabilities, data.validation.labels))
      logger.temperature(step, calibration.fit(*fitted))
    if due.save or signal_:
      manager.save(step, training.state, training.metrics, accuracy)
    if signal_:
      manager.wait()
      _stop(signal_, step)
    logger.restart_clock(step)  # Exclude all this from the timing.
  manager.wait()
  return training.state


def _not_finite(
  config: ml_collections.ConfigDict, manager: checkpoints.Manager, step: int
) -> errors.UserError:
  manager.wait()
  last = manager.latest_step()
  if last:
    kept = f"the checkpoint of step {last} is kept"
  else:
    kept = "no checkpoint was saved"
  return errors.UserError(
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
  with console.program():
    args = command_line.parse(sys.argv, __doc__)
    compiling.keep_freed_memory()
    with contextlib.redirect_stdout(sys.stderr):  # Only the result is printed.
      processes.join(
        args.coordinator_address, args.num_processes, args.process_id
      )
      devices.check()
      if not processes.is_first():
        logging.set_verbosity(logging.WARNING)
      result = train_and_evaluate(args.config, args.workdir, args.profile)
    if processes.is_first():
      print(json.dumps(result, sort_keys=True))


if __name__ == "__main__":
  main()
