import os
import pathlib
import pwd
from unittest import mock

from conftest import files_of_at_most
import pytest

from machine import errors
from rundir import files


def test_a_file_is_replaced_atomically(tmp_path):
  path, link = tmp_path / "file", tmp_path / "link"
  path.write_text("old")
  os.link(path, link)
  with pytest.raises(errors.UserError) as error, files_of_at_most(1000):
    files.write_text(path, "new" * 1000)
  assert str(error.value) == f"{path}: cannot be written (File too large)"
  assert path.read_text() == "old"
  assert {*tmp_path.iterdir()} == {path, link}  # No partial file is left.
  files.write_text(path, "new")
  assert path.read_text() == "new"
  assert link.read_text() == "old"  # Not written in place.
  assert {*tmp_path.iterdir()} == {path, link}


def test_only_files_are_replaced(tmp_path):
  (tmp_path / "folder").mkdir()
  (tmp_path / "folder.incomplete").touch()  # Another file of the user's.
  os.mkfifo(tmp_path / "pipe")  # Other devices need more rights to create.
  for name, what in {"folder": "a directory", "pipe": "a device"}.items():
    path = tmp_path / name
    with pytest.raises(errors.UserError) as error:
      files.write_text(path, "")
    assert str(error.value) == f"{path}: is {what}; must be a file"
  assert (tmp_path / "pipe").is_fifo()
  assert (tmp_path / "folder.incomplete").exists()


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


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path):
  (tmp_path / "config.json").touch()
  error = PermissionError(13, "Permission denied")
  with (
    mock.patch.object(pathlib.Path, "read_text", side_effect=error),
    pytest.raises(PermissionError),
  ):
    files.read_json(tmp_path / "config.json")
