import threading

from conftest import files_of_at_most
from conftest import read_events
from conftest import read_jsonl
import numpy as np
import pytest

from configs import default
from rundir import files
from rundir import logs


def scalars(workdir, tag):
  return {
    event.step: value.simple_value
    for event in read_events(workdir)
    for value in event.summary.value
    if value.tag == tag
  }


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
  assert scalars(tmp_path, "train_loss") == {10: 2.5}
  assert scalars(tmp_path, "validation_accuracy") == {20: 0.5}
  values = {
    value.tag: value
    for event in read_events(tmp_path)
    for value in event.summary.value
  }
  assert values["probabilities"].histo.num == 20
  np.testing.assert_allclose(values["probabilities"].histo.sum, 2.0)
  hparams = values["_hparams_/session_start_info"].metadata.plugin_data
  for key in config:
    assert key.encode() in hparams.content


def test_pictures_are_skipped_while_earlier_ones_are_drawn(
  tmp_path, config, monkeypatch
):
  begun, go_on, drawn = threading.Event(), threading.Event(), []

  def draw(self, step, *_):
    begun.set()
    assert go_on.wait(60)
    drawn.append(step)

  monkeypatch.setattr(logs.Logger, "_draw", draw)
  with logs.Logger(tmp_path, config, 0) as logger:
    assert logger.can_draw()
    logger.pictures(10, *[None] * 5)
    assert begun.wait(60)
    assert not logger.can_draw()
    logger.pictures(30, *[None] * 5)  # The last ones are drawn all the same.
    go_on.set()
  assert drawn == [10, 30]


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path, config):
  with logs.Logger(tmp_path, config, 0) as logger:
    for step in (10, 20, 30):
      logger.train(step, {"loss": 1 / step, "accuracy": 0.5}, 0.001)
    logger.evaluation(30, "test", {"loss": 1.5, "accuracy": 0.5})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 3')  # The process was killed here.
  with logs.Logger(tmp_path, config, 20):
    pass
  assert [record["step"] for record in read_jsonl(tmp_path)] == [10, 20]


def test_metrics_that_cannot_be_written_do_not_stop_the_run(
  tmp_path, config, caplog
):
  with logs.Logger(tmp_path, config, 0) as logger:
    logger.train(1, {"loss": 1.0, "accuracy": 0.5}, 0.001)
    logger._tensorboard.flush()
    with files_of_at_most(1000):
      # TensorBoardX's queue holds 10: more would wait for a thread that died.
      for step in range(2, 60):
        logger.train(step, {"loss": 1.0, "accuracy": 0.5}, 0.001)
  lost = [
    r.getMessage() for r in caplog.records if "cannot be written" in r.msg
  ]
  assert len(lost) == 2  # Each file once.
  assert any(
    f"{tmp_path}/metrics.jsonl cannot be written" in text for text in lost
  )
  steps = [record["step"] for record in files.read_metrics(tmp_path)]
  assert steps == [*range(1, len(steps) + 1)]  # But for the one cut off.
  with logs.Logger(tmp_path, config, 1):
    pass
  assert [record["step"] for record in read_jsonl(tmp_path)] == [1]


def test_a_complete_run_keeps_its_lines_but_the_test_sets(tmp_path, config):
  with logs.Logger(tmp_path, config, 0) as logger:
    logger.train(30, {"loss": 1.0, "accuracy": 0.5}, 0.001)
    logger.evaluation(30, "test", {"loss": 1.5, "accuracy": 0.5})
  with logs.Logger(tmp_path, config, 30) as logger:
    logger.evaluation(30, "test", {"loss": 1.5, "accuracy": 0.5})
  kinds = [sorted(record)[-1] for record in read_jsonl(tmp_path)]
  assert kinds == ["train_loss", "test_loss"]
