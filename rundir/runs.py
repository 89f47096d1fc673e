"""Creates the state of a run, or opens a run from its directory alone."""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import os
import pathlib
from typing import NamedTuple

from absl import logging
import jax
import ml_collections
import numpy as np

import input_pipeline
from machine import compiling
from machine import devices
from machine import errors
from machine import processes
from machine import signals
from model import CNN
import optimizer
from rundir import checkpoints
from rundir import directory
from rundir import experiment
from rundir import files
from rundir import logs
from rundir import provenance
from rundir import trees
import steps


class Run(NamedTuple):
  """What a run directory holds.

  Attributes:
    config: its config.
    image_shape: (height, width, channels) of the images it was trained on.
    class_names: the names of the labels.
    state: the state after `step` steps.
    step: the step of the checkpoint.
    temperature: what to divide its logits by; see calibration.py.
  """

  config: ml_collections.ConfigDict
  image_shape: tuple[int, int, int]
  class_names: tuple[str, ...]
  state: steps.TrainState
  step: int
  temperature: float


def open_ensemble(
  workdirs: Sequence[str | os.PathLike], checkpoint: str = "last"
) -> list[Run]:
  """Opens runs whose probabilities can be averaged.

  Raises:
    errors.UserError: if a run cannot be opened, or was trained on other images
      or classes than the first; the message names it.
  """
  opened = [open_run(workdir, checkpoint) for workdir in workdirs]
  learned = [(r.config.dataset, r.image_shape, r.class_names) for r in opened]
  for workdir, what in zip(workdirs, learned, strict=True):
    if what != learned[0]:
      raise errors.UserError(
        f"--workdir={workdir}: was not trained on the images and classes of"
        f" {workdirs[0]}; all runs of an ensemble must share them"
      )
  return opened


def open_run(workdir: str | os.PathLike, checkpoint: str = "last") -> Run:
  """Opens a run from its directory alone.

  Args:
    workdir: the run directory.
    checkpoint: "last", "best" by validation accuracy, or a step.

  Raises:
    errors.UserError: if something is missing or wrong; the message names it.
  """
  devices.check()
  workdir = files.local_path(workdir)
  directory.check_path(workdir)
  config = experiment.read(workdir / "config.json")
  image_shape, class_names = _read_dataset(workdir / "dataset.json")
  provenance.warn_of_another_model(workdir)
  state = _shapes(workdir, config, image_shape, class_names)
  state, _ = checkpoints.restore(workdir, checkpoint, state)
  step = int(state.step)
  temperature = read_temperature(workdir, step)
  return Run(config, image_shape, class_names, state, step, temperature)


def read_temperature(workdir: pathlib.Path, step: int) -> float:
  """Returns the last valid temperature up to a step; older runs have 1."""
  fitted = [
    record["temperature"]
    for record in files.read_metrics(workdir)
    if record["step"] <= step and record.get("temperature", 0) > 0
  ]
  return float(fitted[-1]) if fitted else 1.0


class TrainingRun(NamedTuple):
  """A run directory to train in.

  Attributes:
    workdir: the run directory.
    data: the data to train on.
    state: the state to start or resume from.
    since_log: the sums of the metrics since the last log.
    manager: saves checkpoints.
    logger: logs metrics.
    stop: tells whether a signal has arrived.
  """

  workdir: pathlib.Path
  data: input_pipeline.Data
  state: steps.TrainState
  since_log: steps.Metrics
  manager: checkpoints.Manager
  logger: logs.Logger
  stop: signals.Stop


@contextlib.contextmanager
def opened_for_training(
  workdir: str | os.PathLike, config: ml_collections.ConfigDict
) -> Iterator[TrainingRun]:
  """Loads the data, then creates or reopens a run directory and locks it.

  Raises:
    errors.UserError: if the config, the data or the directory cannot be used,
      or the directory holds another run.
  """
  workdir = files.local_path(workdir)
  directory.check_path(workdir)
  experiment.check(config)
  data = input_pipeline.load(config)
  input_pipeline.check_batch_size(config, data)
  what = config, data.train.image_shape, data.class_names
  where = f"config.dataset={config.dataset}"
  _check_memory(_shapes(where, *what), data.train.image_shape)
  state = create_state(steps.rngs(config.seed).init, *what)
  if config.init_from and not checkpoints.all_steps(workdir):
    state = starting_from(config.init_from, state)
  dataset = data.description()
  with processes.first_then_others("create the run directory"):
    directory.create(workdir, config, dataset)
  with directory.lock(workdir), signals.noted() as stop:
    logging.info("Run directory %s", workdir)
    logging.info(
      "%s parameters, %s training images, on %d x %s with jax %s",
      f"{sum(p.size for p in jax.tree.leaves(state.params)):,}",
      f"{data.train.labels.size:,}",
      devices.mesh().size,
      jax.devices()[0].device_kind,
      jax.__version__,
    )
    state, since_log = _resume(workdir, config, state, len(data.class_names))
    step = int(state.step)
    if processes.is_first():
      directory.write(workdir, config, dataset)
      provenance.record(workdir, step)
    with (
      checkpoints.open_manager(workdir, step) as manager,
      logs.Logger(workdir, config, step) as logger,
    ):
      yield TrainingRun(workdir, data, state, since_log, manager, logger, stop)


def _resume(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  state: steps.TrainState,
  num_classes: int,
) -> tuple[steps.TrainState, steps.Metrics]:
  """Returns the newest saved state, if any, and the sums since the last log."""
  since_log = steps.Metrics.zero(num_classes)
  if checkpoints.all_steps(workdir):
    provenance.warn_of_another_model(workdir)
    state, saved = checkpoints.restore(workdir, "last", state)
    if trees.shapes(saved) == trees.shapes(since_log):
      since_log = saved
    else:
      logging.info("The metrics have changed: their sums start over")
    done = int(state.step) == config.num_steps
    logging.info(
      "%s step %d", "Complete at" if done else "Resuming after", state.step
    )
  return state, since_log


def load_test(
  config: ml_collections.ConfigDict,
  workdirs: Sequence[pathlib.Path],
  opened: Sequence[Run],
) -> input_pipeline.Data:
  """Loads the test split, with the labels of the runs.

  Classes are matched by their names; some may be missing.

  Raises:
    errors.UserError: if the data cannot be read, or the runs cannot be scored
      on them.
  """
  run = opened[0]
  data = input_pipeline.load(config, ["test"])
  for workdir, each in zip(workdirs, opened, strict=True):
    _warn_of_other_data(workdir, each.config, config, data.crc32["test"])
  shape, names = data.test.image_shape, data.class_names
  what = f"config.dataset={config.dataset}: has "
  if shape != run.image_shape:
    raise errors.UserError(
      f"{what}images of shape {list(shape)}; must have the shape"
      f" {list(run.image_shape)}, as in training"
    )
  if not {*names} <= {*run.class_names}:
    raise errors.UserError(
      f"{what}the classes {', '.join(names)}; the run has"
      f" {', '.join(run.class_names)}; all must be among these"
    )
  indices = np.array([run.class_names.index(x) for x in names], np.int32)
  labels = devices.replicate(indices[data.test.labels])
  splits = {"test": data.test.replace(labels=labels)}
  return data._replace(class_names=run.class_names, splits=splits)


def _warn_of_other_data(
  workdir: pathlib.Path,
  own: ml_collections.ConfigDict,
  config: ml_collections.ConfigDict,
  crc32: int,
) -> None:
  """Warns if a run's own test split has changed since training."""
  if (config.dataset, config.test_split) != (own.dataset, own.test_split):
    return
  path = workdir / "dataset.json"
  match files.read_json(path):
    case {"crc32": {"test": int(recorded)}} if recorded != crc32:
      logging.warning(
        "%s of %s has checksum %d but had %d in %s: its examples have changed",
        *(config.test_split, config.dataset, crc32, recorded, path),
      )


def starting_from(
  workdir: str | os.PathLike, state: steps.TrainState
) -> steps.TrainState:
  """Returns a state with the variables of another run, where they fit.

  They are averages if that run has any. Arrays that are missing there, or have
  another shape, keep their initial values; a line in the log names them.

  Raises:
    errors.UserError: if the run cannot be read, or nothing fits.
  """
  workdir = files.local_path(workdir)
  directory.check_path(workdir)
  files.read_json(workdir / "config.json")  # Says so if this is not a run.
  ours = dict(trees.of_variables(state.eval_variables))
  other, _ = checkpoints.restore(workdir)
  theirs = dict(trees.of_variables(other.eval_variables))
  here, there = trees.shapes(ours), trees.shapes(theirs)
  new = [name for name in ours if there.get(name) != here[name]]
  text = ", ".join(
    f"{name} ({there.get(name, 'missing')} there, {here[name]} here)"
    for name in new
  )
  if len(new) == len(ours):
    raise errors.UserError(
      f"config.init_from={workdir}: nothing in it fits this network: {text}"
    )
  logging.info(
    "Starting from the parameters of %s%s",
    workdir,
    text and f"; new are {text}",
  )
  arrays = [(ours if name in new else theirs)[name] for name in ours]
  structure = jax.tree.structure(state.eval_variables)
  return state.starting_from(jax.tree.unflatten(structure, arrays))


def _shapes(
  where: str | os.PathLike,
  config: ml_collections.ConfigDict,
  image_shape: tuple[int, int, int],
  class_names: Sequence[str],
) -> steps.TrainState:
  """Returns the shapes in a run's state; an error begins with `where`."""
  try:
    return jax.eval_shape(
      lambda: create_state(jax.random.key(0), config, image_shape, class_names)
    )
  except (ArithmeticError, ValueError) as error:
    raise errors.UserError(
      f"{where}: model.py cannot take images of {list(image_shape)}: {error}"
    ) from error


def _check_memory(
  state: steps.TrainState, image_shape: tuple[int, int, int]
) -> None:
  """Raises errors.UserError if a step's state alone exceeds the memory."""
  num_params = sum(x.size for x in jax.tree.leaves(state.params))
  # A CPU keeps the state before the step, too; gradients are like parameters.
  copies = 2 if compiling.takes_single_steps() else 1
  needed = copies * trees.num_bytes(state) + trees.num_bytes(state.params)
  memory = devices.memory()
  if needed > memory:
    height, width, channels = image_shape
    raise errors.UserError(
      f"images of {width}x{height} with {channels} channels make a network of"
      f" {num_params:,} parameters; training takes more than"
      f" {needed / 1e9:,.2f} GB, but {jax.devices()[0].device_kind} has"
      f" {memory / 1e9:,.2f} GB; make the images smaller (config.image_size) or"
      " change model.py"
    )


def create_state(
  rng: jax.Array,
  config: ml_collections.ConfigDict,
  image_shape: tuple[int, int, int],
  class_names: Sequence[str],
) -> steps.TrainState:
  """Creates the state that a run with this config starts from."""
  model = CNN(
    num_classes=len(class_names),
    dropout_rate=config.dropout_rate,
    image_shape=image_shape,
    dtype=config.dtype,
  )
  return steps.create_train_state(
    rng, model, optimizer.create(config), config.ema_decay
  )


def _read_dataset(
  path: pathlib.Path,
) -> tuple[tuple[int, int, int], tuple[str, ...]]:
  """Returns the shape of the images and the names of the classes."""
  match files.read_json(path):
    case {
      "image_shape": [int(height), int(width), int(channels)],
      "class_names": [_, *_] as names,
    } if min(height, width, channels) > 0 and all(
      isinstance(name, str) and name.isprintable() for name in names
    ):
      return (height, width, channels), tuple(names)
    case found:
      raise errors.UserError(
        f"{path}: holds {found}; must have image_shape (three numbers) and"
        " class_names"
      )
