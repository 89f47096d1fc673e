"""Processes that train together: how they join and take turns."""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import os
import re
import socket

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np

from machine import errors

_HEARTBEAT_TIMEOUT = 60  # Seconds until a lost process ends the others.


def join(
  coordinator_address: str | None,
  num_processes: int | None,
  process_id: int | None,
) -> None:
  """Joins the other processes if this is one of several.

  There are several if any argument is given, or if Slurm, Open MPI or a Cloud
  TPU pod started them; JAX infers missing arguments. Must be called before any
  computation.

  Args:
    coordinator_address: host:port, where process 0 listens.
    num_processes: the number of processes.
    process_id: the index of this process, from 0.

  Raises:
    errors.UserError: if an argument is wrong, or JAX cannot infer one.
  """
  is_given = (coordinator_address, num_processes, process_id) != (None,) * 3
  if not (is_given or _are_several_started()):
    return
  if coordinator_address:
    _check_address(coordinator_address, is_listening=process_id == 0)
  logging.info("Joining the other processes")
  try:
    jax.distributed.initialize(
      coordinator_address,
      num_processes,
      process_id,
      heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
    )
  except (ValueError, IndexError, RuntimeError) as error:
    raise errors.UserError(
      f"cannot join the other processes: {error}; start each process with"
      " --coordinator_address=HOST:PORT, --num_processes=N and --process_id=I"
      " from 0 to N - 1, or use a launcher that JAX knows"
    ) from error


def _check_address(address: str, is_listening: bool) -> None:
  """Validates the address; JAX may crash if it cannot listen there."""
  match = re.fullmatch(r".+:(\d{1,5})", address, re.ASCII)
  if not match or not 0 < int(match[1]) < 2**16:
    raise errors.UserError(
      f"--coordinator_address={address}: must be HOST:PORT, such as"
      " localhost:8476"
    )
  if is_listening:
    try:
      socket.create_server(("", int(match[1]))).close()
    except OSError as error:
      raise errors.UserError(
        f"--coordinator_address={address}: process 0 cannot listen there:"
        f" {error.strerror}"
      ) from error


def _are_several_started() -> bool:
  """Returns whether a launcher's variables announce several processes."""
  counts = [
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
    "MEGASCALE_NUM_SLICES",
  ]
  return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or any(
    os.environ.get(name, "1") != "1" for name in counts
  )


def is_first() -> bool:
  """Returns whether this is process 0, the one that writes."""
  return jax.process_index() == 0


def have_the_same(numbers: Sequence[int]) -> bool:
  """Returns whether all processes have the same 32-bit numbers."""
  if jax.process_count() == 1:
    return True
  found = multihost_utils.process_allgather(np.array(numbers, np.uint32))
  return bool((found == found[:1]).all())


def sync(name: str) -> None:
  """Waits until all processes have reached this call."""
  multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def first_then_others(name: str) -> Iterator[None]:
  """Runs the body in process 0 first, then in the others."""
  if not is_first():
    sync(name)
  yield
  if is_first():
    sync(name)
