"""The devices: arrays are copied to all of them, a batch is split over them."""

import functools
from typing import TypeVar

import jax
from jax import lax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

Tree = TypeVar("Tree")


@functools.cache
def mesh() -> Mesh:
  """All devices of all processes, on one axis, `data`."""
  return jax.make_mesh(
    (jax.device_count(),), ("data",), axis_types=(AxisType.Auto,)
  )


def replicated() -> NamedSharding:
  """The sharding of an array that every device has whole."""
  return NamedSharding(mesh(), PartitionSpec())


def replicate(tree: Tree) -> Tree:
  """Puts a tree of arrays on every device, inside jit too."""
  return jax.device_put(tree, replicated())


def split(batch: jax.Array) -> jax.Array:
  """Inside jit, gives every device its part of the first axis.

  Where the devices do not divide it, every device has the whole batch.
  """
  if len(batch) % mesh().size:
    return batch
  sharding = NamedSharding(mesh(), PartitionSpec("data"))
  return lax.with_sharding_constraint(batch, sharding)
