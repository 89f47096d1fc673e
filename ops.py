"""Convolution and max-pooling with gradients that are fast on a CPU."""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from machine import compiling

# The arguments with which `lax.conv_general_dilated` does what `conv` does.
_SIMPLE = {
  "window_strides": (1, 1),
  "padding": "SAME",
  "lhs_dilation": (1, 1),
  "rhs_dilation": (1, 1),
  "feature_group_count": 1,
  "precision": None,
  "preferred_element_type": None,
}


def conv_general_dilated(
  x: jax.Array, kernel: jax.Array, window_strides, padding, **kwargs
) -> jax.Array:
  """Is `lax.conv_general_dilated`, but `conv` where that does the same.

  `flax.linen.Conv` takes it as its argument `conv_general_dilated`.
  """
  kwargs |= {"window_strides": window_strides, "padding": padding}
  if all(kwargs.get(name, value) == value for name, value in _SIMPLE.items()):
    return conv(x, kernel)
  return lax.conv_general_dilated(x, kernel, **kwargs)


def _conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


@jax.custom_vjp
def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolves with stride 1 and zero padding that keeps the size.

  Values and gradients are those of `lax.conv_general_dilated`. XLA computes the
  kernel's gradient as a convolution whose kernel is as large as the image. On a
  CPU with a newer JAX that is slow, so it is arranged in another way there.

  Args:
    x: [B, H, W, C], floating point.
    kernel: [height, width, C, features], with the dtype of x.

  Returns:
    [B, H, W, features].
  """
  return _conv(x, kernel)


def _conv_forward(x, kernel):
  return _conv(x, kernel), (x, kernel)


def _conv_backward(residuals, dy):
  x, kernel = residuals
  (dx,) = jax.linear_transpose(lambda x: _conv(x, kernel), x)(dy)

  def of_kernel(x, dy):
    (dkernel,) = jax.linear_transpose(lambda k: _conv(x, k), kernel)(dy)
    return dkernel

  if not compiling.has_onednn():
    return dx, of_kernel(x, dy)
  if x.shape[-1] == 1:
    on_cpu = _kernel_gradient_of_gray
  elif compiling.trains_with_onednn():
    on_cpu = _kernel_gradient_by_dilation
  else:
    return dx, of_kernel(x, dy)
  on_cpu = functools.partial(on_cpu, kernel.shape)
  return dx, lax.platform_dependent(x, dy, cpu=on_cpu, default=of_kernel)


conv.defvjp(_conv_forward, _conv_backward)


def _same_padding(size: int) -> tuple[int, int]:
  return (size - 1) // 2, size // 2


def _kernel_gradient_of_gray(shape, x, dy):
  """Multiplies dy by a copy of the image for each pixel of the kernel."""
  height, width = dy.shape[1:3]
  x = jnp.pad(x[..., 0], ((0, 0), *map(_same_padding, shape[:2])))
  shifted = [
    x[:, i : i + height, j : j + width].ravel()
    for i in range(shape[0])
    for j in range(shape[1])
  ]
  return (jnp.stack(shifted) @ dy.reshape(-1, shape[-1])).reshape(shape)


def _kernel_gradient_by_dilation(shape, x, dy):
  """Convolves rows in which the channels lie side by side.

  A row of the result then has width * C pixels instead of width, enough for
  oneDNN to compute many at a time. The kernel is dy, dilated to reach the next
  pixel of the same channel. Splitting the channels in two keeps two threads
  equally busy.
  """
  batch, height, width, channels = x.shape
  parts = 2 if channels % 2 == 0 else 1
  step = channels // parts
  x = x.reshape(batch, height, width, parts, step).transpose(3, 1, 2, 4, 0)
  rows, columns = map(_same_padding, shape[:2])
  result = lax.conv_general_dilated(
    x.reshape(parts, height, width * step, batch),
    dy.transpose(1, 2, 0, 3),
    window_strides=(1, 1),
    padding=(rows, tuple(step * n for n in columns)),
    rhs_dilation=(1, step),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  result = result.reshape(parts, *shape[:2], step, shape[-1])
  return result.transpose(1, 2, 0, 3, 4).reshape(shape)


def _corners(x: jax.Array) -> list[jax.Array]:
  """Returns the four pixels of each 2x2 window, in row-major order."""
  return [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]


@jax.custom_vjp
def _max_pool_even(x: jax.Array) -> jax.Array:
  window = (1, 2, 2, 1)
  return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")


def _max_of_corners(x):
  top_left, top_right, left, right = _corners(x)
  y = jnp.maximum(jnp.maximum(top_left, top_right), jnp.maximum(left, right))
  # Otherwise XLA computes it again in every operation that reads it.
  return lax.optimization_barrier(y)


def _max_pool_forward(x):
  # On a CPU, this is three times as fast as XLA's reduce-window.
  y = lax.platform_dependent(x, cpu=_max_of_corners, default=_max_pool_even)
  return y, (x, y)


def _max_pool_backward(residuals, dy):
  x, y = residuals
  # In a tie, only the first maximum gets the gradient. Every window of a blank
  # background is a tie.
  free = jnp.ones(y.shape, bool)
  grads = []
  for corner in _corners(x):
    is_max = corner == y
    grads.append(jnp.where(free & is_max, dy, 0))
    free &= ~is_max
  top, bottom = jnp.stack(grads[:2], axis=3), jnp.stack(grads[2:], axis=3)
  return (jnp.stack([top, bottom], axis=2).reshape(x.shape),)


_max_pool_even.defvjp(_max_pool_forward, _max_pool_backward)


def max_pool(x: jax.Array) -> jax.Array:
  """Max-pools 2x2 windows with stride 2, dropping an odd last row or column.

  Values and gradients equal those of `flax.linen.max_pool(x, (2, 2), (2, 2))`,
  whose gradient (XLA's select-and-scatter) is twenty times slower on a CPU. As
  in Flax and TensorFlow, the gradient of a tie goes to the first maximum in the
  window, in row-major order.

  Args:
    x: [B, H, W, C], floating point.

  Returns:
    [B, H // 2, W // 2, C], with the dtype of x.
  """
  batch, height, width, features = x.shape
  if height % 2 or width % 2:
    # With a symbolic batch size, indexing would become a gather.
    limits = batch, height // 2 * 2, width // 2 * 2, features
    x = lax.slice(x, (0, 0, 0, 0), limits)
  return _max_pool_even(x)
