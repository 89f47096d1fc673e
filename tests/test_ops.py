import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ops


@pytest.mark.parametrize(
  "shape", [(3, 8, 6, 5), (2, 7, 5, 3), (1, 3, 2, 1), (1, 2, 3, 1)]
)
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
