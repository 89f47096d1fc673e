import errno
import fcntl
import json
import math
import os
import pathlib
import pwd
from unittest import mock

from conftest import files_of_at_most
import jax
import jax.numpy as jnp
import pytest

from configs import default
import input_pipeline
from machine import errors
from rundir import checkpoints
from rundir import directory
from rundir import experiment
from rundir import files
from rundir import runs
import steps
import train

DATASET = {
  "image_shape": [28, 28, 1],
  "class_names": [*"0123456789"],
  "crc32": {"train": 1, "validation": 2, "test": 3},
}


def test_a_run_is_named_after_its_overrides():
  base = default.get_config()

  def name(**overrides):
    config = default.get_config()
    config.update(overrides)
    return experiment.name(config, base, "default")

  assert name() == "default"
  assert name(batch_size=100) == "default"  # The default is not an override.
  assert (
    name(dropout_rate=0.5, batch_size=256)
    == "default,batch_size=256,dropout_rate=0.5"
  )
  assert name(data_dir="/a", eval_every_steps=9, log_every_steps=9) == "default"
  first = name(train_split="train[5000:]" * 2, dataset="a/b")
  assert "/" not in first and "[" not in first
  assert name(train_split="train[:9]") != name(train_split="train[9:]")
  with pytest.raises(errors.UserError, match="--workdir"):
    name(dataset="x" * 300)


@pytest.mark.parametrize(
  "key, value",
  [
    ("dataset", ""),
    ("batch_size", 0),
    ("batch_size", -1),
    ("eval_batch_size", 0),
    ("num_steps", 0),
    ("num_steps", 2**31),
    ("learning_rate", 0.0),
    ("learning_rate", -0.1),
    ("learning_rate", math.inf),
    ("learning_rate", math.nan),
    ("dropout_rate", 1.0),
    ("dropout_rate", -0.1),
    ("dropout_rate", math.nan),
    ("dtype", "float16"),
    ("seed", -1),
    ("seed", 2**32),
    ("log_every_steps", 0),
    ("log_probabilities_every_steps", -1),
    ("eval_every_steps", 0),
    ("checkpoint_every_steps", 0),
  ],
)
def test_an_invalid_value_is_refused(key, value):
  config = default.get_config()
  config[key] = value
  with pytest.raises(errors.UserError) as error:
    experiment.check(config)
  assert str(error.value).startswith(f"config.{key}={value}: must be ")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"momentum": 0.9, "optimizer": "adamw"}, "momentum=0.9: must be 0"),
    ({"adam_b2": 0.99}, "adam_b2=0.99: must be 0.999"),
    ({"weight_decay": 0.1}, "weight_decay=0.1: must be 0"),
    ({"warmup_steps": 5}, "warmup_steps=5: must be 0"),
    (
      {"warmup_steps": 5, "schedule": "cosine", "num_steps": 9},
      "lower config.warmup_steps=5 to at most 4, half of config.num_steps",
    ),
    ({"clean_steps": 5}, "clean_steps=5: must be 0 unless"),
    (
      {"clean_steps": 5, "augment_shift": 2.0, "num_steps": 9},
      "lower config.clean_steps=5 to at most 4, half of config.num_steps",
    ),
  ],
)
def test_a_value_without_effect_is_refused(changes, message):
  config = default.get_config()
  config.update(changes)
  with pytest.raises(errors.UserError, match=message):
    experiment.check(config)


def test_the_default_config_is_valid():
  experiment.check(default.get_config())


def test_create_writes_the_config_and_accepts_it_again(tmp_path):
  config = default.get_config()
  path = tmp_path / "runs" / "one"
  directory.create(path, config, DATASET)
  assert json.loads((path / "config.json").read_text()) == config.to_dict()
  directory.create(path, config, DATASET)


def test_paths_are_recorded_so_that_they_work_in_other_folders(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  config = default.get_config()
  config.update(data_dir="~/data", manual_dir="../mine", init_from="first")
  directory.create(tmp_path / "run", config, DATASET)
  recorded = json.loads((tmp_path / "run/config.json").read_text())
  assert recorded["data_dir"] == "~/data"
  assert recorded["manual_dir"] == str(tmp_path.parent / "mine")
  assert recorded["init_from"] == str(tmp_path / "first")


def test_another_config_is_refused_and_its_keys_are_named(tmp_path):
  directory.create(tmp_path / "run", default.get_config(), DATASET)
  before = (tmp_path / "run/config.json").read_bytes()
  config = default.get_config()
  config.update(batch_size=256, seed=3)
  with pytest.raises(errors.UserError) as error:
    directory.create(tmp_path / "run", config, DATASET)
  message = str(error.value)
  assert "batch_size (100 there, 256 here)" in message
  assert "seed (0 there, 3 here)" in message
  assert "learning_rate" not in message
  assert (tmp_path / "run/config.json").read_bytes() == before


def test_other_data_with_the_same_name_are_refused(tmp_path):
  config = default.get_config()
  directory.create(tmp_path / "run", config, DATASET)
  before = (tmp_path / "run/dataset.json").read_bytes()
  with pytest.raises(errors.UserError, match="another dataset: class_names"):
    directory.create(
      tmp_path / "run", config, {**DATASET, "class_names": [*"abc"]}
    )
  assert (tmp_path / "run/dataset.json").read_bytes() == before


def test_a_file_is_replaced_atomically(tmp_path):
  path, link = tmp_path / "file", tmp_path / "link"
  path.write_text("old")
  os.link(path, link)
  with pytest.raises(OSError), files_of_at_most(1000):
    files.write_text(path, "new" * 1000)
  assert path.read_text() == "old"
  assert {*tmp_path.iterdir()} == {path, link}  # No partial file is left.
  files.write_text(path, "new")
  assert path.read_text() == "new"
  assert link.read_text() == "old"  # Not written in place.
  assert {*tmp_path.iterdir()} == {path, link}


def test_a_run_directory_can_be_created_after_a_failure(tmp_path):
  args = (default.get_config(), DATASET)
  with pytest.raises(errors.UserError, match="--workdir=.*File too large"):
    with files_of_at_most(100):
      directory.create(tmp_path, *args)
  assert not [*tmp_path.iterdir()]
  directory.create(tmp_path, *args)
  assert {path.name for path in tmp_path.iterdir()} == {
    "config.json",
    "dataset.json",
  }


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "\xff"])
def test_a_damaged_config_json_is_named(tmp_path, content):
  (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
  with pytest.raises(
    errors.UserError, match="config.json: (is not JSON|holds .*, not)"
  ):
    directory.create(tmp_path, default.get_config(), DATASET)


def test_a_directory_with_other_files_is_refused(tmp_path):
  (tmp_path / "thesis.tex").touch()
  with pytest.raises(errors.UserError, match="no config.json"):
    directory.create(tmp_path, default.get_config(), DATASET)
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_path_that_cannot_be_a_directory_is_refused(tmp_path):
  (tmp_path / "file").touch()
  for path in (tmp_path / "file", tmp_path / "file/run"):
    with pytest.raises(errors.UserError, match=f"--workdir={tmp_path}"):
      directory.create(path, default.get_config(), DATASET)


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?", "a\\b", "a\udcffb"])
def test_a_path_that_checkpoints_cannot_use_is_refused(
  name, tmp_path, monkeypatch
):
  monkeypatch.delattr(input_pipeline, "load")  # Refused before it loads data.
  with pytest.raises(errors.UserError, match="cannot be in the path of a run"):
    train.train_and_evaluate(default.get_config(), tmp_path / name)
  assert not [*tmp_path.iterdir()]
  (tmp_path / name).mkdir()
  monkeypatch.chdir(tmp_path / name)
  with pytest.raises(
    errors.UserError, match="/run: .* cannot be in the path of"
  ):
    train.train_and_evaluate(default.get_config(), "run")
  assert not [*(tmp_path / name).iterdir()]
  # Orbax can restore from a path that it reads as a pattern.
  expected = "cannot be in" if name in ("a\\b", "a\udcffb") else "no such file"
  with pytest.raises(errors.UserError, match=expected):
    runs.open_run("run")


@pytest.mark.parametrize(
  "number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS]
)
def test_a_file_system_without_locks_causes_a_warning(
  number, tmp_path, monkeypatch, caplog
):
  flock = mock.Mock(side_effect=OSError(number, os.strerror(number)))
  monkeypatch.setattr(fcntl, "flock", flock)
  with directory.lock(tmp_path), directory.lock(tmp_path):
    pass
  assert (
    caplog.messages
    == [
      f"{tmp_path}: its file system has no locks ({os.strerror(number)}); make"
      " sure that no other process trains there: it would go unnoticed and"
      " damage the run"
    ]
    * 2
  )


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_held_lock_is_not_taken_for_a_missing_one(
  number, tmp_path, monkeypatch
):
  error = OSError(number, os.strerror(number))  # SMB raises EACCES.
  monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=error))
  with pytest.raises(
    errors.UserError, match="another process is training there"
  ):
    with directory.lock(tmp_path):
      pytest.fail("The held lock was acquired.")


def test_a_path_with_a_tilde_needs_a_home_directory(tmp_path, monkeypatch):
  monkeypatch.delenv("HOME")
  monkeypatch.setattr(pwd, "getpwuid", mock.Mock(side_effect=KeyError))
  for path in ("~", "~/runs/a"):
    with pytest.raises(errors.UserError) as error:
      files.local_path(path)
    assert str(error.value) == f"{path}: HOME is not set; give the full path"
  assert files.local_path("./~") == pathlib.Path("~")
  assert files.local_path("~nosuch/a") == pathlib.Path("~nosuch/a")


@pytest.mark.parametrize(
  ("path", "is_local"),
  {
    **{"gs://a/b": False, "S3://a": False, "file:///a": False, "a+b:/c": False},
    **{"/gs://a": True, "a/b://c": True, "C:/a": True, "a:b": True, "": True},
  }.items(),
)
def test_a_url_is_not_a_local_path(path, is_local):
  assert files.is_local(path) == is_local
  if not is_local:  # Nor after pathlib has shortened it.
    assert not files.is_local(pathlib.Path(path))


def test_the_best_checkpoint_has_the_best_accuracy(tiny_config, tmp_path):
  names = [str(digit) for digit in range(10)]
  directory.create(tmp_path, tiny_config, DATASET)
  state = runs.create_state(jax.random.key(0), tiny_config, (28, 28, 1), names)
  with checkpoints.open_manager(tmp_path, 0) as manager:
    for step, accuracy in enumerate((0.1, 0.9, 0.2), 1):
      manager.save(
        step,
        state.replace(step=jnp.int32(step)),
        steps.Metrics.zero(10),
        accuracy,
      )
  assert runs.open_run(tmp_path, "best").step == 2
  assert runs.open_run(tmp_path, "last").step == 3
  assert runs.open_run(tmp_path, "1").step == 1


@pytest.mark.parametrize(
  "key", sorted({*default.get_config()} - {*experiment.INCIDENTAL})
)
def test_every_key_of_the_experiment_is_in_its_name(key):
  config = default.get_config()
  config[key] = "other" if isinstance(config[key], str) else config[key] + 1
  name = experiment.name(config, default.get_config(), "default")
  assert name == f"default,{key}={config[key]}"
