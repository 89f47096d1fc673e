"""Training and evaluation steps: pure functions of arrays."""

from collections.abc import Callable
from collections.abc import Mapping
import functools
import math
from typing import Any
from typing import NamedTuple

from flax import struct
from flax.training import train_state
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

import augmentation
import input_pipeline
from machine import compiling
from machine import devices
from model import CNN

Params = Mapping[str, Any]  # Nested dicts of arrays.


class Rngs(NamedTuple):
  """PRNG keys for initialization, data order and dropout."""

  init: jax.Array
  order: jax.Array
  dropout: jax.Array


def rngs(seed: int) -> Rngs:
  """Derives all keys of a run from its seed."""
  return Rngs(*jax.random.split(jax.random.key(seed), 3))


class TrainState(train_state.TrainState):
  """Flax's TrainState, plus an optional moving average of the parameters.

  Attributes:
    ema_params: the average, or None.
    ema_decay: the fraction of the average that each step keeps.
  """

  ema_params: Params | None = None
  ema_decay: float = struct.field(pytree_node=False, default=0.0)

  @property
  def eval_params(self) -> Params:
    """The parameters to evaluate with."""
    return self.params if self.ema_params is None else self.ema_params

  def apply_gradients(self, *, grads):
    state = super().apply_gradients(grads=grads)
    if self.ema_params is None:
      return state
    # Average over fewer steps at first, like TensorFlow's
    # ExponentialMovingAverage, so the initial parameters are soon forgotten.
    decay = jnp.minimum(self.ema_decay, (1 + state.step) / (10 + state.step))
    return state.replace(
      ema_params=optax.incremental_update(
        state.params, self.ema_params, 1 - decay
      )
    )


def compute_metrics(
  logits: jax.Array, labels: jax.Array
) -> dict[str, jax.Array]:
  """Computes the metrics of each example; to add a metric, add a line.

  Args:
    logits: float32 [B, classes].
    labels: int32 [B].

  Returns:
    The values of each metric by name, [B], one per example; their means are
    logged. "loss" is in nats; training minimizes it unless labels are smoothed.
  """
  return {
    "loss": optax.softmax_cross_entropy_with_integer_labels(logits, labels),
    "accuracy": logits.argmax(axis=-1) == labels,
  }


class Metrics(struct.PyTreeNode):
  """Running sums, from which to compute exact means over any set of batches.

  Attributes:
    num_examples: int32 scalar.
    sums: each metric's sum over the examples, a scalar; int32 for integer and
      boolean metrics, otherwise float32.
  """

  num_examples: jax.Array
  sums: dict[str, jax.Array]

  @classmethod
  def zero(cls, num_classes: int) -> "Metrics":
    shapes = jax.eval_shape(
      cls.of, jnp.zeros((1, num_classes)), jnp.zeros(1, jnp.int32)
    )
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)

  @classmethod
  def of(cls, logits: jax.Array, labels: jax.Array) -> "Metrics":
    """Sums the metrics of one batch from logits [B, classes] and labels [B]."""
    values = compute_metrics(logits, labels)
    for name, value in values.items():
      if value.shape != labels.shape:
        raise ValueError(
          f"the metric {name} has the shape {list(value.shape)}; must be"
          f" {list(labels.shape)}, one value per example"
        )
    sums = jax.tree.map(jnp.sum, values)
    return cls(num_examples=jnp.int32(labels.size), sums=sums)

  def __add__(self, other: "Metrics") -> "Metrics":
    return jax.tree.map(jnp.add, self, other)

  def means(self) -> dict[str, float]:
    """Returns the mean of each metric, the loss first."""
    names = sorted(self.sums, key=lambda name: (name != "loss", name))
    count = int(self.num_examples)
    return {name: np.asarray(self.sums[name]).item() / count for name in names}


def create_train_state(
  rng: jax.Array,
  model: CNN,
  tx: optax.GradientTransformation,
  ema_decay: float = 0.0,
) -> TrainState:
  """Initializes the parameters and the optimizer.

  Args:
    rng: the key for the parameters.
    model: the network.
    tx: the optimizer.
    ema_decay: see `TrainState`; 0 keeps no average.

  Raises:
    ValueError: if the network has variables that are not parameters, such as
      batch statistics.
  """

  @jax.jit
  def create():
    images = jnp.zeros((1, *model.image_shape))
    variables = model.init(rng, images)
    if set(variables) != {"params"}:
      raise ValueError(
        f"the network has the variables {', '.join(variables)}; must have only"
        " params, because nothing else is trained or saved"
      )
    params = variables["params"]
    state = TrainState.create(
      apply_fn=model.apply,
      params=params,
      tx=tx,
      ema_params=params if ema_decay else None,
      ema_decay=ema_decay,
    )
    return state.replace(step=jnp.zeros((), jnp.int32))

  return create()


def _smoothed_loss(logits, labels, label_smoothing):
  """Cross-entropy with label smoothing (Szegedy et al., arXiv 1512.00567)."""
  targets = jax.nn.one_hot(labels, logits.shape[-1])
  targets = optax.smooth_labels(targets, label_smoothing)
  return optax.softmax_cross_entropy(logits, targets).mean()


def train_step(
  state: TrainState,
  images: jax.Array,
  labels: jax.Array,
  rng: jax.Array,
  label_smoothing: float = 0.0,
) -> tuple[TrainState, Metrics]:
  """Takes one optimizer step.

  Args:
    state: the state before the step.
    images: float32 [B, height, width, channels] in [0, 1].
    labels: int32 [B].
    rng: the key from which each step's dropout is derived.
    label_smoothing: applied to the training loss, not to the metrics.

  Returns:
    The state after the step, and the batch's metrics. They are computed before
    the update, with dropout.
  """
  rngs = {"dropout": jax.random.fold_in(rng, state.step)}

  def loss_fn(params):
    logits = state.apply_fn({"params": params}, images, train=True, rngs=rngs)
    metrics = Metrics.of(logits, labels)
    if label_smoothing:
      return _smoothed_loss(logits, labels, label_smoothing), metrics
    return metrics.sums["loss"] / labels.size, metrics

  grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
  return state.apply_gradients(grads=grads), metrics


def eval_step(state: TrainState, images: jax.Array) -> jax.Array:
  """Computes logits, float32 [B, classes], from float32 images in [0, 1]."""
  return state.apply_fn({"params": state.eval_params}, images)


class Training(struct.PyTreeNode):
  """What the training loop carries from step to step.

  Attributes:
    state: parameters, optimizer state and step.
    order: the order of the examples. It is not saved, because it follows from
      the seed and the step.
    metrics: the sums since the last log.
  """

  state: TrainState
  order: input_pipeline.Order
  metrics: Metrics


@jax.jit
def is_finite(training: Training) -> jax.Array:
  """Returns whether the parameters and the loss are finite numbers."""
  values = jax.tree.leaves(
    (training.state.params, training.metrics.sums["loss"])
  )
  return jnp.stack([jnp.isfinite(value).all() for value in values]).all()


def reset_metrics(training: Training) -> Training:
  """Resets the sums to zero."""
  return training.replace(metrics=_zeros_like(training.metrics))


@jax.jit
def _zeros_like(metrics):
  # Creating zeros on the device is faster than sending them there.
  return devices.gather(jax.tree.map(jnp.zeros_like, metrics))


def augment(
  dropout_rng: jax.Array,
  step: int | jax.Array,
  images: jax.Array,
  limits: augmentation.Limits,
) -> jax.Array:
  """Deforms the images of a step, [B, height, width, channels]."""
  # Derived from the step's dropout key. Flax folds other constants into that
  # key, so the random streams differ.
  rng = jax.random.fold_in(jax.random.fold_in(dropout_rng, step), 1)
  deform = functools.partial(augmentation.augment, rng, images, limits)
  if limits.num_steps is None:
    return deform()
  # The last steps see images as evaluation does: He et al., "Data Augmentation
  # Revisited", arXiv 1909.09148.
  return lax.cond(step < limits.num_steps, deform, lambda: images)


def train_on_next_batch(
  training: Training,
  examples: input_pipeline.Examples,
  order_rng: jax.Array,
  dropout_rng: jax.Array,
  *,
  batch_size: int,
  label_smoothing: float = 0.0,
  limits: augmentation.Limits | None = None,
) -> Training:
  """Gathers the next batch and takes a step on it."""
  indices, order = input_pipeline.next_indices(
    training.order, order_rng, batch_size
  )
  rows = input_pipeline.to_float(examples.images[devices.split(indices)])
  images = devices.split(examples.unflatten(rows))
  if limits:
    images = devices.split(
      augment(dropout_rng, training.state.step, images, limits)
    )
  state, metrics = train_step(
    training.state,
    images,
    examples.labels[indices],
    dropout_rng,
    label_smoothing,
  )
  return devices.gather(Training(state, order, training.metrics + metrics))


def eval_on_next_batch(
  carry: tuple[jax.Array, jax.Array],
  state: TrainState,
  examples: input_pipeline.Examples,
  *,
  batch_size: int,
) -> tuple[jax.Array, jax.Array]:
  """Computes the logits of the next batch.

  If fewer than `batch_size` images are left, the batch starts earlier and some
  logits are computed again.

  Args:
    carry: the index of the next image, and the logits of all images, float32
      [n, classes].
    state: the state to evaluate.
    examples: n images.
    batch_size: at most n.
  """
  start, logits = carry
  begin = jnp.minimum(start, len(logits) - batch_size)
  rows = lax.dynamic_slice_in_dim(examples.images, begin, batch_size)
  images = input_pipeline.to_float(devices.split(rows))
  images = examples.unflatten(images)
  logits = lax.dynamic_update_slice_in_dim(
    logits, eval_step(state, images), begin, axis=0
  )
  return devices.gather((start + batch_size, logits))


def evaluator(
  examples: input_pipeline.Examples, batch_size: int
) -> Callable[[TrainState], tuple[dict[str, float], jax.Array]]:
  """Returns a function that scores every example exactly once, in order.

  Args:
    examples: n images and labels on the device.
    batch_size: affects only the speed.

  Returns:
    A function of a state that returns the means of the metrics, and the
    probabilities, float32 [n, classes], on the device.
  """
  labels = examples.labels
  batch_size = min(batch_size, len(labels))
  run = compiling.jit_loop(
    functools.partial(eval_on_next_batch, batch_size=batch_size)
  )

  @compiling.jit
  def score(logits):
    return Metrics.of(logits, labels), jax.nn.softmax(logits)

  def evaluate(state):
    images = jax.ShapeDtypeStruct(
      (len(labels), *examples.image_shape), jnp.float32
    )
    shape = jax.eval_shape(eval_step, state, images).shape
    logits = np.zeros(shape, np.float32)
    carry = devices.replicate((np.int32(0), logits))
    _, logits = run(carry, math.ceil(len(labels) / batch_size), state, examples)
    metrics, probabilities = score(logits)
    return jax.device_get(metrics).means(), probabilities

  return evaluate
