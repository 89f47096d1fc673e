"""Checks configs, names runs after them and compares them.

`_RULES` has the rules for values; a key does not need one.
"""

import json
import math
import os
import pathlib
import re
from typing import Any

from absl import logging
import ml_collections

import augmentation
from configs import default
from machine import errors
import optimizer
from rundir import files

# Where the data are and how often to report: a run may change these, and they
# are not in its name.
INCIDENTAL = (
  "data_dir",
  "manual_dir",
  "eval_batch_size",
  "log_every_steps",
  "log_probabilities_every_steps",
  "eval_every_steps",
  "checkpoint_every_steps",
)


def _at_least(minimum):
  return lambda value: value >= minimum, f"an integer of at least {minimum}"


def _one_of(*names):
  return names.__contains__, f"one of {', '.join(names)}"


_FRACTION = (lambda x: 0 <= x < 1, "a number in [0, 1)")
_AMOUNT = (lambda x: 0 <= x < math.inf, "a finite number of at least 0")
_PATH = (
  lambda path: (
    path.isprintable()
    and files.is_local(path)
    and pathlib.PurePath(path).name != "None"
  ),
  f'{files.LOCAL}; "" is the default',
)
# Only some optimizers and schedules read these.
_OF_SOME_CHOICES = ("momentum", "adam_b2", "weight_decay", "warmup_steps")
_RULES = {
  # No TFDS namespaces: they would run code from elsewhere.
  "dataset": (
    re.compile(r"[a-z][\w-]*(/[\w.+-]+)?(:[\d.*]+)?", re.A | re.I).fullmatch,
    "the name of a data set, such as mnist",
  ),
  "data_dir": _PATH,
  "manual_dir": _PATH,
  "init_from": _PATH,
  "batch_size": _at_least(1),
  "eval_batch_size": _at_least(1),
  "num_steps": (lambda n: 1 <= n < 2**31, "an integer from 1 to 2147483647"),
  "learning_rate": (lambda x: 0 < x < math.inf, "a finite number above 0"),
  "schedule": _one_of(*optimizer.SCHEDULES),
  "warmup_steps": _at_least(0),
  "optimizer": _one_of(*optimizer.OPTIMIZERS),
  "momentum": _FRACTION,
  "adam_b2": _FRACTION,
  "weight_decay": _AMOUNT,
  "label_smoothing": _FRACTION,
  "ema_decay": _FRACTION,
  "dropout_rate": _FRACTION,
  "dtype": _one_of("float32", "bfloat16"),
  "seed": (lambda n: 0 <= n < 2**32, "an integer from 0 to 4294967295"),
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


def check_keys(config: ml_collections.ConfigDict) -> None:
  """Raises errors.UserError if a value is missing or has the wrong type."""
  for key, default_value in default.get_config().items():
    if key not in config:
      raise errors.UserError(
        f"the config has no {key}; it must have all keys of configs/default.py"
      )
    found, expected = type(config[key]), type(default_value)
    if not issubclass(found, expected) and (found, expected) != (int, float):
      raise errors.UserError(
        f"config.{key}={config[key]!r}: must be of type {expected.__name__}, as"
        " in configs/default.py"
      )
  for key, value in config.items():
    if value is None:
      raise errors.UserError(f"config.{key} is None; it must have a value")


def check(config: ml_collections.ConfigDict) -> None:
  """Raises errors.UserError if a value is wrong, regardless of the data."""
  _check_values(config)
  chosen = (
    optimizer.OPTIMIZERS[config.optimizer],
    optimizer.SCHEDULES[config.schedule],
  )
  choice = (
    f"config.optimizer={config.optimizer} and config.schedule={config.schedule}"
  )
  read = {key for entry in chosen for key in optimizer.keys_read(entry)}
  for key in sorted(read - {*config}):
    raise errors.UserError(f"the config has no {key}, which {choice} need")
  defaults = default.get_config()
  for key in _OF_SOME_CHOICES:
    if key not in read and config[key] != defaults[key]:
      raise errors.UserError(
        f"config.{key}={config[key]}: must be {defaults[key]} with {choice},"
        " which do not use it"
      )
  if config.clean_steps and not augmentation.from_config(config):
    raise errors.UserError(
      f"config.clean_steps={config.clean_steps}: must be 0 unless a"
      " config.augment_* is above 0"
    )
  for key in ("warmup_steps", "clean_steps"):
    if config[key] > config.num_steps // 2:
      raise errors.UserError(
        f"lower config.{key}={config[key]} to at most"
        f" {config.num_steps // 2}, half of config.num_steps"
      )


def _check_values(config: ml_collections.ConfigDict) -> None:
  """Raises errors.UserError if a key is missing or breaks its rule."""
  check_keys(config)
  for key, value in config.items():
    is_valid, expected = _RULES.get(key, (lambda _: True, ""))
    if not is_valid(value):
      raise errors.UserError(f"config.{key}={value}: must be {expected}")


def name(
  config: ml_collections.ConfigDict,
  base: ml_collections.ConfigDict,
  base_name: str,
) -> str:
  """Names a run after its overrides: `default,batch_size=256,seed=1`.

  Args:
    config: the config of the run.
    base: the same config without overrides.
    base_name: the name of its file.

  Raises:
    errors.UserError: if the name would be too long for a file system.
  """
  values = {**config}
  if config.init_from:
    values["init_from"] = os.path.basename(os.path.abspath(config.init_from))
  overrides = [
    f"{key}={values[key]}"
    for key in sorted(config)
    if key not in INCIDENTAL and config[key] != base[key]
  ]
  result = ",".join([base_name, *overrides])
  if len(result.encode()) > files.MAX_NAME_LENGTH:
    raise errors.UserError(
      f"{result}: too long for the name of a run directory; name one with"
      " --workdir"
    )
  return files.to_file_name(result)


def check_same(
  path: pathlib.Path,
  found: dict[str, Any],
  ours: dict[str, Any],
  steps_done: int,
) -> None:
  """Checks that a run directory holds a run of this experiment.

  Args:
    path: its config.json.
    found: the config in that file.
    ours: the config to resume with. `num_steps` may differ if training does not
      depend on it.
    steps_done: the number of steps in the newest checkpoint.

  Raises:
    errors.UserError: if keys differ; the message names them.
  """
  if ours["num_steps"] >= steps_done and not _depends_on_num_steps(ours):
    found = {**found, "num_steps": ours["num_steps"]}
  theirs = pathlib.Path(found["init_from"])
  is_moved = theirs.name == pathlib.Path(ours["init_from"]).name
  if is_moved and not theirs.expanduser().exists():
    found = {**found, "init_from": ours["init_from"]}
  files.check_same(path, found, ours, except_for=INCIDENTAL)


def _depends_on_num_steps(config: dict[str, Any]) -> bool:
  entries = (
    optimizer.OPTIMIZERS[config["optimizer"]],
    optimizer.SCHEDULES[config["schedule"]],
  )
  return config["clean_steps"] > 0 or any(
    "num_steps" in optimizer.keys_read(entry) for entry in entries
  )


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the config as config.json stores it.

  Tuples become lists, and paths become absolute unless they start with ~.
  """
  result = json.loads(json.dumps(config.to_dict()))
  for key in ("data_dir", "manual_dir", "init_from"):
    if result[key] and not result[key].startswith("~"):
      result[key] = os.path.abspath(result[key])
  return result


def changed(
  config: ml_collections.ConfigDict, **changes: str | os.PathLike | None
) -> ml_collections.ConfigDict:
  """Returns a copy of a config with the changes that are not None.

  Changed paths are made absolute.
  """
  for key in ("data_dir", "manual_dir"):
    if path := changes.get(key):
      changes[key] = files.local_path(path).absolute()
  config = config.copy_and_resolve_references()
  config.update({k: os.fspath(v) for k, v in changes.items() if v is not None})
  check(config)
  return config


def read(path: pathlib.Path) -> ml_collections.ConfigDict:
  """Reads the config of a run, which may be old or untrusted.

  Keys that configs/default.py lacks are kept.

  Args:
    path: its config.json.

  Raises:
    errors.UserError: if the file is wrong; the message says why.
  """
  found = files.read_json(path)
  config = default.get_config()
  if missing := [key for key in config if key not in found]:
    logging.info(
      "%s is from an older version without %s; using today's defaults",
      path,
      ", ".join(missing),
    )
  try:
    with config.unlocked():
      config.update(found)
    _check_values(config)
  except (TypeError, ValueError, OverflowError, errors.UserError) as error:
    raise errors.UserError(f"{path}: {error}") from error
  return config
