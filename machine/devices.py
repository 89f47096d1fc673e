"""Selects devices, copies arrays to all of them and splits batches."""

import functools
import os
from typing import TypeVar

import jax
from jax import lax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from machine import errors

Tree = TypeVar("Tree")


@functools.cache
def mesh() -> Mesh:
  """Returns all devices of all processes on one axis, `data`."""
  return jax.make_mesh(
    (jax.device_count(),), ("data",), axis_types=(AxisType.Auto,)
  )


def replicated() -> NamedSharding:
  """Returns the sharding of an array that every device has in full."""
  return NamedSharding(mesh(), PartitionSpec())


def replicate(tree: Tree) -> Tree:
  """Copies a tree of arrays to every device; not inside jit."""
  return jax.device_put(tree, replicated())


def gather(tree: Tree) -> Tree:
  """Gives every device the whole of each array, inside jit."""
  # Inside jit, JAX drops the sharding given to jax.device_put, so XLA may leave
  # an array split.
  return lax.with_sharding_constraint(tree, replicated())


def split(batch: jax.Array) -> jax.Array:
  """Gives every device its part of the first axis, inside jit.

  If the batch size is not a multiple of the number of devices, each device gets
  the whole batch.
  """
  if len(batch) % mesh().size:
    return batch
  sharding = NamedSharding(mesh(), PartitionSpec("data"))
  return lax.with_sharding_constraint(batch, sharding)


def check() -> None:
  """Raises errors.UserError if JAX finds no device for JAX_PLATFORMS."""
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:  # The latter has no message.
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    raise errors.UserError(
      f"JAX_PLATFORMS={platforms}: JAX finds no such device;"
      f" {str(error) or 'set JAX_PLATFORMS= to use the best one found'}"
    ) from error


def memory() -> int:
  """Returns the memory of a device in bytes; a CPU's is that of the machine."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("bytes_limit") or host_memory()


def host_memory() -> int:
  """Returns the memory of this machine in bytes."""
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
