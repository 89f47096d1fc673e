"""The devices: arrays are copied to all of them, a batch is split over them."""

import contextlib
import functools
from typing import TypeVar

from absl import app
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


def check() -> None:
  """Raises app.UsageError if JAX_PLATFORMS names none that JAX finds."""
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:  # The latter says nothing.
    raise app.UsageError(
      f"JAX_PLATFORMS={jax.config.values['jax_platforms']}: JAX finds no such"
      f" device; {str(error) or 'JAX_PLATFORMS= takes the best that there is'}"
    ) from error


def use_platform(platform: str | None) -> None:
  """Trains there, or says what there is: never silently somewhere else."""
  if platform == "cpu":
    jax.config.update("jax_platforms", "cpu")
  check()
  if platform and jax.default_backend() != platform:
    found = ", ".join(sorted({d.device_kind for d in jax.devices()}))
    raise app.UsageError(
      f"--platform={platform}: JAX finds {jax.device_count()} x {found}, of"
      f" the platform {jax.default_backend()}"
    )


def on_host() -> contextlib.AbstractContextManager:
  """Computes on the host's CPU if JAX may use it, so nothing is fetched."""
  try:
    return jax.default_device(jax.local_devices(backend="cpu")[0])
  except RuntimeError:  # JAX_PLATFORMS names others only.
    return contextlib.nullcontext()
