"""Training and evaluation steps: pure functions of arrays."""

from collections.abc import Callable
from collections.abc import Mapping
import functools
import math
from typing import Any
from typing import NamedTuple

import flax
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

Variables = Mapping[str, Any]  # Nested dicts of arrays.


class Rngs(NamedTuple):
  """PRNG keys for initialization, data order and dropout."""

  init: jax.Array
  order: jax.Array
  dropout: jax.Array


def rngs(seed: int) -> Rngs:
  """Derives all keys of a run from its seed."""
  return Rngs(*jax.random.split(jax.random.key(seed), 3))


class TrainState(train_state.TrainState):
  """Flax's TrainState, plus other variables and an optional moving average.

  Attributes:
    model_state: the network's collections of variables that are not parameters,
      such as BatchNorm's "batch_stats", by name; often {}.
    ema_params: the moving average of the parameters, or None.
    ema_model_state: the same of model_state.
    ema_decay: the fraction of the averages that each step keeps.
  """

  model_state: Variables = struct.field(default_factory=dict)
  ema_params: Variables | None = None
  ema_model_state: Variables | None = None
  ema_decay: float = struct.field(pytree_node=False, default=0.0)

  @property
  def eval_variables(self) -> Variables:
    """The variables to evaluate with: averages, if there are any."""
    if self.ema_params is None:
      return {"params": self.params, **self.model_state}
    return {"params": self.ema_params, **(self.ema_model_state or {})}

  def starting_from(self, variables: Variables) -> "TrainState":
    """Returns a state with other variables, and averages equal to them."""
    model_state = {k: v for k, v in variables.items() if k != "params"}
    state = self.replace(params=variables["params"], model_state=model_state)
    if self.ema_params is None:
      return state
    return state.replace(
      ema_params=jax.tree.map(jnp.copy, state.params),
      ema_model_state=jax.tree.map(jnp.copy, model_state),
    )

  def apply_gradients(self, *, grads, model_state):
    state = super().apply_gradients(grads=grads, model_state=model_state)
    if self.ema_params is None:
      return state
    # Average over fewer steps at first, like TensorFlow's
    # ExponentialMovingAverage, so the initial parameters are soon forgotten.
    decay = jnp.minimum(self.ema_decay, (1 + state.step) / (10 + state.step))
    new = state.params, model_state
    old = self.ema_params, self.ema_model_state
    averages = optax.incremental_update(new, old, 1 - decay)
    # An average of counters would have another type.
    params, model_state = optax.tree.cast_like(averages, new)
    return state.replace(ema_params=params, ema_model_state=model_state)


def compute_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Computes the loss of each example, which training minimizes.

  Args:
    logits: float32 [B, classes].
    labels: int32 [B].

  Returns:
    The cross-entropy in nats, [B].
  """
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def smooth_loss(
  logits: jax.Array, labels: jax.Array, smoothing: float
) -> jax.Array:
  """Computes the loss that is expected if some labels are replaced, [B].

  Each label is replaced by a random class with the probability `smoothing`. For
  the cross-entropy, this is label smoothing (Szegedy et al., arXiv 1512.00567).
  """
  classes = jnp.arange(logits.shape[-1])
  of_class = jax.vmap(lambda k: compute_loss(logits, jnp.full_like(labels, k)))(
    classes
  )
  kept = (1 - smoothing) * compute_loss(logits, labels)
  return kept + smoothing * of_class.mean(axis=0)


def compute_metrics(
  logits: jax.Array, labels: jax.Array
) -> dict[str, jax.Array]:
  """Computes the metrics of each example; to add a metric, add a line.

  Args:
    logits: float32 [B, classes].
    labels: int32 [B].

  Returns:
    The values of each metric by name, [B], one per example; their means are
    logged.
  """
  return {
    "loss": compute_loss(logits, labels),
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
  def of(
    cls, logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0
  ) -> "Metrics":
    """Sums the metrics of one batch from logits [B, classes] and labels [B]."""
    values = compute_metrics(logits, labels)
    if label_smoothing:
      values["loss"] = smooth_loss(logits, labels, label_smoothing)
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
  """Initializes the variables and the optimizer.

  Args:
    rng: the key for the parameters.
    model: the network.
    tx: the optimizer.
    ema_decay: see `TrainState`; 0 keeps no averages.
  """

  @jax.jit
  def create(rng):  # An argument, so that all seeds share a program.
    images = jnp.zeros((1, *model.image_shape))
    model_state, params = flax.core.pop(model.init(rng, images), "params")
    averages = (params, model_state) if ema_decay else (None, None)
    state = TrainState.create(
      apply_fn=model.apply,
      params=params,
      tx=tx,
      model_state=model_state,
      ema_params=averages[0],
      ema_model_state=averages[1],
      ema_decay=ema_decay,
    )
    return state.replace(step=jnp.zeros((), jnp.int32))

  return create(rng)


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
    label_smoothing: the part of the labels that the loss takes for random.

  Returns:
    The state after the step, and the batch's metrics. They are computed before
    the update, with dropout.
  """
  rngs = {"dropout": jax.random.fold_in(rng, state.step)}

  def loss_fn(params):
    logits, model_state = state.apply_fn(
      {"params": params, **state.model_state},
      images,
      train=True,
      rngs=rngs,
      mutable=[*state.model_state],
    )
    metrics = Metrics.of(logits, labels, label_smoothing)
    return metrics.sums["loss"] / labels.size, (model_state, metrics)

  grads, (model_state, metrics) = jax.grad(loss_fn, has_aux=True)(state.params)
  return state.apply_gradients(grads=grads, model_state=model_state), metrics


def eval_step(state: TrainState, images: jax.Array) -> jax.Array:
  """Maps images, uint8 or floats in [0, 1], to logits, float32 [B, classes]."""
  if images.dtype == jnp.uint8:
    images = input_pipeline.to_float(images)
  return state.apply_fn(state.eval_variables, images)


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
  """Returns whether the variables and the loss are finite numbers."""
  state, loss = training.state, training.metrics.sums["loss"]
  values = jax.tree.leaves((state.params, state.model_state, loss))
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
  run = compiling.jit_loop(eval_on_next_batch, batch_size=batch_size)

  @compiling.jit
  def score(logits, labels):
    return Metrics.of(logits, labels), jax.nn.softmax(logits)

  def evaluate(state):
    images = jax.ShapeDtypeStruct(
      (len(labels), *examples.image_shape), jnp.float32
    )
    shape = jax.eval_shape(eval_step, state, images).shape
    logits = np.zeros(shape, np.float32)
    carry = devices.replicate((np.int32(0), logits))
    _, logits = run(carry, math.ceil(len(labels) / batch_size), state, examples)
    metrics, probabilities = score(logits, labels)
    return jax.device_get(metrics).means(), probabilities

  return evaluate
