"""Signals that tell training to stop."""

from collections.abc import Iterator
import contextlib
import itertools
import signal
import threading

import jax
from jax.experimental import multihost_utils

# These never end the process, however often they arrive. A lost terminal sends
# SIGHUP more than once, and a shutdown sends it after SIGTERM. Job scripts have
# SIGUSR1 sent as a warning, well before SIGTERM.
_WARNINGS = (signal.SIGHUP, signal.SIGUSR1)


class Stop:
  """Records SIGINT, SIGTERM, SIGHUP or SIGUSR1.

  A second SIGINT or SIGTERM ends the process at once. SIGHUP and SIGUSR1 stay
  ignored if they were, as SIGHUP is under nohup.

  If several processes train together, JAX handles every SIGTERM, and a second
  SIGINT ends the process that it is sent to.
  """

  def __init__(self):
    self._noted = None
    self._count = itertools.count(1)
    self.handlers = dict.fromkeys(
      (signal.SIGINT, signal.SIGTERM, *_WARNINGS), self._note
    )
    if jax.process_count() > 1:
      # JAX handles SIGTERM, and makes the processes agree on a step.
      self.handlers = dict.fromkeys((signal.SIGINT, *_WARNINGS), self._pass_on)
    for number in _WARNINGS:
      if signal.getsignal(number) == signal.SIG_IGN:
        del self.handlers[number]

  def check(self) -> signal.Signals | None:
    """Returns the signal that tells training to stop now, if there was one.

    All processes must call this at the same steps; they get the same answer.
    """
    # JAX stops them all at one more than the largest number passed so far. Step
    # numbers have gaps and may skip that one, so count the calls instead.
    if multihost_utils.reached_preemption_sync_point(next(self._count)):
      return signal.SIGTERM
    return self._noted

  def _note(self, number, _):
    if number not in _WARNINGS:
      self._noted = signal.Signals(number)
      for each in (signal.SIGINT, signal.SIGTERM):  # The next one ends it.
        signal.signal(each, signal.SIG_DFL)
    self._noted = self._noted or signal.Signals(number)

  def _pass_on(self, number, _):
    if number == signal.SIGINT:
      signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def noted() -> Iterator[Stop]:
  """Records signals while the body runs, if this is the main thread."""
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
