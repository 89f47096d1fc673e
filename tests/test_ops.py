import functools

from conftest import jit
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from machine import compiling
import ops


@pytest.mark.parametrize("shape", [(3, 8, 6, 5), (2, 7, 5, 3), (1, 3, 3, 1)])
def test_max_pool_equals_flaxs_bit_for_bit_even_with_ties(shape):
  rng = np.random.default_rng(0)
  # With only four values, most windows have ties.
  x = jnp.asarray(rng.integers(0, 4, shape), jnp.float32)
  flax_max_pool = functools.partial(
    nn.max_pool, window_shape=(2, 2), strides=(2, 2)
  )
  expected, expected_vjp = jax.vjp(flax_max_pool, x)
  actual, actual_vjp = jax.vjp(ops.max_pool, x)
  np.testing.assert_array_equal(actual, expected)
  dy = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
  np.testing.assert_array_equal(actual_vjp(dy)[0], expected_vjp(dy)[0])


def test_max_pool_sends_the_gradient_of_a_tie_to_the_first_maximum():
  x = jnp.zeros((1, 4, 2, 1)).at[0, 3, :, 0].set(1.0)
  dx = jax.grad(lambda x: ops.max_pool(x).sum())(x)
  np.testing.assert_array_equal(
    dx[0, :, :, 0], [[1, 0], [0, 0], [0, 0], [1, 0]]
  )


@pytest.mark.parametrize("shape", [(5, 5, 1, 8), (5, 3, 16, 8), (4, 2, 3, 8)])
@pytest.mark.parametrize("onednn", [True, False])
def test_conv_has_the_values_and_gradients_of_lax(onednn, shape, monkeypatch):
  for name in ("has_onednn", "trains_with_onednn"):
    monkeypatch.setattr(compiling, name, lambda: onednn)
  rng = np.random.default_rng(0)
  x, kernel, dy = (
    jnp.asarray(rng.normal(size=size), jnp.float32)
    for size in ((6, 9, 7, shape[2]), shape, (6, 9, 7, shape[3]))
  )

  def expected(x, kernel):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), "SAME", dimension_numbers=dimensions
    )

  for ours, theirs in zip(
    vjp_of(ops.conv, x, kernel, dy),
    vjp_of(expected, x, kernel, dy),
    strict=True,
  ):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
  "changes",
  [
    {"strides": 2},
    {"padding": "VALID"},
    {"kernel_dilation": 2},
    {"feature_group_count": 4},
  ],
)
def test_other_convolutions_are_those_of_lax(changes):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 9, 4)))
  outputs = []
  for function in (ops.conv_general_dilated, None):
    conv = nn.Conv(8, (3, 3), conv_general_dilated=function, **changes)
    variables = conv.init(jax.random.key(0), x)
    outputs.append(conv.apply(variables, x))
  np.testing.assert_array_equal(*outputs)


def vjp_of(function, x, kernel, dy):
  """Returns the value and the gradients of both arguments."""

  @jit
  def compute(x, kernel, dy):
    y, vjp = jax.vjp(function, x, kernel)
    return y, *vjp(dy)

  return compute(x, kernel, dy)
