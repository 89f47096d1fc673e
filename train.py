"""Trains the CNN of TensorFlow's "Guide to TF Layers" tutorial.

    python train.py --config=configs/default.py --config.batch_size=256

The same command again resumes the run, and evaluates it once it is complete.
The last line on stdout is the result, as JSON.
"""

from collections.abc import Callable
import contextlib
import functools
import json
import pathlib
import re
import runpy
import signal
import sys
from typing import Any
from typing import NoReturn

from absl import app
from absl import flags
from absl import logging
import jax
import ml_collections
from ml_collections import config_flags

import checkpoints
import input_pipeline
import logger as logger_lib
import ops
import processes
import sharding
import steps
import workdir as workdir_lib

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
  config: ml_collections.ConfigDict, workdir: str | pathlib.Path
) -> dict[str, Any]:
  """Trains to `config.num_steps` and evaluates the test split.

  Resumes from the newest checkpoint in the run directory, if there is one.

  Args:
    config: see configs/default.py.
    workdir: the run directory.

  Returns:
    accuracy and loss on the test split, and global_step; also in result.json.

  Raises:
    app.UsageError: names what is wrong with the config, the data or the
      directory, or says that the loss is not a finite number.
    SystemExit: SIGINT or SIGTERM came, and the state was saved.
  """
  workdir = pathlib.Path(workdir).expanduser()
  workdir_lib.validate(config)
  data = input_pipeline.load(config)
  train_size = data.train.labels.size
  if config.batch_size > train_size:
    raise app.UsageError(
      f"config.batch_size={config.batch_size}: accepted is at most"
      f" {train_size}, the size of config.train_split={config.train_split}"
    )
  num_devices = sharding.mesh().size
  if config.batch_size % num_devices:
    lower = config.batch_size // num_devices * num_devices
    nearest = {max(lower, num_devices), lower + num_devices}
    raise app.UsageError(
      f"config.batch_size={config.batch_size}: {num_devices} devices do not"
      f" divide it; the nearest that work are {sorted(nearest)}"
    )
  image_shape = data.train.image_shape
  with processes.first_goes_first("create the run directory"):
    workdir_lib.create(workdir, config, image_shape, data.class_names)
  with workdir_lib.lock(workdir), processes.noted_signals() as noted_signal:
    logging.info("Run directory %s", workdir)
    init_rng, _, _ = _rngs(config)
    state = workdir_lib.create_state(
      init_rng, config, image_shape, data.class_names
    )
    logging.info(
      "%s parameters, %s training images, on %d x %s with jax %s",
      f"{sum(p.size for p in jax.tree.leaves(state.params)):,}",
      f"{train_size:,}",
      num_devices,
      jax.devices()[0].device_kind,
      jax.__version__,
    )
    start_step, since_log = 0, steps.Metrics.zero()
    if checkpoints.all_steps(workdir):
      state, since_log = checkpoints.restore_newest(workdir, state)
      start_step = int(state.step)
      is_complete = start_step == config.num_steps
      done = "Complete at" if is_complete else "Resuming after"
      logging.info("%s step %d", done, start_step)
    with (
      checkpoints.open_manager(workdir, start_step) as manager,
      logger_lib.Logger(workdir, config, start_step) as logger,
    ):
      state = _train(
        config, data, state, since_log, manager, logger, noted_signal
      )
      test, _ = steps.evaluator(data.test, config.eval_batch_size)(state)
      if signal_ := noted_signal():
        _stop(signal_, config.num_steps)
      logger.evaluation(config.num_steps, "test", test)
  result = {**test, "global_step": config.num_steps}
  if processes.is_first():
    _write_result(workdir, result)
  return result


def _write_result(workdir: pathlib.Path, result: dict[str, Any]) -> None:
  """Writes the result and a picture of how it came about."""
  workdir_lib.write_json(workdir / "result.json", result)

  import pictures  # matplotlib takes half a second: not at the start.

  picture = pictures.learning_curves(workdir_lib.read_metrics(workdir))
  pictures.save(picture, workdir / "learning_curve.png")


def _rngs(config: ml_collections.ConfigDict) -> jax.Array:
  """The keys of the initial parameters, of the order and of dropout."""
  return jax.random.split(jax.random.key(config.seed), 3)


def _train(
  config: ml_collections.ConfigDict,
  data: input_pipeline.Data,
  state: steps.TrainState,
  since_log: steps.Metrics,
  manager: checkpoints.Manager,
  logger: logger_lib.Logger,
  noted_signal: Callable[[], signal.Signals | None],
) -> steps.TrainState:
  """Takes the steps that are left; logs, evaluates and saves on the way."""
  _, order_rng, dropout_rng = _rngs(config)
  static = {
    "batch_size": config.batch_size,
    "label_smoothing": config.label_smoothing,
    "augmentation": input_pipeline.augmentation(config),
  }
  train_steps = ops.repeated(
    functools.partial(steps.train_on_next_batch, **static)
  )
  learning_rate = steps.learning_rate(config)
  evaluate = steps.evaluator(data.validation, config.eval_batch_size)
  inspect = jax.jit(
    functools.partial(steps.inspect, **static),
    compiler_options=ops.compiler_options(),
  )
  validation_examples = jax.device_get(data.validation)
  step = start_step = int(state.step)
  order = input_pipeline.order_at(
    order_rng, step, config.batch_size, data.train.labels.size
  )
  training = steps.start_training(
    state, since_log, order, config.batch_size, len(data.class_names)
  )
  while step < config.num_steps:
    num_steps = _steps_to_dispatch(config, step)
    training = train_steps(
      training, num_steps, data.train, order_rng, dropout_rng
    )
    if step == start_step:  # Compiling is no training time.
      jax.block_until_ready(training)
      logger.restart_clock(step + num_steps)
    step += num_steps
    logger.progress(_finished_steps(step))
    is_last = step == config.num_steps
    signal_ = noted_signal()  # Asked once: one may come at any moment.
    shows = _is_due(config.log_probabilities_every_steps, step)
    logs = is_last or _is_due(config.log_every_steps, step)
    evaluates = is_last or _is_due(config.eval_every_steps, step)
    saves = is_last or signal_ or _is_due(config.checkpoint_every_steps, step)
    if shows or logs or evaluates or saves:
      is_finite, metrics, *first = jax.device_get(  # All in one fetch.
        (
          steps.is_finite(training),
          training.metrics,
          training.labels,
          training.probabilities,
        )
      )
      logger.progress(step)
      if not is_finite:
        raise _not_finite(config, manager, step)

    if shows:
      logger.probabilities(step, *first)
    if logs:
      rate = learning_rate
      if callable(rate):  # Evaluated at the count before this step.
        with _on_host():
          rate = float(rate(step - 1))
      logger.train(step, metrics.means(), rate)
      training = steps.reset_metrics(training)
    validation = {}
    if evaluates:
      validation, probabilities = evaluate(training.state)
      logger.evaluation(step, "validation", validation)
      inspection = inspect(training.state, data.train, dropout_rng)
      logger.grad_norms(step, jax.device_get(inspection.grad_norms))
      if is_last or logger.can_draw():
        learned = (probabilities, training.state.eval_params, inspection)
        logger.pictures(
          step, validation_examples, *jax.device_get(learned), data.class_names
        )
    if saves:
      accuracy = validation.get("accuracy")
      checkpoints.save(
        manager, step, training.state, training.metrics, accuracy
      )
    if signal_:
      checkpoints.wait(manager)
      _stop(signal_, step)
    if validation:
      logger.restart_clock(step)  # All that was no training time.
  checkpoints.wait(manager)
  return training.state


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


def _is_due(every_steps: int, step: int) -> bool:
  return every_steps > 0 and step % every_steps == 0


def _steps_to_dispatch(config: ml_collections.ConfigDict, step: int) -> int:
  """How many steps from here the device takes without the host."""
  if jax.default_backend() == "cpu":  # Dispatch is free, and the bar moves.
    return 1
  boundaries = [config.num_steps]
  for key in config:
    if key.endswith("_every_steps") and config[key]:
      boundaries.append((step // config[key] + 1) * config[key])
  return min(boundaries) - step


def _finished_steps(step: int) -> int:
  """Returns how many steps to show after dispatching this many.

  A CPU is still computing the last one. An accelerator takes all steps up to a
  boundary in one dispatch, and does not say how far it is.
  """
  return step - 1 if jax.default_backend() == "cpu" else step


def _on_host() -> contextlib.AbstractContextManager:
  """Computes on the host's CPU if JAX may use it, so nothing is fetched."""
  try:
    return jax.default_device(jax.local_devices(backend="cpu")[0])
  except RuntimeError:  # JAX_PLATFORMS names others only.
    return contextlib.nullcontext()


def _use_platform(platform: str | None) -> None:
  """Trains there, or says what there is: never silently somewhere else."""
  if platform == "cpu":
    jax.config.update("jax_platforms", "cpu")
  try:
    found = ", ".join(sorted({d.device_kind for d in jax.devices()}))
  except RuntimeError as error:  # Of JAX_PLATFORMS.
    raise app.UsageError(f"JAX finds no device: {error}") from error
  if platform and jax.default_backend() != platform:
    raise app.UsageError(
      f"--platform={platform}: JAX finds {jax.device_count()} x {found}, of"
      f" the platform {jax.default_backend()}"
    )


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
    logger_lib.exit_with(_explain(str(error)))
  if args[1:]:
    logger_lib.exit_with(
      f"unexpected argument {args[1]}; options begin with --"
    )
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
    return f"{match[1]}: accepted is {accepted[type(config[match[2]])]}"
  return error.splitlines()[-1].strip()


def main(argv: list[str]) -> None:
  del argv
  logger_lib.setup_console()
  ops.cache_compilations()
  ops.keep_freed_memory()
  config = _CONFIG.value
  path = config_flags.get_config_filename(flags.FLAGS["config"])
  with logger_lib.one_line_errors():
    processes.join(
      _COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    )
    _use_platform(_PLATFORM.value)
    if not processes.is_first():
      logging.set_verbosity(logging.WARNING)
    workdir = _WORKDIR.value or pathlib.Path("runs") / workdir_lib.name(
      config, _load_config(path), pathlib.Path(path).stem
    )
    result = train_and_evaluate(config, workdir)
    if processes.is_first():
      print(json.dumps(result, sort_keys=True))


if __name__ == "__main__":
  app.run(main, flags_parser=_parse_flags)
