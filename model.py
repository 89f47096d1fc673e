"""The convolutional network of TensorFlow's "Guide to TF Layers" tutorial."""

import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp

import ops

_glorot_uniform = nn.initializers.glorot_uniform()  # The default of tf.layers.


class ConvPool(nn.Module):
  """A 5x5 convolution with bias and ReLU, then 2x2 max-pooling.

  Attributes:
    features: the number of filters.
    dtype: the type to convolve in; the parameters and output are float32.
  """

  features: int
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, H, W, C] to [B, H // 2, W // 2, features]."""
    conv = nn.Conv(
      self.features,
      (5, 5),
      use_bias=False,
      kernel_init=_glorot_uniform,
      dtype=self.dtype,
    )
    nn.share_scope(self, conv)  # The kernel's name is conv1/kernel.
    x = conv(x)
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    # Bias and ReLU are monotone, so they commute with max-pooling. After it,
    # they process only a quarter of the elements.
    return nn.relu(ops.max_pool(x) + bias)


class CNN(nn.Module):
  """Two convolutions with max-pooling, a dense layer, dropout and logits.

  This is the tutorial's network; for [28, 28, 1] images it has 3,274,634
  parameters.
  https://github.com/tensorflow/tensorflow/blob/r1.12/tensorflow/examples/tutorials/layers/cnn_mnist.py

  Attributes:
    num_classes: the number of logits.
    dropout_rate: the fraction of the dense layer dropped in training.
    image_shape: (height, width, channels) of one image.
    dtype: the type that the convolutions and the dense layer compute in; the
      parameters and the logits are float32.
  """

  num_classes: int = 10
  dropout_rate: float = 0.4
  image_shape: tuple[int, int, int] = (28, 28, 1)
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Computes the logits.

    Args:
      images: floats in [0, 1], [B, height, width, channels]. They may also be
        flat, [B, height * width * channels], or, if there is only one channel,
        [B, height, width].
      train: whether to apply dropout, which uses the "dropout" RNG.

    Returns:
      Logits, float32 [B, num_classes].

    Raises:
      ValueError: if the images have any other shape.
    """
    dense = functools.partial(nn.Dense, kernel_init=_glorot_uniform)
    x = _to_nhwc(images, self.image_shape)
    x = ConvPool(32, self.dtype, name="conv1")(x)
    x = ConvPool(64, self.dtype, name="conv2")(x)
    x = x.reshape(x.shape[0], -1)
    x = nn.relu(dense(1024, dtype=self.dtype, name="dense")(x))
    x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
    return dense(self.num_classes, dtype=jnp.float32, name="logits")(x)


def _to_nhwc(images: jax.Array, image_shape: tuple[int, int, int]) -> jax.Array:
  """Reshapes images to [B, height, width, channels]."""
  height, width, channels = image_shape
  accepted = [image_shape, (math.prod(image_shape),)]
  if channels == 1:
    accepted.append((height, width))
  if images.shape[1:] not in accepted:
    shapes = " or ".join(
      f"[B, {', '.join(map(str, shape))}]" for shape in accepted
    )
    raise ValueError(
      f"images have the shape {list(images.shape)}; must be {shapes}"
    )
  return images.reshape(-1, *image_shape)
