"""Trains the CNN of TensorFlow's "Guide to TF Layers" tutorial.

    python train.py --config=configs/default.py --config.batch_size=256

The same command again resumes the run, and evaluates it once it is complete.
The last line on stdout is the result, as JSON.
"""

from collections.abc import Callable
import functools
import json
import os
import pathlib
import re
import runpy
import signal
import sys
from typing import Any
from typing import NamedTuple
from typing import NoReturn

from absl import app
from absl import flags
from absl import logging
import jax
import ml_collections
from ml_collections import config_flags

import augmentation
import input_pipeline
from machine import compiling
from machine import console
from machine import devices
from machine import processes
from machine import signals
import optimizer
from rundir import checkpoints
from rundir import directory
from rundir import experiment
from rundir import files
from rundir import logs
from rundir import provenance
from rundir import runs
import steps

_PROJECT = pathlib.Path(__file__).resolve().parent
_DEFAULT_CONFIG = str(_PROJECT / "configs/default.py")

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "The experiment; by default configs/default.py."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "The run directory; by default named after the experiment."
)
_PLATFORM = flags.DEFINE_enum(
  "platform",
  None,
  ["cpu", "gpu", "tpu"],
  "Where to train; by default on the best that JAX finds.",
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
  "coordinator_address",
  None,
  "HOST:PORT where process 0 of several listens; see docs/scaling.md.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "How many processes train together.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Which of them this one is, from 0.", lower_bound=0
)


def train_and_evaluate(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  init_from: str | os.PathLike | None = None,
) -> dict[str, Any]:
  """Trains to `config.num_steps` and evaluates the test split.

  Resumes from the newest checkpoint in the run directory, if there is one.

  Args:
    config: see configs/default.py.
    workdir: the run directory.
    init_from: the directory of a run whose last parameters to begin with.

  Returns:
    accuracy and loss on the test split, and global_step; also in result.json.

  Raises:
    app.UsageError: names what is wrong with the config, the data or the
      directory, or says that the loss is not a finite number.
    SystemExit: SIGINT or SIGTERM came, and the state was saved.
  """
  console.setup()
  workdir = pathlib.Path(workdir).expanduser()
  experiment.validate(config)
  data = input_pipeline.load(config)
  _check_batch_size(config, data)
  dataset = data.description()
  with processes.first_then_others("create the run directory"):
    directory.create(workdir, config, dataset)
  with directory.lock(workdir), signals.noted() as stop:
    logging.info("Run directory %s", workdir)
    init_from = provenance.init_from(workdir, init_from)
    state, since_log = _restore(config, data, workdir, init_from)
    start_step = int(state.step)
    if processes.is_first():
      directory.update(workdir, config, dataset)
      provenance.record(
        workdir,
        start_step,
        own_keys=experiment.own_keys(config),
        init_from=init_from and str(init_from),
      )
    with (
      checkpoints.open_manager(workdir, start_step) as manager,
      logs.Logger(workdir, config, start_step) as logger,
    ):
      state = _train(config, data, state, since_log, manager, logger, stop)
      test, _ = steps.evaluator(data.test, config.eval_batch_size)(state)
      if signal_ := stop.check():
        _stop(signal_, config.num_steps)
      logger.evaluation(config.num_steps, "test", test)
  result = {**test, "global_step": config.num_steps}
  if processes.is_first():
    files.write_json(workdir / "result.json", result)
    from report import figures  # matplotlib takes half a second.

    figures.save(
      figures.learning_curves(files.read_metrics(workdir)),
      workdir / "learning_curve.png",
    )
  return result


def _check_batch_size(
  config: ml_collections.ConfigDict, data: input_pipeline.Data
) -> None:
  train_size, num_devices = data.train.labels.size, devices.mesh().size
  if config.batch_size > train_size:
    raise app.UsageError(
      f"config.batch_size={config.batch_size}: must be at most {train_size},"
      f" the size of config.train_split={config.train_split}"
    )
  if config.batch_size % num_devices:
    lower = config.batch_size // num_devices * num_devices
    nearest = {max(lower, num_devices), lower + num_devices}
    raise app.UsageError(
      f"config.batch_size={config.batch_size}: {num_devices} devices do not"
      f" divide it; the nearest that work are {sorted(nearest)}"
    )


def _restore(
  config: ml_collections.ConfigDict,
  data: input_pipeline.Data,
  workdir: pathlib.Path,
  init_from: str | os.PathLike | None,
) -> tuple[steps.TrainState, steps.Metrics]:
  """The state to go on from, and the sums since the last log."""
  state = runs.create_state(
    _rngs(config).init, config, data.train.image_shape, data.class_names
  )
  logging.info(
    "%s parameters, %s training images, on %d x %s with jax %s",
    f"{sum(p.size for p in jax.tree.leaves(state.params)):,}",
    f"{data.train.labels.size:,}",
    devices.mesh().size,
    jax.devices()[0].device_kind,
    jax.__version__,
  )
  since_log = steps.Metrics.zero(len(data.class_names))
  if checkpoints.all_steps(workdir):
    provenance.warn_of_another_model(workdir)
    state, since_log = checkpoints.restore_newest(workdir, state, since_log)
    done = int(state.step) == config.num_steps
    logging.info(
      "%s step %d", "Complete at" if done else "Resuming after", state.step
    )
  elif init_from:
    state = runs.with_params_of(init_from, state)
    logging.info("Beginning with the parameters of %s", init_from)
  return state, since_log


class Rngs(NamedTuple):
  """The keys of the initial parameters, of the order, and of dropout."""

  init: jax.Array
  order: jax.Array
  dropout: jax.Array


def _rngs(config: ml_collections.ConfigDict) -> Rngs:
  return Rngs(*jax.random.split(jax.random.key(config.seed), 3))


class Due(NamedTuple):
  """A step, and what the host has to do after it."""

  step: int
  show: bool
  log: bool
  evaluate: bool
  save: bool


class Cadence:
  """When the host has something to do."""

  def __init__(self, config: ml_collections.ConfigDict):
    self._num_steps = config.num_steps
    self._every = {
      "show": config.log_probabilities_every_steps,
      "log": config.log_every_steps,
      "evaluate": config.eval_every_steps,
      "save": config.checkpoint_every_steps,
    }

  def next(self, step: int) -> Due:
    """Returns the next step at which something is due, and what it is."""
    intervals = [n for n in self._every.values() if n]
    following = min(step - step % n + n for n in intervals)
    if compiling.takes_single_steps():  # Then the bar moves at each of them.
      following = step + 1
    following = min(following, self._num_steps)
    due = {
      name: n > 0 and following % n == 0 for name, n in self._every.items()
    }
    if following == self._num_steps:
      due.update(log=True, evaluate=True, save=True)
    return Due(following, **due)


def _train(
  config: ml_collections.ConfigDict,
  data: input_pipeline.Data,
  state: steps.TrainState,
  since_log: steps.Metrics,
  manager: checkpoints.Manager,
  logger: logs.Logger,
  stop: signals.Stop,
) -> steps.TrainState:
  """Takes the steps that are left; logs, evaluates and saves on the way."""
  rngs, cadence = _rngs(config), Cadence(config)
  static = {
    "batch_size": config.batch_size,
    "label_smoothing": config.label_smoothing,
    "limits": augmentation.from_config(config),
  }
  train_steps = compiling.jit_loop(
    functools.partial(steps.train_on_next_batch, **static)
  )
  show_inside = _shows_inside(config, data, rngs, static, logger)
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
    due = cadence.next(step)
    training = train_steps(
      training, due.step - step, data.train, rngs.order, rngs.dropout
    )
    if step == start_step:  # Compiling is no training time.
      jax.block_until_ready(training)
      logger.restart_clock(due.step)
    step = due.step
    logger.progress(step)
    signal_ = stop.check()  # Asked once: one may come at any moment.
    if not (any(due[1:]) or signal_):
      continue

    is_finite, metrics, *first = jax.device_get(  # All in one fetch.
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
      with devices.on_host():  # The rate of the step before this count.
        rate = float(schedule(step - 1))
      logger.train(step, metrics.means(), rate)
      if step % config.log_every_steps == 0:  # The last log may come earlier.
        training = steps.reset_metrics(training)
    accuracy = None
    if due.evaluate:
      validation, probabilities = validate(training.state)
      accuracy = validation["accuracy"]
      logger.evaluation(step, "validation", validation)
      show_inside(step, training.state, probabilities)
    if due.save or signal_:
      checkpoints.save(
        manager, step, training.state, training.metrics, accuracy
      )
    if signal_:
      checkpoints.wait(manager)
      _stop(signal_, step)
    if due.evaluate:
      logger.restart_clock(step)  # All that was no training time.
  checkpoints.wait(manager)
  return training.state


def _shows_inside(
  config: ml_collections.ConfigDict,
  data: input_pipeline.Data,
  rngs: Rngs,
  static: dict[str, Any],
  logger: logs.Logger,
) -> Callable[[int, steps.TrainState, jax.Array], None]:
  """Returns a function that shows TensorBoard the inside of a network.

  It takes the step, the state, and the probabilities of the validation split.
  Nothing that fails there stops a run.
  """
  inspect = compiling.jit(functools.partial(steps.inspect, **static))
  validation = jax.device_get(data.validation)

  def show_inside(step, state, probabilities):
    try:
      inspection = inspect(state, data.train, rngs.dropout)
      logger.grad_norms(step, jax.device_get(inspection.grad_norms))
      if step == config.num_steps or logger.can_draw():
        learned = (probabilities, state.eval_params, inspection)
        logger.pictures(
          step, validation, *jax.device_get(learned), data.class_names
        )
    except Exception as error:
      logging.warning("The network of step %d is not shown: %s", step, error)

  return show_inside


def _not_finite(
  config: ml_collections.ConfigDict, manager: checkpoints.Manager, step: int
) -> app.UsageError:
  checkpoints.wait(manager)
  last = manager.latest_step()
  kept = f"the checkpoint of step {last} is kept" if last else "none was saved"
  return app.UsageError(
    f"the loss is not a finite number at step {step}, with"
    f" config.learning_rate={config.learning_rate}; {kept}"
  )


def _stop(signal_: signal.Signals, step: int) -> NoReturn:
  logging.info(
    "%s: stopped after step %d, which is saved; the same command resumes",
    signal_.name,
    step,
  )
  sys.exit(128 + signal_)


def _load_config(path: str) -> ml_collections.ConfigDict:
  """The config as its file has it, without overrides."""
  return runpy.run_path(path)["get_config"]()


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line; one line on stderr says what is wrong with it."""
  if not any(re.match("--?config(=|$)", arg) for arg in argv):
    argv.insert(1, f"--config={_DEFAULT_CONFIG}")
  try:
    args = flags.FLAGS(argv)
    list(_CONFIG.value)  # A file that could not be read raises here.
  except (flags.Error, OSError, AttributeError, KeyError, TypeError) as error:
    console.exit_with(_explain(str(error)))
  if args[1:]:
    console.exit_with(f"unexpected argument {args[1]}; options begin with --")
  return args


def _explain(error: str) -> str:
  """What absl and ml_collections say of a wrong flag, on one line."""
  config = _load_config(_DEFAULT_CONFIG)
  if match := re.match(r"""["'\\]+(\w+)["'\\]""", error):
    return f"unknown key config.{match[1]}; the keys are {', '.join(config)}"
  if match := re.match(
    r"flag --(config\.(\w+)=.*): (invalid literal|could not convert)", error
  ):
    accepted = {int: "an integer", float: "a number"}
    return f"{match[1]}: must be {accepted[type(config[match[2]])]}"
  return error.splitlines()[-1].strip()


def main(argv: list[str]) -> None:
  del argv
  console.setup()
  compiling.cache_compilations()
  compiling.keep_freed_memory()
  config = _CONFIG.value
  path = config_flags.get_config_filename(flags.FLAGS["config"])
  with console.one_line_errors():
    processes.join(
      _COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    )
    devices.use_platform(_PLATFORM.value)
    if not processes.is_first():
      logging.set_verbosity(logging.WARNING)
    workdir = _WORKDIR.value or pathlib.Path("runs") / experiment.name(
      config, _load_config(path), pathlib.Path(path).stem
    )
    result = train_and_evaluate(config, workdir)
    if processes.is_first():
      print(json.dumps(result, sort_keys=True))


if __name__ == "__main__":
  app.run(main, flags_parser=_parse_flags)
