import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import default
import optimizer


def make_config(**changes):
  config = default.get_config()
  config.update(changes)
  return config


def test_the_default_learning_rate_is_constant():
  schedule = optimizer.schedule(make_config())
  assert schedule(0) == schedule(19_999) == 0.001


@pytest.mark.parametrize(
  ("schedule", "expected"),
  [
    # Linear up to the peak at step 20, then half a cosine down to step 100.
    ("cosine", {0: 0, 10: 0.5, 20: 1, 60: 0.5, 100: 0}),
    # Linear up from 1/25 of the peak, back to it at step 85, then down to 0.
    ("one_cycle", {0: 0.04, 10: 0.52, 20: 1, 85: 0.04, 100: 0}),
  ],
)
def test_schedules(schedule, expected):
  config = make_config(
    schedule=schedule, warmup_steps=20, num_steps=100, learning_rate=3.0
  )
  rate = optimizer.schedule(config)
  found = {step: float(rate(step)) / 3 for step in expected}
  assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_the_peak_is_at_the_end_of_the_warmup(schedule):
  """optax rounds the warmup down to whole steps, but none may be lost."""
  for warmup_steps in range(1, 51):
    config = make_config(
      schedule=schedule,
      warmup_steps=warmup_steps,
      num_steps=100,
      learning_rate=3.0,
    )
    rates = jax.vmap(optimizer.schedule(config))(jnp.arange(101))
    assert rates.argmax() == warmup_steps
    np.testing.assert_allclose(rates[warmup_steps], 3, rtol=1e-6)


def updates(config, params, grads):
  """Returns the parameters after each update by one of the gradients."""
  tx = optimizer.create(config)
  state = tx.init(params)
  result = []
  for grad in grads:
    update, state = tx.update(grad, state, params)
    params = optax.apply_updates(params, update)
    result.append(params)
  return result


def test_momentum_is_that_of_nesterov():
  config = make_config(momentum=0.9, learning_rate=0.1)
  found = updates(config, jnp.float32(1), [jnp.float32(2), jnp.float32(-1)])
  velocity, param = 0.0, 1.0
  for grad, new in zip([2, -1], found, strict=True):
    velocity = 0.9 * velocity + grad
    param -= 0.1 * (grad + 0.9 * velocity)
    np.testing.assert_allclose(new, param, rtol=1e-6)


@pytest.mark.parametrize("is_nesterov", [False, True])
def test_adam_and_nadam(is_nesterov):
  """Compares them with the formulas of Kingma and Ba, and of Dozat."""
  config = make_config(
    optimizer="nadamw" if is_nesterov else "adamw",
    adam_b2=0.8,
    learning_rate=0.1,
  )
  grads = [2.0, -1.0, 0.5]
  found = updates(config, jnp.float32(1), list(map(jnp.float32, grads)))
  param, mean, square = 1.0, 0.0, 0.0
  for t, (grad, new) in enumerate(zip(grads, found, strict=True), 1):
    mean = 0.9 * mean + 0.1 * grad
    square = 0.8 * square + 0.2 * grad**2
    direction = mean / (1 - 0.9**t)
    if is_nesterov:
      direction = 0.9 * mean / (1 - 0.9 ** (t + 1)) + 0.1 * grad / (1 - 0.9**t)
    param -= 0.1 * direction / np.sqrt(square / (1 - 0.8**t))
    np.testing.assert_allclose(new, param, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "nadamw"])
def test_weight_decay_shrinks_only_kernels(name):
  config = make_config(optimizer=name, weight_decay=0.5, learning_rate=0.1)
  params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
  (found,) = updates(config, params, [jax.tree.map(jnp.zeros_like, params)])
  np.testing.assert_allclose(found["kernel"], 1 - 0.1 * 0.5, rtol=1e-6)
  np.testing.assert_array_equal(found["bias"], 1)


@pytest.mark.parametrize("clip_norm, scale", [(0.0, 1), (1.0, 1 / 5), (9.0, 1)])
def test_gradients_are_clipped_by_their_global_norm(clip_norm, scale):
  config = make_config(clip_norm=clip_norm, learning_rate=0.1)
  params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
  grads = {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.array([3.0, 0.0])}
  (found,) = updates(config, params, [grads])
  for name, grad in grads.items():
    np.testing.assert_allclose(found[name], -0.1 * scale * grad, rtol=1e-6)
