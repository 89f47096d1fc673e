"""Signals that tell the training to stop."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import itertools
import signal
import threading

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def noted_signals() -> Iterator[Callable[[], signal.Signals | None]]:
  """Notes SIGINT and SIGTERM; a second one ends the process at once.

  Of several processes, JAX takes every SIGTERM, and a second SIGINT ends one.

  Yields:
    A function that says which signal tells the training to stop now, if one
    does. All processes must call it at the same steps, and get the same answer.
  """
  noted = []
  previous = {}
  count = itertools.count(1)

  def note(number, _):
    noted.append(signal.Signals(number))
    for each in previous:
      signal.signal(each, signal.SIG_DFL)

  def pass_on(number, _):
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(signal.SIGTERM)

  handlers = {signal.SIGINT: note, signal.SIGTERM: note}
  if jax.process_count() > 1:
    # SIGTERM is taken by JAX, which has the processes agree on a step.
    handlers = {signal.SIGINT: pass_on}

  def noted_now():
    # JAX lets them stop at the number that follows the largest that it was
    # given: not steps, which begin anywhere and of which some are passed over.
    if multihost_utils.reached_preemption_sync_point(next(count)):
      return signal.SIGTERM
    return noted[0] if noted else None

  if threading.current_thread() is threading.main_thread():
    for each, handler in handlers.items():
      previous[each] = signal.signal(each, handler)
  try:
    yield noted_now
  finally:
    for each, handler in previous.items():
      signal.signal(each, handler)
