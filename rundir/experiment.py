"""Checks configs, names runs after them and compares them.

`_RULES` has the rules for values; a key does not need one.
"""

from collections.abc import Mapping
import json
import operator
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
# Well within float32: larger values overflow, smaller ones lose digits.
_AMOUNT = (lambda x: 0 <= x <= 1e38, "a number from 0 to 1e38")
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
  "image_size": (lambda n: n == 0 or n >= 4, "0 or at least 4"),
  "batch_size": _at_least(1),
  "eval_batch_size": _at_least(1),
  "num_steps": (lambda n: 1 <= n < 2**31, "an integer from 1 to 2147483647"),
  "learning_rate": (
    lambda x: 1e-37 <= x <= 1e38,
    "a number from 1e-37 to 1e38",
  ),
  "schedule": _one_of(*optimizer.SCHEDULES),
  "warmup_steps": _at_least(0),
  "optimizer": _one_of(*optimizer.OPTIMIZERS),
  "momentum": _FRACTION,
  "adam_b2": _FRACTION,
  "weight_decay": _AMOUNT,
  "clip_norm": _AMOUNT,
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


def check_values(config: ml_collections.ConfigDict) -> None:
  """Raises errors.UserError if a value is missing, or wrong by itself."""
  for key, default_value in default.get_config().items():
    if key not in config:
      raise errors.UserError(
        f"the config has no {key}; it must have all keys of configs/default.py"
      )
    value, kind = config[key], type(default_value)
    kinds = (int, float) if kind is float else kind
    is_bool = isinstance(value, bool)  # Python takes it for an int.
    if not isinstance(value, kinds) or is_bool != (kind is bool):
      raise errors.UserError(
        f"config.{key}={value!r}: must be of type {kind.__name__}, as in"
        " configs/default.py"
      )
    is_valid, expected = _RULES.get(key, (lambda _: True, ""))
    if not is_valid(value):
      raise errors.UserError(f"config.{key}={value}: must be {expected}")
  to_json(config)


def check(config: ml_collections.ConfigDict) -> None:
  """Raises errors.UserError if a value is wrong, regardless of the data."""
  check_values(config)
  read = _keys_read(config)
  defaults = default.get_config()
  for key in _OF_SOME_CHOICES:
    if key not in read and config[key] != defaults[key]:
      raise errors.UserError(
        f"config.{key}={config[key]}: must be {defaults[key]} with"
        f" config.optimizer={config.optimizer} and"
        f" config.schedule={config.schedule}, which do not use it"
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


def name(base_name: str, overrides: Mapping[str, Any]) -> str:
  """Names a run after its overrides: `default,batch_size=256,seed=1`."""
  values = {k: v for k, v in overrides.items() if k not in INCIDENTAL}
  if init_from := values.get("init_from"):
    values["init_from"] = os.path.basename(os.path.abspath(init_from))
  parts = [base_name, *(f"{key}={values[key]}" for key in sorted(values))]
  return files.to_file_name(",".join(parts))


def needs_num_steps(config: ml_collections.ConfigDict) -> bool:
  """Returns whether training depends on the number of steps."""
  return config.clean_steps > 0 or "num_steps" in _keys_read(config)


def _keys_read(config: ml_collections.ConfigDict) -> set[str]:
  """Returns the keys that the chosen optimizer and schedule read."""
  entries = (
    optimizer.OPTIMIZERS[config.optimizer],
    optimizer.SCHEDULES[config.schedule],
  )
  return {key for entry in entries for key in optimizer.keys_read(entry)}


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the config as config.json stores it.

  Tuples become lists, NumPy's numbers become Python's, and paths become
  absolute unless they start with ~.

  Raises:
    errors.UserError: if JSON cannot hold a value; the message names its key.
  """
  result = {}
  for key, value in config.to_dict().items():
    try:
      text = json.dumps(value, default=operator.methodcaller("item"))
      result[key] = json.loads(text)
    except (AttributeError, TypeError, ValueError) as error:
      raise errors.UserError(
        f"config.{key}={value!r:.60}: must be a value that JSON can hold, such"
        " as a number, a text or a list"
      ) from error
  for key in ("data_dir", "manual_dir", "init_from"):
    if result[key] and not result[key].startswith("~"):
      result[key] = os.path.abspath(result[key])
  return result


def changed(
  config: ml_collections.ConfigDict, **changes: str | os.PathLike
) -> ml_collections.ConfigDict:
  """Returns a changed copy of a config; changed paths are made absolute."""
  for key in ("data_dir", "manual_dir"):
    if path := changes.get(key):
      changes[key] = files.local_path(path).absolute()
  config = config.copy_and_resolve_references()
  config.update({key: os.fspath(value) for key, value in changes.items()})
  check(config)
  return config


def read(path: pathlib.Path) -> ml_collections.ConfigDict:
  """Reads the config of a run, which may be old or untrusted.

  Keys that configs/default.py lacks are kept.

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
    check_values(config)
  except (TypeError, ValueError, OverflowError, errors.UserError) as error:
    raise errors.UserError(f"{path}: {error}") from error
  return config
