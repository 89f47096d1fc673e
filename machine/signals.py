"""Signals that tell the training to stop."""

from collections.abc import Iterator
import contextlib
import itertools
import signal
import threading

import jax
from jax.experimental import multihost_utils


class Stop:
  """Notes SIGINT, SIGTERM and SIGHUP; a second one ends the process at once.

  A lost terminal sends SIGHUP more than once, and a shutdown sends it after
  SIGTERM, so it never ends the process at once. Under nohup it is ignored.

  Of several processes, JAX takes every SIGTERM, and a second SIGINT ends one.
  """

  def __init__(self):
    self._noted = None
    self._count = itertools.count(1)
    self.handlers = dict.fromkeys(
      (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), self._note
    )
    if jax.process_count() > 1:
      # SIGTERM is taken by JAX, which has the processes agree on a step.
      self.handlers = dict.fromkeys(
        (signal.SIGINT, signal.SIGHUP), self._pass_on
      )
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
      del self.handlers[signal.SIGHUP]

  def check(self) -> signal.Signals | None:
    """Returns the signal that tells the training to stop now, if one does.

    All processes must call it at the same steps, and get the same answer.
    """
    # JAX lets them stop at the number that follows the largest that it was
    # given: not steps, which begin anywhere and of which some are passed over.
    if multihost_utils.reached_preemption_sync_point(next(self._count)):
      return signal.SIGTERM
    return self._noted

  def _note(self, number, _):
    self._noted = signal.Signals(number)
    self._stop_handling(number)

  def _pass_on(self, number, _):
    self._stop_handling(number)
    signal.raise_signal(signal.SIGTERM)

  def _stop_handling(self, number):
    """Lets the next signal end the process, unless the terminal is lost."""
    for handled in self.handlers:
      if handled == signal.SIGHUP:
        signal.signal(handled, signal.SIG_IGN)
      elif number != signal.SIGHUP:
        signal.signal(handled, signal.SIG_DFL)


@contextlib.contextmanager
def noted() -> Iterator[Stop]:
  """Notes signals until its end, if this is the main thread."""
  stop = Stop()
  previous = {}
  if threading.current_thread() is threading.main_thread():
    for number, handler in stop.handlers.items():
      previous[number] = signal.signal(number, handler)
  try:
    yield stop
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
