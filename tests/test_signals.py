import signal

import jax
from jax.experimental import multihost_utils
import pytest

from machine import signals


def test_a_second_signal_is_not_caught():
  before = signal.getsignal(signal.SIGINT)
  with signals.noted() as stop:
    assert stop.check() is None
    signal.raise_signal(signal.SIGTERM)
    assert stop.check() == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
  assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.usefixtures("warnings_fail")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_lost_terminal_sends_several_signals(number):
  """And Slurm sends SIGTERM some time after it has sent SIGUSR1."""
  before = signal.getsignal(number)
  with signals.noted() as stop:
    signal.raise_signal(number)
    assert stop.check() == number
    signal.raise_signal(number)  # Would have ended this process.
    signal.raise_signal(signal.SIGTERM)  # As in a shutdown.
    signal.raise_signal(number)
    assert stop.check() == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_lost_terminal_is_ignored_under_nohup(number):
  before = signal.signal(number, signal.SIG_IGN)
  try:
    with signals.noted() as stop:
      signal.raise_signal(number)
      assert stop.check() is None
  finally:
    signal.signal(number, before)


@pytest.mark.usefixtures("warnings_fail")
@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGUSR1])
def test_several_processes_stop_together(first, monkeypatch):
  passed_on, asked, agreed = [], [], False

  def is_agreed(number):
    asked.append(number)
    return agreed

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(
    multihost_utils, "reached_preemption_sync_point", is_agreed
  )
  before = signal.getsignal(signal.SIGINT)
  before_term = signal.signal(  # As JAX handles it for several processes.
    signal.SIGTERM, lambda number, _: passed_on.append(number)
  )
  try:
    with signals.noted() as stop:
      signal.raise_signal(first)
      assert passed_on == [signal.SIGTERM]
      passed_on.clear()
      signal.raise_signal(signal.SIGINT)
      assert passed_on == [signal.SIGTERM]
      assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
      assert stop.check() is None  # The others do not know yet.
      agreed = True
      assert stop.check() == signal.SIGTERM
      signal.raise_signal(signal.SIGTERM)
      assert passed_on == [signal.SIGTERM] * 2
    assert signal.getsignal(signal.SIGINT) == before
  finally:
    signal.signal(signal.SIGTERM, before_term)
  assert asked == sorted({*asked})  # JAX needs a larger number each time.
