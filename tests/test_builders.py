import pwd
from unittest import mock

from absl import app
import pytest
import tensorflow_datasets as tfds

from sources import builders
from sources import idx_dataset


@pytest.fixture
def family_config(default_config, family, tmp_path):
  """The config of a small data set that is not prepared."""
  config = default_config.copy_and_resolve_references()
  config.update(
    dataset="kmnist",
    data_dir=str(tmp_path / "data"),
    manual_dir=str(family[0]),
  )
  return config


def num_test_examples(builder):
  return len(builder.as_data_source("test"))


def test_a_prepared_data_set_is_not_prepared_again(family_config, monkeypatch):
  assert num_test_examples(builders.prepared(family_config)) == 100
  monkeypatch.delattr(builders, "_prepare")
  assert num_test_examples(builders.prepared(family_config)) == 100


@pytest.mark.parametrize("folder", ["", "~/data"])
def test_without_a_home_the_data_need_a_directory(
  folder, family_config, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(tfds.core.constants, "DATA_DIR", "~/tensorflow_datasets")
  monkeypatch.delenv("HOME")
  monkeypatch.setattr(pwd, "getpwuid", mock.Mock(side_effect=KeyError))
  family_config.data_dir = folder
  with pytest.raises(app.UsageError) as error:
    builders.prepared(family_config)
  assert str(error.value) == (
    f"config.data_dir={folder}: must name a directory in full, as HOME is not"
    f" set for {folder or '~/tensorflow_datasets'}"
  )
  assert not (tmp_path / "~").exists()


def test_a_folder_without_a_data_set_is_named(family_config, tmp_path):
  folder = tmp_path / "data/idx_dataset/kmnist/1.0.0"
  folder.mkdir(parents=True)
  with pytest.raises(app.UsageError, match="holds no data set") as error:
    builders.prepared(family_config)
  assert str(folder) in str(error.value)


@pytest.mark.parametrize("moment", ["__init__", "_split_generators"])
def test_another_process_may_prepare_it_first(
  moment, family_config, monkeypatch
):
  """The other process does all of it after this one's first step."""
  original = getattr(idx_dataset.IdxDataset, moment)

  def followed_by_another(*args, **kwargs):
    monkeypatch.setattr(idx_dataset.IdxDataset, moment, original)
    returned = original(*args, **kwargs)
    builders.prepared(family_config)
    return returned

  monkeypatch.setattr(idx_dataset.IdxDataset, moment, followed_by_another)
  assert num_test_examples(builders.prepared(family_config)) == 100
