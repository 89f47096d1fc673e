"""Runs survive changes of the code, the config and what is reported."""

import functools
import json
import math
import shutil
import tarfile

from conftest import PROJECT
from conftest import assert_same_state
from conftest import read_jsonl
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
import evaluate
from machine import devices
from machine import errors
from report import evaluation
from rundir import checkpoints
from rundir import directory
from rundir import files
from rundir import provenance
from rundir import runs
import steps
import train


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
  monkeypatch.setattr(train, "_draw", lambda *args: None)
  monkeypatch.setattr(evaluation, "drawings", lambda evaluated: {})


def edit(path, **changes):
  """Changes values in a JSON file; None removes a key."""
  found = json.loads(path.read_text()) | changes
  found = {key: value for key, value in found.items() if value is not None}
  path.write_text(json.dumps(found))


def test_an_older_run_opens_with_todays_defaults(run, caplog):
  edit(run / "config.json", momentum=None, ema_decay=None)
  edit(run / "dataset.json", crc32=None)
  (run / "made_by.json").unlink()
  with caplog.at_level("INFO"):
    opened = runs.open_run(run)
  assert opened.config.momentum == default.get_config().momentum
  assert "an older version without ema_decay, momentum; using" in caplog.text


def test_the_temperature_is_the_last_valid_one(tmp_path):
  assert runs.read_temperature(tmp_path, 3) == 1
  logged = [(1, 2.0), (2, 0.0), (2, -1.0), (3, math.nan), (4, 5.0)]
  records = [{"step": step, "temperature": x} for step, x in logged]
  (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
  assert runs.read_temperature(tmp_path, 3) == 2


def test_resuming_an_older_run_adds_what_it_lacks(run, tiny_config):
  crc32 = json.loads((run / "dataset.json").read_text())["crc32"]
  assert set(crc32) == {"train", "validation", "test"}
  edit(run / "config.json", momentum=None)
  edit(run / "dataset.json", crc32=None)
  (run / "made_by.json").unlink()
  train.train_and_evaluate(tiny_config, run)
  assert json.loads((run / "config.json").read_text()) == tiny_config.to_dict()
  assert json.loads((run / "dataset.json").read_text())["crc32"] == crc32
  assert provenance.read(run)[0]["step"] == 20


def test_keys_that_the_default_config_lacks_are_kept(run, tiny_config):
  edit(run / "config.json", width=3)
  assert runs.open_run(run).config.width == 3
  with tiny_config.unlocked():
    tiny_config.width = 3
  train.train_and_evaluate(tiny_config, run)
  assert json.loads((run / "config.json").read_text())["width"] == 3
  # A custom key is part of the experiment, like any other.
  tiny_config.width = 4
  with pytest.raises(errors.UserError, match=r"width \(3 there, 4 here\)"):
    train.train_and_evaluate(tiny_config, run)


def test_a_run_keeps_its_values_if_the_defaults_change(run, monkeypatch):
  config = default.get_config()
  config.adam_b2 = 0.95
  monkeypatch.setattr(
    default, "get_config", lambda: config.copy_and_resolve_references()
  )
  assert runs.open_run(run).config.adam_b2 == 0.999


def test_a_tuple_in_a_custom_key_is_the_same_when_it_is_read(run, tiny_config):
  with tiny_config.unlocked():
    tiny_config.sizes = (32, 64)
  dataset = files.read_json(run / "dataset.json")
  directory.write(run, tiny_config, dataset)
  before = (run / "config.json").stat().st_mtime_ns
  directory.create(run, tiny_config, dataset)
  directory.write(run, tiny_config, dataset)
  assert (run / "config.json").stat().st_mtime_ns == before


def test_a_larger_num_steps_can_be_undone(run, tiny_config):
  dataset = files.read_json(run / "dataset.json")
  tiny_config.num_steps = 20_000
  directory.write(run, tiny_config, dataset)
  tiny_config.num_steps = 20
  directory.create(run, tiny_config, dataset)


def test_an_extended_run_with_other_reports_has_the_same_bits(
  tiny_run, tiny_config, tmp_path
):
  tiny_config.update(num_steps=7, eval_every_steps=2, eval_batch_size=50)
  assert train.train_and_evaluate(tiny_config, tmp_path)["global_step"] == 7
  tiny_config.update(
    num_steps=20, log_every_steps=10, checkpoint_every_steps=50
  )
  result = train.train_and_evaluate(tiny_config, tmp_path)
  expected = json.loads((tiny_run / "result.json").read_text())
  assert result == pytest.approx(expected, rel=1e-6)
  assert_same_state(
    runs.open_run(tmp_path).state, runs.open_run(tiny_run).state
  )
  config = json.loads((tmp_path / "config.json").read_text())
  assert config == tiny_config.to_dict()
  tested = [r for r in files.read_metrics(tmp_path) if "test_loss" in r]
  assert [r["step"] for r in tested] == [7, 20]
  losses, expected = (
    {r["step"]: r["train_loss"] for r in read_jsonl(run) if "train_loss" in r}
    for run in (tmp_path, tiny_run)
  )
  assert [*losses] == [5, 7, 10, 20]
  # The log at step 10 covers the steps since 5, as if there were none at 7.
  assert losses[10] == expected[10]


@pytest.mark.parametrize(
  ("of_both", "change"),
  [
    ({}, {"seed": 1}),
    ({}, {"train_split": "train[5000:5101]"}),
    ({}, {"num_steps": 19}),
    ({"schedule": "cosine"}, {"num_steps": 30}),
    ({"clean_steps": 5, "augment_shift": 1.0}, {"num_steps": 30}),
  ],
)
def test_another_experiment_is_refused_with_a_suggestion(
  of_both, change, run, tiny_config
):
  edit(run / "config.json", **of_both)
  before = (run / "config.json").read_bytes()
  tiny_config.update(of_both | change)
  with pytest.raises(errors.UserError) as error:
    directory.create(run, tiny_config, files.read_json(run / "dataset.json"))
  (key,) = change
  assert f"another config: {key} (" in str(error.value)
  assert f"--config.init_from={run}" in str(error.value)
  assert (run / "config.json").read_bytes() == before


def test_other_images_with_the_same_names_are_refused(run, tiny_config):
  dataset = files.read_json(run / "dataset.json")
  dataset["crc32"]["train"] += 1
  with pytest.raises(errors.UserError, match="another dataset: crc32"):
    directory.create(run, tiny_config, dataset)


def test_a_run_starts_from_the_averaged_parameters_of_another(
  tiny_run, averaged_run, tiny_config, tmp_path, caplog
):
  shutil.copytree(averaged_run, tmp_path / "first")
  average = runs.open_run(averaged_run).state.ema_params
  tiny_config.update(ema_decay=0.5, num_steps=4, seed=1, learning_rate=1e-30)
  tiny_config.init_from = str(tmp_path / "first")
  train.train_and_evaluate(tiny_config, tmp_path / "second")
  second = runs.open_run(tmp_path / "second")
  assert second.step == 4
  for params in (second.state.params, second.state.ema_params):
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-25),
      params,
      average,
    )
  # It resumes, even if the other run has moved, but not with another run.
  (tmp_path / "moved").mkdir()
  (tmp_path / "first").rename(tmp_path / "moved/first")
  tiny_config.init_from = str(tmp_path / "moved/first")
  train.train_and_evaluate(tiny_config, tmp_path / "second")
  tiny_config.init_from = str(tiny_run)
  with pytest.raises(
    errors.UserError, match=f"{tmp_path}/.*first there, {tiny_run}"
  ):
    train.train_and_evaluate(tiny_config, tmp_path / "second")


def test_a_run_starts_from_the_arrays_of_another_that_fit(
  tiny_run, tiny_config, caplog
):
  fresh = runs.create_state(jax.random.key(7), tiny_config, (28, 28, 1), "abc")
  other = runs.open_run(tiny_run).state.params
  state = runs.starting_from(tiny_run, fresh)
  assert_same_state(state.params["dense"], other["dense"])
  assert_same_state(state.params["logits"], fresh.params["logits"])
  assert (
    f"parameters of {tiny_run}; new are logits/bias (float32 [10] there,"
    " float32 [3] here), logits/kernel (" in caplog.text
  )
  nothing = fresh.replace(params={"first": jnp.zeros(3)})
  with pytest.raises(errors.UserError, match=r"nothing.*first \(missing there"):
    runs.starting_from(tiny_run, nothing)


def test_too_large_a_network_is_refused_before_anything_is_made(
  tiny_config, tmp_path, monkeypatch
):
  monkeypatch.setattr(devices, "memory", lambda: 10**7)
  with pytest.raises(
    errors.UserError,
    match="images of 28x28 with 1 channels make a network of 3,274,634"
    r" parameters; .* more than 0\.04 GB, but cpu has 0\.01 GB; .*image_size",
  ):
    train.train_and_evaluate(tiny_config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.fixture
def old_run(tmp_path):
  """A run of the version of 2026-11-27, with a key of its own and init_from."""
  with tarfile.open(PROJECT / "tests/old_run.tar.gz") as archive:
    archive.extractall(tmp_path, filter="data")
  return tmp_path / "old_run"


def test_a_run_of_an_older_version_opens_resumes_and_is_scored(old_run):
  workdir = old_run / "run"
  config = runs.open_run(workdir).config
  assert config.note == "a key of our own"
  paths = {"data_dir": old_run / "prepared", "manual_dir": old_run / "data"}
  result, _ = evaluate.evaluate([workdir], **paths)
  assert result["loss"] == pytest.approx(0.6878582, rel=1e-4)
  assert (result["accuracy"], result["global_step"]) == (0.9, 6)
  config.update({key: str(path) for key, path in paths.items()})
  config.update(init_from="other")
  with pytest.raises(
    errors.UserError, match="/home/user/first there, .*/other"
  ):
    train.train_and_evaluate(config, workdir)
  # As the old version's --init_from, which it recorded elsewhere.
  config.update(num_steps=8, init_from="first")
  result = train.train_and_evaluate(config, workdir)
  # As the older version went on.
  assert result["loss"] == pytest.approx(0.68687868, rel=1e-4)
  assert (result["accuracy"], result["global_step"]) == (0.5, 8)
  assert provenance.read(workdir)[0]["init_from"] == "/home/user/first"


def test_the_best_checkpoint_has_the_best_accuracy(run, tiny_config, tmp_path):
  names = [str(digit) for digit in range(10)]
  workdir = tmp_path / "new"
  directory.create(workdir, tiny_config, files.read_json(run / "dataset.json"))
  state = runs.create_state(jax.random.key(0), tiny_config, (28, 28, 1), names)
  with checkpoints.open_manager(workdir, 0) as manager:
    for step, accuracy in enumerate((0.1, 0.9, 0.2), 1):
      manager.save(
        step,
        state.replace(step=jnp.int32(step)),
        steps.Metrics.zero(10),
        accuracy,
      )
  assert runs.open_run(workdir, "best").step == 2
  assert runs.open_run(workdir, "last").step == 3
  assert runs.open_run(workdir, "1").step == 1


def test_sums_of_other_metrics_start_over(run, tiny_config, monkeypatch):
  """Step 16 was saved one step after a log."""
  shutil.rmtree(run / "checkpoints/20")
  with runs.opened_for_training(run, tiny_config) as opened:
    assert int(opened.state.step) == 16
    assert opened.since_log.num_examples == 16
  compute = steps.compute_metrics

  def with_margin(logits, labels):
    return {**compute(logits, labels), "margin": logits.max(axis=-1)}

  monkeypatch.setattr(steps, "compute_metrics", with_margin)
  with runs.opened_for_training(run, tiny_config) as opened:
    assert int(opened.state.step) == 16
    assert opened.since_log.num_examples == 0
    assert sorted(opened.since_log.sums) == ["accuracy", "loss", "margin"]
