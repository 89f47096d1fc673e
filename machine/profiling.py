"""Traces training from its first log to its second."""

from collections.abc import Callable
import pathlib

from absl import logging
import jax

from machine import processes


class Tracer:
  """Traces the steps between two logs.

  TensorBoard's profile plugin shows the trace, and ui.perfetto.dev opens
  perfetto_trace.json.gz beside it. A failure here does not stop the run.
  """

  def __init__(self, workdir: pathlib.Path, is_wanted: bool):
    self._workdir = workdir
    self._actions: list[Callable[[], None]] = []
    if is_wanted and processes.is_first():
      self._actions = [self._start, self._stop]

  def at_log(self) -> None:
    """Starts the trace at the first call, and ends it at the second."""
    if not self._actions:
      return
    try:
      self._actions.pop(0)()
    except Exception as error:
      logging.warning("The steps cannot be traced: %s", error)
      self._actions = []

  def close(self) -> None:
    """Ends the trace if training ended or was stopped before its second log."""
    if len(self._actions) == 2:
      logging.warning("No steps were traced: training ended too early")
    else:
      self.at_log()

  def _start(self) -> None:
    jax.profiler.start_trace(self._workdir, create_perfetto_trace=True)

  def _stop(self) -> None:
    jax.profiler.stop_trace()
    traces = self._workdir / "plugins/profile"
    logging.info("The trace is in %s", max(traces.iterdir()))
