import gzip
import json
from unittest import mock

import jax
import pytest

from machine import compiling
from machine import profiling
import steps
import train


@pytest.fixture
def no_pictures(monkeypatch):
  monkeypatch.setattr(train, "_draw", lambda *args: None)


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_trace_covers_the_steps_between_two_logs(
  platform, tiny_config, tmp_path, monkeypatch
):
  """On accelerators, one dispatch runs several steps."""
  tiny_config.update(num_steps=12, eval_every_steps=12)
  tiny_config.update(checkpoint_every_steps=12)
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  events = []
  jit_loop = compiling.jit_loop

  def recorded(step, **static):
    run = jit_loop(step, **static)

    def recording_run(carry, num_steps, *args):
      if isinstance(carry, steps.Training):
        events.append(num_steps)
      return run(carry, num_steps, *args)

    return recording_run

  monkeypatch.setattr(compiling, "jit_loop", recorded)
  monkeypatch.setattr(
    jax.profiler, "start_trace", lambda *_, **__: events.append("begin")
  )
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("end"))
  train.train_and_evaluate(tiny_config, tmp_path, profile=True)
  if platform == "gpu":  # There is a log every 5 steps.
    assert events == [5, "begin", 5, "end", 2]
  else:
    assert events == [*[1] * 5, "begin", *[1] * 5, "end", 1, 1]


@pytest.mark.usefixtures("no_pictures")
def test_tensorboard_and_perfetto_find_the_trace(tiny_config, tmp_path, caplog):
  tiny_config.num_steps = 7  # The trace ends with the run.
  with caplog.at_level("INFO"):
    train.train_and_evaluate(tiny_config, tmp_path, profile=True)
  (folder,) = (tmp_path / "plugins/profile").iterdir()
  assert f"The trace is in {folder}" in caplog.messages
  assert [*folder.glob("*.xplane.pb")]
  trace = json.loads(
    gzip.decompress((folder / "perfetto_trace.json.gz").read_bytes())
  )
  names = [event.get("name", "") for event in trace["traceEvents"]]
  assert any("train_on_next_batch" in name for name in names)


def test_a_trace_ends_if_training_stops_before_its_second_log(
  tmp_path, monkeypatch
):
  profiler = mock.Mock()
  monkeypatch.setattr(jax, "profiler", profiler)
  tracer = profiling.Tracer(tmp_path, is_wanted=True)
  tracer.at_log()
  tracer.close()
  profiler.stop_trace.assert_called_once_with()


def test_a_trace_that_fails_or_never_starts_does_not_stop_the_run(
  tmp_path, monkeypatch, caplog
):
  profiling.Tracer(tmp_path, is_wanted=False).close()
  assert not caplog.messages
  profiling.Tracer(tmp_path, is_wanted=True).close()
  assert caplog.messages == ["No steps were traced: training ended too early"]
  start = mock.Mock(side_effect=RuntimeError("already started"))
  monkeypatch.setattr(jax.profiler, "start_trace", start)
  tracer = profiling.Tracer(tmp_path, is_wanted=True)
  for _ in range(3):
    tracer.at_log()
  tracer.close()
  start.assert_called_once()
  assert caplog.messages[1:] == ["The steps cannot be traced: already started"]
