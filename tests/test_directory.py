import errno
import fcntl
import json
import os
from unittest import mock

from conftest import files_of_at_most
import pytest

from configs import default
import input_pipeline
from machine import errors
from rundir import directory
from rundir import runs
import train

DATASET = {
  "image_shape": [28, 28, 1],
  "class_names": [*"0123456789"],
  "crc32": {"train": 1, "validation": 2, "test": 3},
}


def test_create_writes_the_config_and_accepts_it_again(tmp_path):
  config = default.get_config()
  path = tmp_path / "runs" / "one"
  directory.create(path, config, DATASET)
  assert json.loads((path / "config.json").read_text()) == config.to_dict()
  directory.create(path, config, DATASET)


def test_output_redirected_into_a_new_directory_is_no_run(tmp_path):
  config = default.get_config()
  (tmp_path / "train.log").write_text("what train.py prints")
  (tmp_path / "slurm-1.out").touch()
  directory.create(tmp_path, config, DATASET)
  assert (tmp_path / "config.json").exists()
  assert (tmp_path / "train.log").read_text() == "what train.py prints"


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


def test_a_run_directory_can_be_created_after_a_failure(tmp_path):
  args = (default.get_config(), DATASET)
  with pytest.raises(errors.UserError, match="config.json: .*File too large"):
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
  with pytest.raises(errors.UserError, match="cannot be in the path of a run"):
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
