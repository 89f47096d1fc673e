"""Run directories: their name, the config they hold, what was trained."""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import json
import math
import os
import pathlib
import platform
import re
import stat
from typing import Any
from typing import NamedTuple

from absl import app
import filelock
import jax
import ml_collections

import checkpoints
from configs import default
import input_pipeline
import model as model_lib
import processes
import steps

_MAX_NAME_LENGTH = 200  # In bytes; file systems stop at 255.
_MAX_JSON_SIZE = 2**20  # In bytes; ours have about a thousand.


def _at_least(minimum):
  return lambda value: value >= minimum, f"an integer of at least {minimum}"


def _one_of(*names):
  return names.__contains__, " or ".join(names)


_FRACTION = (lambda x: 0 <= x < 1, "a number from 0 to below 1")
_AMOUNT = (lambda x: 0 <= x < math.inf, "a number of at least 0")
_ACCEPTED = {
  # Without TFDS's namespaces, which would run code from elsewhere.
  "dataset": (
    re.compile(r"[a-z]\w*(/[\w.+-]+)?(:[\d.*]+)?", re.ASCII).fullmatch,
    "the name of a data set, such as mnist",
  ),
  "data_dir": (str.isprintable, "a path"),
  "manual_dir": (str.isprintable, "a path"),
  "batch_size": _at_least(1),
  "eval_batch_size": _at_least(1),
  "num_steps": (lambda n: 1 <= n < 2**31, "an integer of 1 to 2147483647"),
  "learning_rate": (lambda x: 0 < x < math.inf, "a number above 0"),
  "schedule": _one_of("constant", "one_cycle", "cosine"),
  "warmup_steps": _at_least(0),
  "optimizer": _one_of("sgd", "adamw", "nadamw"),
  "momentum": _FRACTION,
  "adam_b2": _FRACTION,
  "weight_decay": _AMOUNT,
  "label_smoothing": _FRACTION,
  "ema_decay": _FRACTION,
  "dropout_rate": _FRACTION,
  "dtype": _one_of("float32", "bfloat16"),
  "seed": (lambda n: 0 <= n < 2**32, "an integer of 0 to 4294967295"),
  "augment_rotation": _AMOUNT,
  "augment_scale": _AMOUNT,
  "augment_shear": _AMOUNT,
  "augment_shift": _AMOUNT,
  "augment_elastic": _AMOUNT,
  "clean_steps": _at_least(0),
  "log_every_steps": _at_least(1),
  "log_probabilities_every_steps": _at_least(0),
  "eval_every_steps": _at_least(1),
  "checkpoint_every_steps": _at_least(1),
}


def validate(config: ml_collections.ConfigDict) -> None:
  """Raises app.UsageError where a value is wrong whatever the data."""
  for key, (is_accepted, accepted) in _ACCEPTED.items():
    if not is_accepted(config[key]):
      raise app.UsageError(
        f"config.{key}={config[key]}: accepted is {accepted}"
      )
  defaults = default.get_config()
  for key, is_read in {
    "momentum": config.optimizer == "sgd",
    "adam_b2": config.optimizer != "sgd",
    "weight_decay": config.optimizer != "sgd",
    "warmup_steps": config.schedule != "constant",
  }.items():
    if config[key] != defaults[key] and not is_read:
      raise app.UsageError(
        f"config.{key}={config[key]}: accepted is {defaults[key]} with"
        f" config.optimizer={config.optimizer} and"
        f" config.schedule={config.schedule}, which have no use for it"
      )
  if config.clean_steps and not input_pipeline.augmentation(config):
    raise app.UsageError(
      f"config.clean_steps={config.clean_steps}: accepted is 0 where no"
      " config.augment_* is above 0: all steps are"
    )
  for key in ("warmup_steps", "clean_steps"):
    if config[key] > config.num_steps // 2:
      raise app.UsageError(
        f"config.{key}={config[key]}: accepted is at most half of"
        f" config.num_steps={config.num_steps}"
      )


def name(
  config: ml_collections.ConfigDict,
  base: ml_collections.ConfigDict,
  base_name: str,
) -> str:
  """Names a run after its experiment: `default,batch_size=256,seed=1`.

  Args:
    config: of the run.
    base: the config as its file has it, without overrides.
    base_name: the name of that file.

  Raises:
    app.UsageError: the name would be too long for a file system.
  """
  overrides = [
    f"{key}={config[key]}" for key in sorted(config) if config[key] != base[key]
  ]
  # Paths and split slices: a slash would nest, and Orbax fails on brackets.
  result = re.sub(r"[^\w.,=+%-]", "_", ",".join([base_name, *overrides]))
  if len(result.encode()) > _MAX_NAME_LENGTH:
    raise app.UsageError(
      f"too many overrides to name a run directory after: {result}; name one"
      " with --workdir"
    )
  return result


def create(
  workdir: str | os.PathLike,
  config: ml_collections.ConfigDict,
  image_shape: Sequence[int],
  class_names: Sequence[str],
) -> None:
  """Creates a run directory, or checks that the one there is has this config.

  Besides config.json it gets dataset.json, so that `open_run` needs no data.

  Raises:
    app.UsageError: it cannot be created, or holds another config.
  """
  workdir = pathlib.Path(workdir)
  if forbidden := set("[]*?") & set(str(workdir)):
    raise app.UsageError(
      f"--workdir={workdir}: {' '.join(sorted(forbidden))} cannot be in its"
      " path: Orbax would take it for a pattern"
    )
  config = config.to_dict()
  dataset = {"image_shape": [*image_shape], "class_names": [*class_names]}
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    check_contained(workdir)
    if (workdir / "config.json").exists():
      _check_same(workdir / "config.json", config)
    elif not processes.is_first():
      raise app.UsageError(
        f"--workdir={workdir}: process {jax.process_index()} does not see what"
        " process 0 has written there; accepted is a directory that all share"
      )
    elif any(workdir.iterdir()):
      raise app.UsageError(
        f"--workdir={workdir}: has files but no config.json; accepted is a new"
        " or empty directory, or one of an earlier run"
      )
    else:
      write_json(workdir / "config.json", config)
    if (workdir / "dataset.json").exists():
      _check_same(workdir / "dataset.json", dataset)
    else:
      write_json(workdir / "dataset.json", dataset)
  except OSError as error:
    raise app.UsageError(f"--workdir={workdir}: {error}") from error


def _check_same(path: pathlib.Path, ours: dict[str, Any]) -> None:
  found = read_json(path)
  differing = [
    f"{key} ({found.get(key, 'none')} there, {ours.get(key, 'none')} here)"
    for key in sorted(found.keys() | ours.keys())
    if found.get(key) != ours.get(key)
  ]
  if differing:
    raise app.UsageError(
      f"{path.parent} holds a run of another {path.stem}:"
      f" {', '.join(differing)}; name another --workdir"
    )


def check_contained(workdir: pathlib.Path) -> None:
  """Checks that a run directory, maybe a stranger's, is files and no more.

  Raises:
    app.UsageError: names a link that leads out of it, a pipe or a device.
  """
  root = workdir.resolve()
  for folder, folders, files in os.walk(workdir):
    for path in (pathlib.Path(folder, name) for name in (*folders, *files)):
      try:
        mode = path.lstat().st_mode
      except FileNotFoundError:
        continue  # A running train.py replaced it.
      if stat.S_ISLNK(mode) and not path.resolve().is_relative_to(root):
        raise app.UsageError(f"{path}: is a link out of the run directory")
      if not (stat.S_ISLNK(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise app.UsageError(f"{path}: is neither a file nor a directory")


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps other processes from training in this run directory.

  The operating system lets go of the lock when its holder ends, however. Of
  several processes that train together, the first one holds it.

  Raises:
    app.UsageError: names the process that holds it.
  """
  if not processes.is_first():
    yield
    return
  holder = workdir / ".lock_holder"
  lock_file = filelock.FileLock(workdir / ".lock", timeout=0)
  try:
    lock_file.acquire()
  except filelock.Timeout as error:
    name = holder.read_text() if holder.exists() else "another process"
    raise app.UsageError(f"{workdir}: {name} is training there") from error
  try:
    write_text(holder, f"process {os.getpid()} on {platform.node()}")
    yield
  finally:
    lock_file.release()


class Run(NamedTuple):
  """What a run directory holds.

  Attributes:
    config: of the run.
    image_shape: (height, width, channels) of the images it was trained on.
    class_names: of the labels.
    state: as it was after `step` steps.
    step: of the checkpoint.
  """

  config: ml_collections.ConfigDict
  image_shape: tuple[int, int, int]
  class_names: tuple[str, ...]
  state: steps.TrainState
  step: int


def open_run(workdir: str | os.PathLike, checkpoint: str = "last") -> Run:
  """Restores what was trained from its run directory alone.

  Args:
    workdir: the run directory.
    checkpoint: "last", "best" by validation accuracy, or a step.

  Raises:
    app.UsageError: names what is missing or wrong there.
  """
  workdir = pathlib.Path(workdir).expanduser()
  check_contained(workdir)
  config = _read_config(workdir / "config.json")
  image_shape, class_names = _read_dataset(workdir / "dataset.json")
  state = jax.eval_shape(
    lambda: create_state(jax.random.key(0), config, image_shape, class_names)
  )
  state = _restore(workdir, checkpoint, state)
  return Run(config, image_shape, class_names, state, int(state.step))


def create_state(
  rng: jax.Array,
  config: ml_collections.ConfigDict,
  image_shape: Sequence[int],
  class_names: Sequence[str],
) -> steps.TrainState:
  """The state that a run of this config begins with."""
  model = model_lib.CNN(
    num_classes=len(class_names),
    dropout_rate=config.dropout_rate,
    image_shape=tuple(image_shape),
    dtype=config.dtype,
  )
  return steps.create_train_state(
    rng, model, steps.optimizer(config), config.ema_decay
  )


def _read_config(path: pathlib.Path) -> ml_collections.ConfigDict:
  found = read_json(path)
  config = default.get_config()
  if set(found) != set(config):
    raise app.UsageError(
      f"{path}: {', '.join(sorted(set(found) ^ set(config)))} is too much or"
      f" missing; the keys are {', '.join(config)}"
    )
  try:
    config.update(found)
  except TypeError as error:
    raise app.UsageError(f"{path}: {error}") from error
  for key, value in found.items():
    if value is None:
      raise app.UsageError(f"{path}: {key} is null")
  validate(config)
  return config


def _read_dataset(
  path: pathlib.Path,
) -> tuple[tuple[int, int, int], tuple[str, ...]]:
  """The shape of the images and the names of the classes."""
  match read_json(path):
    case {
      "image_shape": [int(height), int(width), int(channels)],
      "class_names": [_, *_] as names,
    } if min(height // 4, width // 4, channels) > 0 and all(
      isinstance(name, str) and name.isprintable() for name in names
    ):
      return (height, width, channels), tuple(names)
    case found:
      raise app.UsageError(
        f"{path}: holds {found}; accepted are image_shape, three numbers, and"
        " class_names"
      )


def _restore(
  workdir: pathlib.Path, checkpoint: str, state: steps.TrainState
) -> steps.TrainState:
  """Restores "last", "best" or a step, if it is there."""
  there = checkpoints.all_steps(workdir)
  if not there:
    raise app.UsageError(
      f"{workdir}: has no complete checkpoint; train.py saves them"
    )
  if checkpoint == "last":
    return checkpoints.restore_newest(workdir, state)[0]
  if checkpoint == "best":
    if (step := checkpoints.best_step(workdir)) is None:
      raise app.UsageError(f"{workdir}: no checkpoint was validated yet")
  elif checkpoint in map(str, there):
    step = int(checkpoint)
  else:
    raise app.UsageError(
      f"--checkpoint={checkpoint}: accepted are last, best and the steps"
      f" {', '.join(map(str, there))}"
    )
  try:
    return checkpoints.restore(workdir, step, state)[0]
  except checkpoints.DamagedError as error:
    raise app.UsageError(
      f"{workdir}: the checkpoint of step {step} is damaged: {error}"
    ) from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; app.UsageError names a file that is none."""
  try:
    if path.stat().st_size > _MAX_JSON_SIZE:
      raise app.UsageError(f"{path}: has more than {_MAX_JSON_SIZE} bytes")
    found = json.loads(path.read_text())
  except FileNotFoundError as error:
    raise app.UsageError(
      f"{path}: there is none; accepted is a run directory, such as train.py"
      " makes in runs/"
    ) from error
  except (OSError, ValueError, RecursionError) as error:
    raise app.UsageError(f"{path}: is not JSON: {error}") from error
  if not isinstance(found, dict):
    raise app.UsageError(f"{path}: holds {found!r}, not a JSON object")
  return found


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl, but for one that is being written."""
  path = workdir / "metrics.jsonl"
  records = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      records.append(json.loads(line))
    except ValueError:
      break
  return records


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  """Writes a JSON object with `write_text`."""
  write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file: after a crash, there is the old one or the new, whole."""
  temporary = path.with_name(path.name + ".incomplete")
  try:
    temporary.write_text(text)
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
