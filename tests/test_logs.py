import io
import os
import sys
import time

from conftest import files_of_at_most
from conftest import read_events
from conftest import read_jsonl
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.proto import plugin_hparams_pb2
import tqdm

from configs import default
from rundir import files
from rundir import logs


def scalars(workdir, tag):
  """Returns the points that TensorBoard shows, by step."""
  points = {}
  for event in read_events(workdir):
    if event.session_log.status == event_pb2.SessionLog.START:
      # TensorBoard hides earlier records of this step and later ones.
      points = {s: points[s] for s in points if s < event.step}
    for value in event.summary.value:
      if value.tag == tag:
        points[event.step] = value.simple_value
  return points


@pytest.fixture
def config():
  config = default.get_config()
  config.num_steps = 30
  return config


def test_writes_jsonl_and_tensorboard(tmp_path, config):
  probabilities = np.full((2, 10), 0.1)
  with logs.Logger(tmp_path, config, 0) as logger:
    logger.train(10, {"loss": 2.5, "accuracy": 0.25}, 0.001)
    logger.probabilities(10, np.array([3, 4]), probabilities)
    assert [r["step"] for r in read_jsonl(tmp_path)] == [10]  # Right away.
    logger.evaluation(20, "validation", {"loss": 1.5, "accuracy": 0.5})
  train, validation = read_jsonl(tmp_path)
  assert train.pop("steps_per_second") > 0
  assert train.pop("images_per_second") > 0
  assert train == {
    "step": 10,
    "train_loss": 2.5,
    "train_accuracy": 0.25,
    "learning_rate": 0.001,
  }
  assert validation == {
    "step": 20,
    "validation_loss": 1.5,
    "validation_accuracy": 0.5,
  }
  assert scalars(tmp_path, "loss/train") == {10: 2.5}
  assert scalars(tmp_path, "accuracy/validation") == {20: 0.5}
  values = {
    value.tag: value
    for event in read_events(tmp_path)
    for value in event.summary.value
  }
  assert values["probabilities"].histo.num == 20
  np.testing.assert_allclose(values["probabilities"].histo.sum, 2.0)


def test_a_resumed_run_drops_records_that_it_will_write_again(tmp_path, config):
  with logs.Logger(tmp_path, config, 0) as logger:
    for step in (10, 20, 21, 30):
      logger.train(step, {"loss": 2.0, "accuracy": 0.5}, 0.001)
    logger.evaluation(30, "test", {"loss": 1.5, "accuracy": 0.5})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 3')  # The process was killed here.
  (events,) = tmp_path.glob("events.*")
  # The next file may get the same name, which has the time in seconds.
  events.rename(tmp_path / "events.out.tfevents.0")
  os.link(tmp_path / "metrics.jsonl", tmp_path / "before")
  before = (tmp_path / "before").read_text()
  with logs.Logger(tmp_path, config, 20) as logger:
    assert [record["step"] for record in read_jsonl(tmp_path)] == [10, 20]
    logger.train(25, {"loss": 1.0, "accuracy": 0.5}, 0.001)
  assert (tmp_path / "before").read_text() == before  # Not written in place.
  assert scalars(tmp_path, "loss/train") == {10: 2, 20: 2, 25: 1}


def test_metrics_that_cannot_be_written_do_not_stop_the_run(
  tmp_path, config, caplog
):
  with logs.Logger(tmp_path, config, 0) as logger:
    logger.train(1, {"loss": 1.0, "accuracy": 0.5}, 0.001)
    logger._tensorboard.flush()
    with files_of_at_most(1000):
      # TensorBoardX's queue holds 10; more would block if its thread had died.
      for step in range(2, 60):
        logger.train(step, {"loss": 1.0, "accuracy": 0.5}, 0.001)
  lost = [
    r.getMessage() for r in caplog.records if "cannot be written" in r.msg
  ]
  assert len(lost) == 2  # Once per file.
  assert any(
    f"{tmp_path}/metrics.jsonl cannot be written" in text for text in lost
  )
  steps = [record["step"] for record in files.read_metrics(tmp_path)]
  assert steps == [*range(1, len(steps) + 1)]  # Without the one cut off.
  with logs.Logger(tmp_path, config, 1):
    pass
  assert [record["step"] for record in read_jsonl(tmp_path)] == [1]


def test_a_complete_run_drops_only_the_test_result(tmp_path, config):
  with logs.Logger(tmp_path, config, 0) as logger:
    logger.train(30, {"loss": 1.0, "accuracy": 0.5}, 0.001)
    logger.evaluation(30, "test", {"loss": 1.5, "accuracy": 0.5})
  with logs.Logger(tmp_path, config, 30) as logger:
    logger.evaluation(30, "test", {"loss": 1.5, "accuracy": 0.5})
  kinds = [sorted(record)[-1] for record in read_jsonl(tmp_path)]
  assert kinds == ["train_loss", "test_loss"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_time_left_is_estimated_from_this_start(
  is_terminal, tmp_path, config, monkeypatch, caplog
):
  now, terminal = 0.0, io.StringIO()
  terminal.isatty = lambda: is_terminal
  monkeypatch.setattr(sys, "stderr", terminal)
  monkeypatch.setattr(time, "perf_counter", lambda: now)
  monkeypatch.setattr(tqdm.std, "time", lambda: now)
  with (
    caplog.at_level("INFO"),
    logs.Logger(tmp_path, config, 20) as logger,
  ):
    now = 8.0
    logger.progress(24)
    logger.train(24, {"loss": 1.0, "accuracy": 0.5}, 0.001)
  (record,) = read_jsonl(tmp_path)
  assert record["steps_per_second"] == 0.5
  if is_terminal:
    assert "24/30 [00:08<00:12," in terminal.getvalue()
  else:
    assert "step 24/30  " in caplog.text
    assert " 0.5 steps/s  50 images/s  00:12 left" in caplog.text


def test_hparams_begin_with_what_differs_from_the_defaults(tiny_run):
  """TensorBoard shows only the first few."""
  found = [
    plugin_hparams_pb2.HParamsPluginData.FromString(
      value.metadata.plugin_data.content
    )
    for event in read_events(tiny_run)
    for value in event.summary.value
    if value.tag == "_hparams_/experiment"
  ]
  names = [info.name for info in found[0].experiment.hparam_infos]
  differing = {"batch_size", "learning_rate", "num_steps"}
  differing |= {"train_split", "validation_split", "test_split"}
  assert {*names[:6]} == differing
  assert "dropout_rate" in names and "data_dir" not in names
