"""Collects what TensorBoard shows of the inside of a network."""

from flax import struct
import jax
import jax.numpy as jnp

import augmentation
import input_pipeline
import steps

_NUM_DEFORMED = 20  # Images shown before and after augmentation.


class Inspection(struct.PyTreeNode):
  """What TensorBoard shows of the inside of a network.

  Attributes:
    image: uint8 [height, width, channels].
    label: its class, int32 scalar.
    layers: the output of each layer, in order: [height, width, features] or
      [features].
    layer_names: the names of the layers.
    probabilities: for the image, [classes].
    grad_norms: the L2 norm of the loss's gradient for each parameter.
    originals: some images, float32 [k, height, width, channels] in [0, 1].
    deformed: the same images, augmented as in training, or None.
  """

  image: jax.Array
  label: jax.Array
  layers: list[jax.Array]
  layer_names: tuple[str, ...] = struct.field(pytree_node=False)
  probabilities: jax.Array
  grad_norms: steps.Params
  originals: jax.Array
  deformed: jax.Array | None


def inspect(
  state: steps.TrainState,
  examples: input_pipeline.Examples,
  dropout_rng: jax.Array,
  *,
  batch_size: int,
  label_smoothing: float = 0.0,
  limits: augmentation.Limits | None = None,
) -> Inspection:
  """Computes activations of the first example and gradients of the first batch.

  The layers are the network's submodules with parameters, except the one that
  returns the logits.
  """
  images = input_pipeline.to_float(examples.images[:batch_size])
  images = examples.unflatten(images)
  labels = examples.labels[:batch_size]
  grads, _ = steps.gradients(
    state, images, labels, dropout_rng, label_smoothing
  )
  logits, variables = state.apply_fn(
    {"params": state.eval_params},
    images[:1],
    capture_intermediates=True,
    mutable=["intermediates"],
  )
  outputs = {
    name: captured["__call__"][0]
    for name, captured in variables["intermediates"].items()
    if name in state.params and "__call__" in captured
  }
  outputs = {name: x for name, x in outputs.items() if x is not logits}
  originals, deformed = images[:_NUM_DEFORMED], None
  if limits:
    deformed = steps.augment(dropout_rng, state.step, originals, limits)
  return Inspection(
    image=examples.images[0].reshape(examples.image_shape),
    label=labels[0],
    layers=[x[0] for x in outputs.values()],
    layer_names=tuple(outputs),
    probabilities=jax.nn.softmax(logits[0]),
    grad_norms=jax.tree.map(lambda grad: jnp.sqrt((grad**2).sum()), grads),
    originals=originals,
    deformed=deformed,
  )
