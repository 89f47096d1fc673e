"""Optimisers and learning rate schedules by name, from optax."""

import jax
import ml_collections
import optax


def learning_rate(config: ml_collections.ConfigDict) -> optax.ScalarOrSchedule:
  """The learning rate, or a function of the steps taken that returns it."""
  peak, num_steps = config.learning_rate, config.num_steps
  if config.schedule == "one_cycle":
    # Smith and Topin, "Super-Convergence", arXiv 1708.07120.
    return optax.linear_onecycle_schedule(
      num_steps,
      peak,
      pct_start=(config.warmup_steps + 0.5) / num_steps,  # optax rounds down.
    )
  if config.schedule == "cosine":
    # Loshchilov and Hutter, "SGDR", arXiv 1608.03983, after a linear warm-up.
    return optax.warmup_cosine_decay_schedule(
      0.0, peak, config.warmup_steps, num_steps
    )
  return peak


def create(
  config: ml_collections.ConfigDict,
) -> optax.GradientTransformation:
  """What `config.optimizer` and the keys that belong to it say."""
  rate = learning_rate(config)
  if config.optimizer == "sgd":
    return optax.sgd(rate, config.momentum or None, nesterov=True)
  return optax.adamw(
    rate,
    b2=config.adam_b2,
    weight_decay=config.weight_decay,
    mask=_are_kernels,
    nesterov=config.optimizer == "nadamw",
  )


def _are_kernels(params):
  return jax.tree.map(lambda param: param.ndim > 1, params)
