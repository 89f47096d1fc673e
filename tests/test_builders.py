import os
import pathlib
import pwd
import shutil
from unittest import mock

from conftest import files_of_at_most
from conftest import idx_bytes
import numpy as np
import pytest
import tensorflow_datasets as tfds

import input_pipeline
from machine import errors
from sources import builders
from sources import idx_dataset


@pytest.fixture
def family_config(default_config, family, tmp_path):
  """The config of a small data set that is not prepared yet."""
  config = default_config.copy_and_resolve_references()
  config.update(
    dataset="kmnist",
    data_dir=str(tmp_path / "data"),
    manual_dir=str(family[0]),
  )
  return config


def num_test_examples(prepared):
  _, labels = prepared.read("test")
  assert prepared.splits["test"].num_examples == len(labels)
  return len(labels)


def test_a_prepared_data_set_is_not_prepared_again(family_config, monkeypatch):
  assert num_test_examples(builders.prepared(family_config)) == 100
  monkeypatch.delattr(idx_dataset, "read")
  assert num_test_examples(builders.prepared(family_config)) == 100


@pytest.mark.parametrize("folder", ["", "~/data"])
def test_without_home_data_dir_must_be_a_full_path(
  folder, family_config, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(tfds.core.constants, "DATA_DIR", "~/tensorflow_datasets")
  monkeypatch.delenv("HOME")
  monkeypatch.setattr(pwd, "getpwuid", mock.Mock(side_effect=KeyError))
  family_config.data_dir = folder
  with pytest.raises(errors.UserError, match="determine home") as error:
    input_pipeline.load(family_config)
  assert str(error.value).startswith(f"config.data_dir={folder}: ")
  assert not (tmp_path / "~").exists()


def test_another_process_may_prepare_it_first(family_config, monkeypatch):
  read = idx_dataset.read

  def followed_by_another(*args):
    monkeypatch.setattr(idx_dataset, "read", read)
    builders.prepared(family_config)
    return read(*args)

  monkeypatch.setattr(idx_dataset, "read", followed_by_another)
  assert num_test_examples(builders.prepared(family_config)) == 100


def read_test_images(config):
  images, _ = builders.prepared(config).read("test")
  return images[..., 0]


def prepared_files(config):
  return {*pathlib.Path(config.data_dir).rglob("*.npz")}


def test_each_manual_dir_makes_its_own_data_set(family_config, family):
  folder, images, _ = family
  builders.prepared(family_config)
  first = prepared_files(family_config)
  other = shutil.copytree(folder, folder.with_name("other") / folder.name)
  changed = images[::-1]
  path = other / "t10k-images-idx3-ubyte"
  mtime_ns = path.stat().st_mtime_ns
  path.write_bytes(idx_bytes(changed))
  os.utime(path, ns=(mtime_ns, mtime_ns))  # Names and sizes are also the same.
  np.testing.assert_array_equal(read_test_images(family_config), images)
  assert prepared_files(family_config) == first
  family_config.manual_dir = str(other)
  np.testing.assert_array_equal(read_test_images(family_config), changed)
  assert len(prepared_files(family_config) - first) == 1


def test_changed_files_are_prepared_again(family_config, family):
  folder, images, _ = family
  np.testing.assert_array_equal(read_test_images(family_config), images)
  path = folder / "t10k-images-idx3-ubyte"
  path.write_bytes(idx_bytes(images[::-1]))  # The size stays the same.
  np.testing.assert_array_equal(read_test_images(family_config), images[::-1])


def cut_off(path):
  path.write_bytes(path.read_bytes()[:-100])


def overwrite(path):
  path.write_bytes(b"not a zip file")


def test_on_a_full_disk_data_are_read_at_each_start(
  family_config, family, tmp_path, caplog
):
  _, _, labels = family
  with files_of_at_most(50_000):
    found = builders.prepared(family_config).read("test")
  np.testing.assert_array_equal(found.labels, labels)
  (message,) = caplog.messages[-1:]
  assert message.startswith(f"cannot write {tmp_path}/data/own_images/family-")
  assert message.endswith("File too large); startup will stay slow")
  assert not [*(tmp_path / "data").rglob("*.npz*")]


@pytest.mark.parametrize(
  ("dataset", "folder", "files"),
  [
    ("idx", "", "train-images-idx3-ubyte, "),
    ("image_folder", "", "a subfolder of images for each class, such as"),
    ("arrays", "", "a .npz with x_train and y_train or"),
    ("kmnist", "/no", "train-images-idx3-ubyte, "),
  ],
)
def test_the_error_for_a_folder_without_files_says_what_it_must_have(
  dataset, folder, files, family_config
):
  family_config.update(dataset=dataset, manual_dir=folder)
  with pytest.raises(errors.UserError) as error:
    builders.prepared(family_config)
  message = str(error.value)
  assert message.startswith(
    f"config.manual_dir={folder}: must be a folder with {files}"
  )
  assert message.endswith(f" for config.dataset={dataset}")


def test_images_of_one_class_are_refused(family_config, family):
  folder, _, _ = family
  for prefix, size in (("train", 300), ("t10k", 100)):
    path = folder / f"{prefix}-labels-idx1-ubyte"
    path.write_bytes(idx_bytes(np.full(size, 7)))
  family_config.dataset = "idx"
  with pytest.raises(
    errors.UserError, match="are of one class, 7; there must b"
  ):
    builders.prepared(family_config)


@pytest.mark.parametrize(
  "name, hint",
  {
    "MNIST": "; did you mean mnist?",
    "fashion-mnist": "; did you mean fashion_mnist?",
    "FashionMNIST": "; did you mean fashion_mnist?",
    "image-folder": "; did you mean image_folder?",
  }.items(),
)
def test_the_error_for_an_unknown_name_suggests_similar_ones(
  name, hint, family_config, tmp_path
):
  family_config.update(dataset=name, manual_dir="")
  with pytest.raises(errors.UserError) as error:
    builders.prepared(family_config)
  assert str(error.value) == (
    f"config.dataset={name}: must be one of mnist, fashion_mnist, kmnist, idx,"
    f" image_folder, arrays, or prepared as array_record in"
    f" {tmp_path / 'data'}{hint}"
  )


def test_manual_dir_is_refused_with_a_tfds_data_set(family_config):
  family_config.dataset = "cifar10"
  with pytest.raises(
    errors.UserError, match='must be "" with config.dataset=c'
  ):
    builders.prepared(family_config)


@pytest.mark.parametrize("damage", [overwrite, cut_off])
def test_damaged_prepared_data_are_made_again(damage, family_config, family):
  _, images, _ = family
  builders.prepared(family_config)
  (path,) = prepared_files(family_config)
  damage(path)
  found, _ = builders.prepared(family_config).read("test")
  np.testing.assert_array_equal(found[..., 0], images)


@pytest.mark.parametrize("name", ["image_folder/cats", "mnist/x"])
def test_a_name_below_that_of_a_data_set_is_refused(name, family_config):
  family_config.update(dataset=name, manual_dir="")
  with pytest.raises(errors.UserError, match=f"dataset={name}: must be one of"):
    builders.prepared(family_config)
