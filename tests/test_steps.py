import functools

from conftest import jit
from conftest import pixels
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import augmentation
import input_pipeline
from machine import compiling
from machine import devices
import steps


class Network(nn.Module):
  """A network that compiles in a moment: a dense layer, dropout and logits."""

  dropout_rate: float = 0.0
  image_shape = (28, 28, 1)

  @nn.compact
  def __call__(self, images, train=False):
    x = nn.relu(nn.Dense(16, name="dense")(images.reshape(len(images), -1)))
    x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
    return nn.Dense(10, name="logits")(x)


@functools.cache
def create_state(dropout_rate=0.0, ema_decay=0.0):
  return steps.create_train_state(
    jax.random.key(0), Network(dropout_rate), optax.sgd(0.1), ema_decay
  )


train_step = jit(steps.train_step)


def trained(
  num_steps, examples, order_rng, dropout_rng, dropout_rate=0.0, **static
):
  """Returns the loop's carry after `num_steps` steps from `create_state()`."""
  batch_size, size = static["batch_size"], examples.labels.size
  order = input_pipeline.order_at(order_rng, 0, batch_size, size)
  training = devices.replicate(
    steps.Training(create_state(dropout_rate), order, steps.Metrics.zero(10))
  )
  run = compiling.jit_loop(steps.train_on_next_batch, **static)
  return run(training, num_steps, examples, order_rng, dropout_rng)


def test_metrics_are_sums():
  logits = jnp.array([[2.0, 0.0], [0.0, 1.0], [3.0, 3.0]])
  labels = jnp.array([0, 0, 1])
  losses = -np.log([np.exp(2) / (np.exp(2) + 1), 1 / (1 + np.e), 0.5])
  metrics = steps.Metrics.of(logits, labels)
  np.testing.assert_allclose(metrics.sums["loss"], losses.sum(), rtol=1e-6)
  # A tie predicts the first class, which is wrong here.
  assert (metrics.sums["accuracy"], metrics.num_examples) == (1, 3)
  part = steps.Metrics.of(logits[::2], labels[::2])
  means = (part + metrics).means()
  expected = (losses.sum() + losses[0] + losses[2]) / 5
  np.testing.assert_allclose(means["loss"], expected, rtol=1e-6)
  assert means["accuracy"] == 2 / 5


def test_a_metric_with_one_value_per_batch_is_refused(monkeypatch):
  monkeypatch.setattr(
    steps, "compute_metrics", lambda logits, labels: {"loss": logits.mean()}
  )
  with pytest.raises(ValueError, match=r"loss has the shape \[\]; .* \[3\]"):
    steps.Metrics.of(jnp.zeros((3, 2)), jnp.zeros(3, jnp.int32))


def test_batch_statistics_are_trained_averaged_and_used():
  class Normalized(nn.Module):
    image_shape = (2, 2, 1)

    @nn.compact
    def __call__(self, images, train=False):
      norm = nn.BatchNorm(not train, momentum=0.5, use_scale=False, name="norm")
      return nn.Dense(3, name="logits")(norm(images.reshape(-1, 4)))

  images = jax.random.uniform(jax.random.key(0), (6, 2, 2, 1))
  labels = jnp.arange(6) % 3
  pixels_, rng = images.reshape(6, 4), jax.random.key(1)
  for ema_decay, kept in ((0.0, 0.0), (0.9, 2 / 11)):  # The first step's decay.
    before = steps.create_train_state(
      rng, Normalized(), optax.sgd(0.1), ema_decay=ema_decay
    )
    state, _ = train_step(before, images, labels, rng)
    found = state.model_state["batch_stats"]["norm"]
    np.testing.assert_allclose(found["mean"], pixels_.mean(axis=0) / 2, 1e-5)
    mean = (1 - kept) * pixels_.mean(axis=0) / 2
    var = kept + (1 - kept) * (1 + pixels_.var(axis=0)) / 2
    params = state.eval_variables["params"]
    normal = (pixels_ - mean) / np.sqrt(var + 1e-5) + params["norm"]["bias"]
    np.testing.assert_allclose(
      jit(steps.eval_step)(state, images),
      normal @ params["logits"]["kernel"] + params["logits"]["bias"],
      rtol=1e-4,
      atol=1e-6,
    )
    assert (
      params["logits"]["kernel"] != before.params["logits"]["kernel"]
    ).any()


@pytest.mark.parametrize("batch_size", [1000, 300, 7, 20_000])
def test_evaluation_counts_every_test_image_once(mnist, batch_size):
  # Each image's logits depend on that image only.
  def logits(variables, images):
    return variables["params"] * images.sum(axis=(1, 2, 3))[:, None] / 784

  weights = jnp.linspace(1, 2, 10)
  state = steps.TrainState.create(
    apply_fn=logits, params=weights, tx=optax.sgd(0.1)
  )
  labels = np.asarray(mnist.test.labels)
  images = np.asarray(mnist.test.images)
  brightness = images.reshape(len(labels), -1).mean(axis=1) / 255
  expected = brightness[:, None] * np.linspace(1, 2, 10)
  log_sum = np.log(np.exp(expected).sum(axis=1))
  expected_loss = log_sum - expected[np.arange(len(labels)), labels]

  means, probabilities = steps.evaluator(mnist.test, batch_size)(state)
  assert means["accuracy"] == (labels == 9).mean()
  np.testing.assert_allclose(means["loss"], expected_loss.mean(), rtol=1e-5)
  np.testing.assert_allclose(
    probabilities, np.exp(expected - log_sum[:, None]), rtol=1e-4
  )


def test_a_constant_predictor_scores_the_class_frequency(mnist):
  for digit in (0, 1, 9):
    state = steps.TrainState.create(
      apply_fn=lambda variables, images: jnp.tile(
        variables["params"], (len(images), 1)
      ),
      params=jax.nn.one_hot(digit, 10),
      tx=optax.sgd(0.1),
    )
    means, _ = steps.evaluator(mnist.test, 1000)(state)
    assert means["accuracy"] == (np.asarray(mnist.test.labels) == digit).mean()


def test_loss_falls_on_a_fixed_batch(mnist):
  images = input_pipeline.to_float(pixels(mnist.train)[:20])
  labels = mnist.train.labels[:20]
  state, losses = create_state(), []
  for _ in range(20):
    state, metrics = train_step(state, images, labels, jax.random.key(0))
    losses.append(metrics.means()["loss"])
  assert abs(losses[0] - np.log(10)) < 0.2  # An untrained network guesses.
  assert losses[-1] < losses[0] / 2
  assert all(np.isfinite(losses))


def test_dropout_depends_only_on_the_seed_and_the_step(mnist):
  images = input_pipeline.to_float(pixels(mnist.train)[:20])
  labels = mnist.train.labels[:20]

  def loss(state_step, seed):
    state = create_state(dropout_rate=0.4).replace(step=jnp.int32(state_step))
    _, metrics = train_step(state, images, labels, jax.random.key(seed))
    return metrics.sums["loss"]

  first = loss(3, seed=1)
  assert first == loss(3, seed=1)
  assert first != loss(4, seed=1)
  assert first != loss(3, seed=2)


def test_training_takes_its_batches_in_the_given_order(mnist):
  """The loop's steps equal train_step on batches gathered with NumPy."""
  order_rng, dropout_rng = jax.random.split(jax.random.key(5))
  examples = jax.tree.map(lambda x: x[:50], mnist.train)
  training = trained(4, examples, order_rng, dropout_rng, batch_size=20)

  epochs = [input_pipeline.epoch_indices(order_rng, e, 50) for e in range(2)]
  batches = np.concatenate(epochs)[:80].reshape(4, 20)
  state, total = create_state(), steps.Metrics.zero(10)
  for batch in batches:
    images = np.float32(np.asarray(pixels(examples))[batch]) / 255
    labels = np.asarray(examples.labels)[batch]
    state, metrics = train_step(state, images, labels, dropout_rng)
    total += metrics
  assert training.state.step == 4
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    (training.state.params, training.metrics),
    (state.params, total),
  )


def test_evaluation_uses_the_average_of_the_parameters(mnist):
  images = input_pipeline.to_float(pixels(mnist.train)[:8])
  state = create_state(ema_decay=0.3)
  average = state.params["dense"]["kernel"]
  for count in (1, 2, 3):
    state, _ = train_step(
      state, images, mnist.train.labels[:8], jax.random.key(1)
    )
    decay = min(0.3, (1 + count) / (10 + count))
    average = decay * average + (1 - decay) * state.params["dense"]["kernel"]
  np.testing.assert_allclose(
    state.ema_params["dense"]["kernel"], average, rtol=1e-5, atol=1e-7
  )
  logits = jit(steps.eval_step)(state, images)
  apply = jit(Network().apply)
  np.testing.assert_array_equal(
    logits, apply({"params": state.ema_params}, images)
  )
  assert (logits != apply({"params": state.params}, images)).any()


def focal(logits, labels):
  """The focal loss of Lin et al., arXiv 1708.02002, with gamma = 2."""
  likely = jax.nn.softmax(logits)[jnp.arange(len(labels)), labels]
  return -((1 - likely) ** 2) * jnp.log(likely)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("loss", [None, focal])
def test_the_loss_reported_is_the_one_trained(
  loss, smoothing, mnist, monkeypatch
):
  if loss:
    monkeypatch.setattr(steps, "compute_loss", loss)
  order_rng, dropout_rng = jax.random.split(jax.random.key(5))
  examples = jax.tree.map(lambda x: x[:50], mnist.train)
  training = trained(
    *(1, examples, order_rng, dropout_rng, 0.4),
    batch_size=5,
    label_smoothing=smoothing,
  )
  batch = input_pipeline.epoch_indices(order_rng, 0, 50)[:5]
  params = create_state().params
  logits = jit(functools.partial(Network(0.4).apply, train=True))(
    {"params": params},
    input_pipeline.to_float(pixels(examples)[batch]),
    rngs={"dropout": jax.random.fold_in(dropout_rng, 0)},
  )
  targets = np.full((5, 10), smoothing / 10)
  targets[np.arange(5), np.asarray(examples.labels)[batch]] += 1 - smoothing

  def expected(logits):
    likely = jax.nn.softmax(logits)
    factor = (1 - likely) ** 2 if loss else 1
    return -(targets * factor * jnp.log(likely)).sum()

  total, gradient = jax.value_and_grad(expected)(logits)
  np.testing.assert_allclose(
    training.state.params["logits"]["bias"],
    params["logits"]["bias"] - 0.1 * gradient.mean(axis=0),
    rtol=1e-4,
    atol=1e-7,
  )
  np.testing.assert_allclose(training.metrics.sums["loss"], total, rtol=1e-5)


@pytest.mark.slow
def test_deformations_depend_on_the_seed_and_the_step(mnist):
  """Dropout is the same as without deformations."""
  limits = augmentation.Limits(10, 0, 0, 2, 0)
  augment = jit(functools.partial(augmentation.augment, limits=limits))
  order_rng, dropout_rng = jax.random.split(jax.random.key(5))
  examples = jax.tree.map(lambda x: x[:50], mnist.train)
  training = trained(
    2, examples, order_rng, dropout_rng, 0.4, batch_size=20, limits=limits
  )

  state = create_state(0.4)
  order = input_pipeline.epoch_indices(order_rng, 0, 50)
  for step, batch in enumerate((order[:20], order[20:40])):
    rng = jax.random.fold_in(jax.random.fold_in(dropout_rng, step), 1)
    images = augment(rng, input_pipeline.to_float(pixels(examples)[batch]))
    state, _ = train_step(state, images, examples.labels[batch], dropout_rng)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
    training.state.params,
    state.params,
  )


@pytest.mark.slow
def test_the_last_steps_see_undeformed_images(mnist):
  order_rng, dropout_rng = jax.random.split(jax.random.key(5))
  examples = jax.tree.map(lambda x: x[:20], mnist.train)

  def loss(limits):
    training = trained(
      1, examples, order_rng, dropout_rng, 0.4, batch_size=20, limits=limits
    )
    return float(training.metrics.sums["loss"])

  limits = augmentation.Limits(10, 0, 0, 2, 0, num_steps=0)
  clean = loss(None)
  np.testing.assert_allclose(loss(limits), clean, rtol=1e-5)
  assert abs(loss(limits._replace(num_steps=1)) - clean) > 1e-2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_is_finite_notices_a_single_bad_parameter(mnist, value):
  examples = jax.tree.map(lambda x: x[:50], mnist.train)
  rngs = jax.random.split(jax.random.key(0))
  training = trained(1, examples, *rngs, batch_size=10)
  assert steps.is_finite(training)
  params = training.state.params
  kernel = params["dense"]["kernel"].at[0, 0].set(value)
  bad = {**params, "dense": {**params["dense"], "kernel": kernel}}
  bad = training.replace(state=training.state.replace(params=bad))
  assert np.isfinite(bad.metrics.sums["loss"])
  assert not steps.is_finite(bad)
