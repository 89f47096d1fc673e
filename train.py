"""Trains the CNN of TensorFlow's "Guide to TF Layers" tutorial.

    python train.py --config=configs/default.py --config.batch_size=256

The same command again resumes the run, and evaluates it once it is complete.
The last line on stdout is the result, as JSON.
"""

import functools
import json
import logging as python_logging
import pathlib
import re
import runpy
import sys
from typing import Any

from absl import app
from absl import flags
from absl import logging
import jax
import ml_collections
from ml_collections import config_flags

import checkpoints
import input_pipeline
import logger as logger_lib
import model as model_lib
import ops
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
      directory.
  """
  workdir = pathlib.Path(workdir)
  workdir_lib.validate(config)
  data = input_pipeline.load(config)
  train_size = data.train.labels.size
  if config.batch_size > train_size:
    raise app.UsageError(
      f"config.batch_size={config.batch_size}: accepted is at most {train_size},"
      f" the examples of config.train_split={config.train_split}"
    )
  workdir_lib.create(workdir, config)
  logging.info("Run directory %s", workdir)

  model = model_lib.CNN(
    num_classes=data.num_classes,
    dropout_rate=config.dropout_rate,
    image_shape=data.train.images.shape[1:],
  )
  data = jax.device_put(data)
  init_rng, order_rng, dropout_rng = jax.random.split(
    jax.random.key(config.seed), 3
  )
  state = steps.create_train_state(init_rng, model, config.learning_rate)
  logging.info(
    "%s parameters on %d %s device(s), %s training images, jax %s",
    f"{sum(p.size for p in jax.tree.leaves(state.params)):,}",
    jax.device_count(),
    jax.default_backend(),
    f"{train_size:,}",
    jax.__version__,
  )

  train_steps = ops.repeated(
    functools.partial(steps.train_on_next_batch, batch_size=config.batch_size)
  )
  evaluate_validation = steps.evaluator(data.validation, config.eval_batch_size)
  evaluate_test = steps.evaluator(data.test, config.eval_batch_size)

  with checkpoints.open_manager(workdir) as manager:
    step = manager.latest_step() or 0
    if step:
      state = checkpoints.restore(manager, step, state)
      is_complete = step == config.num_steps
      logging.info(
        "%s step %d", "Complete at" if is_complete else "Resuming after", step
      )
    order = input_pipeline.order_at(
      order_rng, step, config.batch_size, train_size
    )
    training = steps.start_training(
      state, order, config.batch_size, data.num_classes
    )
    with logger_lib.Logger(workdir, config, step) as logger:
      start_step = step
      while step < config.num_steps:
        num_steps = _steps_to_dispatch(config, step)
        training = train_steps(
          training, num_steps, data.train, order_rng, dropout_rng
        )
        step += num_steps
        logger.progress(step)
        if step - num_steps == start_step:  # The first dispatch compiles.
          jax.block_until_ready(training)
          logger.restart_clock(step)
        is_last = step == config.num_steps

        if _is_due(config.log_probabilities_every_steps, step):
          logger.probabilities(
            step, *jax.device_get((training.labels, training.probabilities))
          )
        if is_last or _is_due(config.log_every_steps, step):
          logger.train(step, training.metrics.means(), config.learning_rate)
          training = training.replace(metrics=steps.Metrics.zero())
        validation = {}
        if is_last or _is_due(config.eval_every_steps, step):
          validation = evaluate_validation(training.state)
          logger.evaluation(step, "validation", validation)
        if is_last or _is_due(config.checkpoint_every_steps, step):
          checkpoints.save(
            manager, step, training.state, validation.get("accuracy")
          )

      manager.wait_until_finished()
      test = evaluate_test(training.state)
      logger.evaluation(step, "test", test)
  result = {
    "accuracy": test["accuracy"],
    "global_step": step,
    "loss": test["loss"],
  }
  workdir_lib.write_json(workdir / "result.json", result)
  return result


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
    sys.exit(f"train.py: {_explain(str(error))}")
  if args[1:]:
    sys.exit(f"train.py: unexpected argument {args[1]}; options begin with --")
  return args


def _explain(error: str) -> str:
  """What absl and ml_collections say of a wrong flag, on one line."""
  config = _load_config(_DEFAULT_CONFIG)
  if match := re.match(r"""["'\\]+(\w+)["'\\]""", error):
    return f"unknown key config.{match[1]}; the keys are {', '.join(config)}"
  if match := re.match(r"flag --(config\.(\w+)=.*): ", error):
    accepted = {int: "an integer", float: "a number"}
    return f"{match[1]}: accepted is {accepted[type(config[match[2]])]}"
  return " ".join(error.splitlines()[0].split())


def _setup_logging() -> None:
  """Shows our own messages and everybody's warnings, with the time alone."""
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.setFormatter(
    python_logging.Formatter("%(asctime)s %(message)s", "%X")
  )
  handler.addFilter(
    lambda record: (
      record.levelno > python_logging.INFO
      or pathlib.Path(record.pathname).parent == _PROJECT
    )
  )


def main(argv: list[str]) -> None:
  del argv
  _setup_logging()
  ops.cache_compilations()
  config, path = (
    _CONFIG.value,
    pathlib.Path(flags.FLAGS["config"].config_filename),
  )
  try:
    workdir = _WORKDIR.value or pathlib.Path("runs") / workdir_lib.name(
      config, _load_config(str(path)), path.stem
    )
    result = train_and_evaluate(config, workdir)
  except app.UsageError as error:
    sys.exit(f"train.py: {error}")
  print(json.dumps(result, sort_keys=True))


if __name__ == "__main__":
  app.run(main, flags_parser=_parse_flags)
