"""Traces some of the training steps, to see where their time goes."""

from collections.abc import Callable
import pathlib
from typing import Any

from absl import logging
import jax

from machine import processes


class Profiler:
  """Traces a few training steps; a context manager.

  TensorBoard's profile plugin shows the trace, and so does ui.perfetto.dev the
  file beside it. Nothing that fails here stops a run.
  """

  def __init__(self, workdir: pathlib.Path, begin: int, num_steps: int):
    """Prepares to trace `num_steps` steps, if any, after the step `begin`."""
    self._workdir = workdir
    self._begin = begin
    self.boundaries = [begin, begin + num_steps] if num_steps else []
    self._is_tracing = False

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, *_) -> None:
    if len(self.boundaries) == 2:
      logging.warning(
        "No steps were traced: training did not go on from step %d",
        self._begin,
      )
    elif self._is_tracing:  # The last step came first, or a signal.
      self._try(self._stop)

  def at(self, step: int, training: Any) -> bool:
    """Begins or ends the trace, if this is the step for that.

    Args:
      step: the number of steps that were dispatched.
      training: what they compute, which is waited for.

    Returns:
      whether it did, and so took time.
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
    if not processes.is_first():  # The others stop at the same steps.
      return
    try:
      operation()
    except Exception as error:
      logging.warning("The steps are not traced: %s", error)
