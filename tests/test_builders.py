import os
import pathlib
import pwd
import shutil
from unittest import mock

from absl import logging
from conftest import files_of_at_most
from conftest import idx_bytes
import numpy as np
import pytest
import tensorflow_datasets as tfds

import input_pipeline
from machine import errors
from sources import builders


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
  monkeypatch.delattr(builders, "_read")
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
  with pytest.raises(errors.UserError) as error:
    builders.prepared(family_config)
  assert str(error.value) == (
    f"config.data_dir={folder}: must be a full path, because"
    f" {folder or '~/tensorflow_datasets'} needs HOME, which is not set"
  )
  assert not (tmp_path / "~").exists()


def test_another_process_may_prepare_it_first(family_config, monkeypatch):
  read = builders._read

  def followed_by_another(*args):
    monkeypatch.setattr(builders, "_read", read)
    builders.prepared(family_config)
    return read(*args)

  monkeypatch.setattr(builders, "_read", followed_by_another)
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


def test_a_prepared_data_set_is_read_even_if_its_files_are_gone(
  family_config, family, tmp_path, monkeypatch
):
  folder, images, _ = family
  builders.prepared(family_config)
  (folder / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(images[::-1]))
  before = prepared_files(family_config)
  builders.prepared(family_config)
  (last,) = prepared_files(family_config) - before
  warnings = []
  monkeypatch.setattr(logging, "warning", lambda *args: warnings.append(args))
  for remove in (lambda: folder.rename(tmp_path / "moved"), folder.mkdir):
    remove()  # The second time, leaves an empty folder, like a mount point.
    np.testing.assert_array_equal(read_test_images(family_config), images[::-1])
    message, *args = warnings.pop()
    assert message % tuple(args) == (
      f"The files in config.manual_dir={folder} are gone; reading what was"
      f" prepared from them: {last}"
    )
  family_config.dataset = "fashion_mnist"
  with pytest.raises(errors.UserError) as error:
    builders.prepared(family_config)
  assert str(error.value).startswith(
    f"config.manual_dir={folder}: has no files for fashion_mnist, and nothing"
    " was prepared from it; must be a folder with train-images-idx3-ubyte, "
  )


def test_data_sets_prepared_from_one_folder_are_kept_apart(
  family_config, family
):
  folder, images, _ = family
  names = {}
  for dataset in ("kmnist", "fashion_mnist"):
    family_config.dataset = dataset
    names[dataset] = builders.prepared(family_config).class_names
  shutil.rmtree(folder)
  assert names["kmnist"] != names["fashion_mnist"]
  for dataset in names:
    family_config.dataset = dataset
    assert builders.prepared(family_config).class_names == names[dataset]
    np.testing.assert_array_equal(read_test_images(family_config), images)


def cut_off(path):
  path.write_bytes(path.read_bytes()[:-100])


def overwrite(path):
  path.write_bytes(b"not a zip file")


def test_a_full_disk_is_reported_in_one_line(family_config, tmp_path):
  with files_of_at_most(50_000):
    with pytest.raises(errors.UserError) as error:
      input_pipeline.load(family_config)
  assert str(error.value).startswith(
    f"config.data_dir={tmp_path}/data: [Errno 27] File too large"
  )
  assert not [*(tmp_path / "data").rglob("*.npz*")]


def test_own_files_need_manual_dir(family_config):
  family_config.update(dataset="idx", manual_dir="")
  with pytest.raises(
    errors.UserError, match="idx: needs config.manual_dir, a f"
  ):
    builders.prepared(family_config)
  family_config.dataset = "image_folder"
  with pytest.raises(errors.UserError, match="such as train/cat and test/cat"):
    builders.prepared(family_config)


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
  damage(path)
  for file in pathlib.Path(family_config.manual_dir).iterdir():
    file.unlink()
  with pytest.raises(errors.UserError) as error:
    builders.prepared(family_config)
  assert str(error.value) == f"{path}: is damaged; remove it to make it again"


@pytest.mark.parametrize("name", ["image_folder/cats", "mnist/x"])
def test_a_name_below_that_of_a_data_set_is_refused(name, family_config):
  family_config.update(dataset=name, manual_dir="")
  with pytest.raises(errors.UserError, match=f"dataset={name}: must be one of"):
    builders.prepared(family_config)
