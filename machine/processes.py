"""The processes that train together: joining, taking turns, stopping."""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import os
import re
import socket

from absl import app
from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np

_HEARTBEAT_TIMEOUT = 60  # Seconds after which a lost process ends the others.


def join(
  coordinator_address: str | None,
  num_processes: int | None,
  process_id: int | None,
) -> None:
  """Joins the processes that were started together, if they were.

  That is where an argument is given, and in Slurm, Open MPI and Cloud TPU pods.
  JAX finds out there what is not given. Must come before any computation.

  Args:
    coordinator_address: host:port, where the process 0 listens.
    num_processes: how many there are.
    process_id: of this one, counted from 0.

  Raises:
    app.UsageError: something is wrong, or JAX cannot find it out.
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
    raise app.UsageError(
      f"cannot join other processes: {error}; accepted are"
      " --coordinator_address=HOST:PORT, --num_processes and --process_id of 0"
      " to one less, or a launcher that JAX knows"
    ) from error


def _check_address(address: str, is_listening: bool) -> None:
  """Raises app.UsageError where JAX, which cannot listen, might crash."""
  match = re.fullmatch(r".+:(\d{1,5})", address, re.ASCII)
  if not match or not 0 < int(match[1]) < 2**16:
    raise app.UsageError(
      f"--coordinator_address={address}: must be HOST:PORT, such as"
      " localhost:8476"
    )
  if is_listening:
    try:
      socket.create_server(("", int(match[1]))).close()
    except OSError as error:
      raise app.UsageError(
        f"--coordinator_address={address}: process 0 cannot listen there:"
        f" {error.strerror}"
      ) from error


def _are_several_started() -> bool:
  """Whether the launcher's variables say so; JAX would ask the network too."""
  counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
  counts += ("MEGASCALE_NUM_SLICES",)
  return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or any(
    os.environ.get(name, "1") != "1" for name in counts
  )


def is_first() -> bool:
  """Whether this is the process that writes."""
  return jax.process_index() == 0


def have_the_same(numbers: Sequence[int]) -> bool:
  """Whether these numbers, of 32 bits, are the same in all processes."""
  if jax.process_count() == 1:
    return True
  found = multihost_utils.process_allgather(np.array(numbers, np.uint32))
  return bool((found == found[:1]).all())


def sync(name: str) -> None:
  """Waits until all processes are here."""
  multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def first_then_others(name: str) -> Iterator[None]:
  """Lets the other processes in when the first one has come through."""
  if not is_first():
    sync(name)
  yield
  if is_first():
    sync(name)
