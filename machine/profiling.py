"""Traces a few training steps to show where their time goes."""

from collections.abc import Callable
import pathlib
from typing import Any

from absl import logging
import jax

from machine import processes


class Profiler:
  """Traces a few training steps; a context manager.

  TensorBoard's profile plugin shows the trace, and ui.perfetto.dev opens
  perfetto_trace.json.gz beside it. A failure here does not stop the run.
  """

  def __init__(self, workdir: pathlib.Path, begin: int, num_steps: int):
    """Prepares to trace `num_steps` steps, if any, after step `begin`."""
    self._workdir = workdir
    self._begin = begin
    self.boundaries = [begin, begin + num_steps] if num_steps else []
    self._is_tracing = False

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, *_) -> None:
    if len(self.boundaries) == 2:
      logging.warning(
        "No steps were traced: training did not continue after step %d",
        self._begin,
      )
    elif self._is_tracing:  # Training ended or was stopped early.
      self._try(self._stop)

  def at(self, step: int, training: Any) -> bool:
    """Starts or stops the trace, if this is the step to do so.

    Args:
      step: the number of steps dispatched so far.
      training: the result of those steps, to wait for.

    Returns:
      Whether it started or stopped the trace, which takes time.
    """
    if step not in self.boundaries:
      return False
    self.boundaries.remove(step)
    jax.block_until_ready(training)
    if self.boundaries:
      self._try(self._start)
    elif self._is_tracing:
      self._try(self._stop)
    return True

  def _start(self) -> None:
    jax.profiler.start_trace(self._workdir, create_perfetto_trace=True)
    self._is_tracing = True

  def _stop(self) -> None:
    self._is_tracing = False
    jax.profiler.stop_trace()
    logging.info(
      "The trace of the steps after %d is in %s",
      self._begin,
      max((self._workdir / "plugins/profile").iterdir()),
    )

  def _try(self, operation: Callable[[], None]) -> None:
    if not processes.is_first():  # The others only wait at these steps.
      return
    try:
      operation()
    except Exception as error:
      logging.warning("The steps cannot be traced: %s", error)
