"""The functional core: pure functions of arrays that train and evaluate."""

from collections.abc import Callable
import functools
import math

from flax import struct
from flax.training import train_state
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

import input_pipeline
import model as model_lib
import ops

TrainState = train_state.TrainState
NUM_PROBABILITIES = 5  # Of how many examples of a batch they are kept.


class Metrics(struct.PyTreeNode):
  """Sums and a count: they add up to the exact mean over any batches.

  Attributes:
    loss: float32 scalar, the sum of the examples' cross-entropies, in nats.
    num_correct: int32 scalar.
    num_examples: int32 scalar.
  """

  loss: jax.Array
  num_correct: jax.Array
  num_examples: jax.Array

  @classmethod
  def zero(cls) -> "Metrics":
    return cls(np.float32(0), np.int32(0), np.int32(0))

  @classmethod
  def of(cls, logits: jax.Array, labels: jax.Array, mask=True) -> "Metrics":
    """Of [B, classes] logits and [B] labels, where the [B] mask is true."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = logits.argmax(axis=-1) == labels
    mask = jnp.broadcast_to(mask, labels.shape)
    return cls(
      loss=jnp.where(mask, losses, 0).sum(),
      num_correct=(correct & mask).sum(dtype=jnp.int32),
      num_examples=mask.sum(dtype=jnp.int32),
    )

  def __add__(self, other: "Metrics") -> "Metrics":
    return jax.tree.map(jnp.add, self, other)

  def means(self) -> dict[str, float]:
    """Fetches the mean loss and the accuracy from the device."""
    loss, num_correct, num_examples = jax.device_get(
      (self.loss, self.num_correct, self.num_examples)
    )
    return {
      "loss": float(loss) / int(num_examples),
      "accuracy": int(num_correct) / int(num_examples),
    }


def create_train_state(
  rng: jax.Array, model: model_lib.CNN, learning_rate: float
) -> TrainState:
  """Initialises the parameters and the optimiser, plain SGD."""

  @jax.jit
  def create():
    images = jnp.zeros((1, *model.image_shape))
    state = TrainState.create(
      apply_fn=model.apply,
      params=model.init(rng, images)["params"],
      tx=optax.sgd(learning_rate),
    )
    return state.replace(step=jnp.zeros((), jnp.int32))

  return create()


def train_step(
  state: TrainState, images: jax.Array, labels: jax.Array, rng: jax.Array
) -> tuple[TrainState, Metrics, jax.Array]:
  """Takes one step of the optimiser.

  Args:
    state: before the step.
    images: float32 [B, height, width, channels] in [0, 1].
    labels: int32 [B].
    rng: the key that every step's dropout comes from.

  Returns:
    The state after the step, and of the batch, as the state before saw it with
    dropout: the metrics, and the first examples' probabilities, float32
    [min(B, NUM_PROBABILITIES), classes].
  """
  rngs = {"dropout": jax.random.fold_in(rng, state.step)}

  def loss_fn(params):
    logits = state.apply_fn({"params": params}, images, train=True, rngs=rngs)
    metrics = Metrics.of(logits, labels)
    return metrics.loss / labels.size, (metrics, logits)

  grads, (metrics, logits) = jax.grad(loss_fn, has_aux=True)(state.params)
  probabilities = jax.nn.softmax(logits[:NUM_PROBABILITIES])
  return state.apply_gradients(grads=grads), metrics, probabilities


def eval_step(
  state: TrainState, images: jax.Array, labels: jax.Array, mask: jax.Array
) -> Metrics:
  """The metrics of the examples of a batch where the bool [B] mask is true."""
  logits = state.apply_fn({"params": state.params}, images)
  return Metrics.of(logits, labels, mask)


class Training(struct.PyTreeNode):
  """What the training loop carries from step to step.

  Attributes:
    state: all that a checkpoint holds.
    order: follows from the seed and the step.
    metrics: the sums since the last log.
    labels: of the last batch's first examples, int32 [k].
    probabilities: of the same examples, float32 [k, classes].
  """

  state: TrainState
  order: input_pipeline.Order
  metrics: Metrics
  labels: jax.Array
  probabilities: jax.Array


def start_training(
  state: TrainState, order: input_pipeline.Order, batch_size: int, classes: int
) -> Training:
  """The carry of a loop that begins with this state and order."""
  kept = min(batch_size, NUM_PROBABILITIES)
  training = Training(
    state=state,
    order=order,
    metrics=Metrics.zero(),
    labels=jnp.zeros(kept, jnp.int32),
    probabilities=jnp.zeros((kept, classes)),
  )
  # Committed to the device, as a restored state is: else JAX compiles anew for
  # every mixture of arrays that are and that are not.
  return jax.device_put(training, jax.devices()[0])


def reset_metrics(training: Training) -> Training:
  """Begins new sums, after a log."""
  return training.replace(
    metrics=jax.device_put(Metrics.zero(), jax.devices()[0])
  )


def train_on_next_batch(
  training: Training,
  examples: input_pipeline.Examples,
  order_rng: jax.Array,
  dropout_rng: jax.Array,
  *,
  batch_size: int,
) -> Training:
  """Gathers the next batch in the order, and takes a step on it."""
  indices, order = input_pipeline.next_indices(
    training.order, order_rng, batch_size
  )
  images = input_pipeline.to_float(examples.images[indices])
  labels = examples.labels[indices]
  state, metrics, probabilities = train_step(
    training.state, images, labels, dropout_rng
  )
  return Training(
    state=state,
    order=order,
    metrics=training.metrics + metrics,
    labels=labels[:NUM_PROBABILITIES],
    probabilities=probabilities,
  )


def eval_on_next_batch(
  carry: tuple[jax.Array, Metrics],
  state: TrainState,
  examples: input_pipeline.Examples,
  *,
  batch_size: int,
) -> tuple[jax.Array, Metrics]:
  """Adds the metrics of the batch that begins at the carried index.

  Where fewer than `batch_size` examples are left, the batch begins earlier, and
  the mask leaves out those that were counted already.
  """
  start, metrics = carry
  begin = jnp.minimum(start, examples.labels.size - batch_size)
  images, labels = (
    lax.dynamic_slice_in_dim(x, begin, batch_size) for x in examples
  )
  mask = begin + jnp.arange(batch_size) >= start
  batch = eval_step(state, input_pipeline.to_float(images), labels, mask)
  return start + batch_size, metrics + batch


def evaluator(
  examples: input_pipeline.Examples, batch_size: int
) -> Callable[[TrainState], dict[str, float]]:
  """Returns a function that scores every example exactly once, in order.

  Args:
    examples: n images and labels on the device.
    batch_size: how many to take at a time; it changes nothing but the speed.

  Returns:
    A function of a state that returns the mean "loss" and the "accuracy".
  """
  size = examples.labels.size
  batch_size = min(batch_size, size)
  run = ops.repeated(
    functools.partial(eval_on_next_batch, batch_size=batch_size)
  )

  def evaluate(state):
    carry = jax.device_put((np.int32(0), Metrics.zero()), jax.devices()[0])
    _, metrics = run(carry, math.ceil(size / batch_size), state, examples)
    return metrics.means()

  return evaluate
