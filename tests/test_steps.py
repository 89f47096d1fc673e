import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import input_pipeline
from model import CNN
import ops
import steps


def create_state(seed=0, learning_rate=0.1):
  return steps.create_train_state(jax.random.key(seed), CNN(), learning_rate)


def test_metrics_are_sums():
  logits = jnp.array([[2.0, 0.0], [0.0, 1.0], [3.0, 3.0]])
  labels = jnp.array([0, 0, 1])
  losses = -np.log([np.exp(2) / (np.exp(2) + 1), 1 / (1 + np.e), 0.5])
  metrics = steps.Metrics.of(logits, labels)
  np.testing.assert_allclose(metrics.loss, losses.sum(), rtol=1e-6)
  # A tie is the first class's, here wrongly.
  assert (metrics.num_correct, metrics.num_examples) == (1, 3)
  part = steps.Metrics.of(logits[::2], labels[::2])
  means = (part + metrics).means()
  expected = (losses.sum() + losses[0] + losses[2]) / 5
  np.testing.assert_allclose(means["loss"], expected, rtol=1e-6)
  assert means["accuracy"] == 2 / 5


@pytest.mark.parametrize("batch_size", [1000, 300, 7, 20_000])
def test_evaluation_counts_every_test_image_once(mnist, batch_size):
  # A predictor that reads a pixel: no two batch sizes may disagree on it.
  def logits(variables, images):
    return variables["params"] * images.sum(axis=(1, 2, 3))[:, None] / 784

  weights = jnp.linspace(1, 2, 10)
  state = steps.TrainState.create(
    apply_fn=logits, params=weights, tx=optax.sgd(0.1)
  )
  images, labels = jax.device_get(mnist.test)
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
  images = input_pipeline.to_float(mnist.train.images[:32])
  labels = mnist.train.labels[:32]
  step = jax.jit(steps.train_step)
  state, losses = create_state(), []
  for _ in range(20):
    state, metrics, _ = step(state, images, labels, jax.random.key(0))
    losses.append(metrics.means()["loss"])
  assert abs(losses[0] - np.log(10)) < 0.2  # It begins by guessing.
  assert losses[-1] < losses[0] / 2
  assert all(np.isfinite(losses))


def test_dropout_is_a_function_of_seed_and_step(mnist):
  images = input_pipeline.to_float(mnist.train.images[:8])
  labels = mnist.train.labels[:8]
  step = jax.jit(steps.train_step)

  def probabilities(state_step, seed):
    state = create_state().replace(step=jnp.int32(state_step))
    return np.asarray(step(state, images, labels, jax.random.key(seed))[2])

  first = probabilities(3, seed=1)
  assert first.shape == (steps.NUM_PROBABILITIES, 10)
  np.testing.assert_allclose(first.sum(axis=1), 1, rtol=1e-6)
  np.testing.assert_array_equal(first, probabilities(3, seed=1))
  assert (first != probabilities(4, seed=1)).all()
  assert (first != probabilities(3, seed=2)).all()


def test_training_takes_the_batches_of_the_order(mnist):
  """The loop's steps equal train_step on batches gathered with NumPy."""
  order_rng, dropout_rng = jax.random.split(jax.random.key(5))
  examples = jax.tree.map(lambda x: x[:50], mnist.train)
  training = steps.start_training(
    create_state(),
    steps.Metrics.zero(),
    input_pipeline.order_at(order_rng, 0, 20, 50),
    20,
    10,
  )
  run = ops.repeated(
    functools.partial(steps.train_on_next_batch, batch_size=20)
  )
  training = run(training, 4, examples, order_rng, dropout_rng)

  epochs = [input_pipeline.epoch_indices(order_rng, e, 50) for e in range(2)]
  batches = np.concatenate(epochs)[:80].reshape(4, 20)
  state, total = create_state(), steps.Metrics.zero()
  step = jax.jit(steps.train_step)
  for batch in batches:
    images = np.float32(np.asarray(examples.images)[batch]) / 255
    labels = np.asarray(examples.labels)[batch]
    state, metrics, probabilities = step(state, images, labels, dropout_rng)
    total += metrics
  assert training.state.step == 4
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    (training.state.params, training.metrics, training.probabilities),
    (state.params, total, probabilities),
  )
  np.testing.assert_array_equal(training.labels, labels[:5])


def test_inspection_is_what_numpy_finds(mnist):
  state = create_state()
  examples = jax.tree.map(lambda x: x[:30], mnist.train)
  rng = jax.random.key(2)
  inspect = jax.jit(functools.partial(steps.inspect, batch_size=20))
  inspection = inspect(state, examples, rng)
  np.testing.assert_array_equal(inspection.image, examples.images[0])
  shapes = {name: x.shape for name, x in inspection.layers.items()}
  assert shapes == {
    "conv1": (14, 14, 32),
    "conv2": (7, 7, 64),
    "dense": (1024,),
  }
  # The last layer of the activations gives the probabilities.
  last = state.params["logits"]
  logits = inspection.layers["dense"] @ last["kernel"] + last["bias"]
  np.testing.assert_allclose(
    inspection.probabilities, jax.nn.softmax(logits), rtol=1e-4
  )
  # A step of plain SGD moves each parameter by rate times the gradient.
  images = input_pipeline.to_float(examples.images[:20])
  step = jax.jit(steps.train_step)
  after, _, _ = step(state, images, examples.labels[:20], rng)
  moved = jax.tree.map(
    lambda a, b: np.linalg.norm(a - b) / 0.1, state.params, after.params
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-3),
    inspection.grad_norms,
    moved,
  )
