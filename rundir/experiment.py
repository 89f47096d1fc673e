"""What a config may hold, and the name of the run that it describes."""

import math
import re

from absl import app
import ml_collections

import augmentation
from configs import default

_MAX_NAME_LENGTH = 200  # In bytes; file systems stop at 255.


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
  if config.clean_steps and not augmentation.from_config(config):
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
