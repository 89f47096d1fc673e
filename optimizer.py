"""Optax's optimizers and learning rate schedules, by name.

To add one, add an entry to a table. An entry's first argument is the learning
rate; the others are named after the config keys that it reads.
"""

from collections.abc import Callable
import inspect

import jax
import ml_collections
import optax


def _are_kernels(params):
  return jax.tree.map(lambda param: param.ndim > 1, params)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  "sgd": lambda rate, momentum: optax.sgd(
    rate, momentum or None, nesterov=True
  ),
  "adam": lambda rate, adam_b2: optax.adam(rate, b2=adam_b2),
  "adamw": lambda rate, adam_b2, weight_decay: optax.adamw(
    rate, b2=adam_b2, weight_decay=weight_decay, mask=_are_kernels
  ),
  "nadamw": lambda rate, adam_b2, weight_decay: optax.nadamw(
    rate, b2=adam_b2, weight_decay=weight_decay, mask=_are_kernels
  ),
}

SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
  "constant": optax.constant_schedule,
  # Smith and Topin, "Super-Convergence", arXiv 1708.07120.
  "one_cycle": lambda peak, num_steps, warmup_steps: (
    optax.linear_onecycle_schedule(
      num_steps,
      peak,
      pct_start=(warmup_steps + 0.5) / num_steps,  # optax rounds down.
    )
  ),
  # Loshchilov and Hutter, "SGDR", arXiv 1608.03983, after a linear warmup.
  "cosine": lambda peak, num_steps, warmup_steps: (
    optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, num_steps)
  ),
}


def keys_read(entry: Callable) -> list[str]:
  """Returns the config keys that an entry in a table reads."""
  return list(inspect.signature(entry).parameters)[1:]


def _call(
  entry: Callable,
  rate: optax.ScalarOrSchedule,
  config: ml_collections.ConfigDict,
):
  return entry(rate, **{key: config[key] for key in keys_read(entry)})


def schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
  """Returns the learning rate as a function of the number of steps taken."""
  return _call(SCHEDULES[config.schedule], config.learning_rate, config)


def create(
  config: ml_collections.ConfigDict,
) -> optax.GradientTransformation:
  """Builds the optimizer described by the config."""
  rate = schedule(config)
  if config.schedule == "constant":  # Given a number, optax counts no steps.
    rate = config.learning_rate
  tx = _call(OPTIMIZERS[config.optimizer], rate, config)
  if not config.clip_norm:
    return tx
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
