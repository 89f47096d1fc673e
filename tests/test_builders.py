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
from sources import arrays
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


def num_test_examples(builder):
  _, labels = arrays.read_split(builder, "test")
  return len(labels)


def test_a_prepared_data_set_is_not_prepared_again(family_config, monkeypatch):
  assert num_test_examples(builders.prepared(family_config)) == 100
  monkeypatch.delattr(builders, "_prepare")
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


def test_the_error_for_an_empty_prepared_folder_names_it(
  family_config, tmp_path
):
  family_config.manual_dir = ""
  folder = tmp_path / "data/idx_dataset/kmnist/1.0.0"
  folder.mkdir(parents=True)
  with pytest.raises(errors.UserError, match="the prepared kmnist") as error:
    builders.prepared(family_config)
  assert str(error.value).endswith(f"; remove {folder} and run again")


@pytest.mark.parametrize("moment", ["__init__", "_read"])
def test_another_process_may_prepare_it_first(
  moment, family_config, monkeypatch
):
  """After this process's first step, the other one does all the work."""
  original = getattr(idx_dataset.IdxDataset, moment)

  def followed_by_another(*args, **kwargs):
    monkeypatch.setattr(idx_dataset.IdxDataset, moment, original)
    returned = original(*args, **kwargs)
    builders.prepared(family_config)
    return returned

  monkeypatch.setattr(idx_dataset.IdxDataset, moment, followed_by_another)
  assert num_test_examples(builders.prepared(family_config)) == 100


def read_test_images(config):
  builder = builders.prepared(config)
  images, _ = builders.read_split(config, builder, "test")
  return images[..., 0]


def test_each_manual_dir_makes_its_own_data_set(family_config, family):
  folder, images, _ = family
  first = builders.prepared(family_config)
  other = shutil.copytree(folder, folder.with_name("other") / folder.name)
  changed = images[::-1]
  path = other / "t10k-images-idx3-ubyte"
  mtime_ns = path.stat().st_mtime_ns
  path.write_bytes(idx_bytes(changed))
  os.utime(path, ns=(mtime_ns, mtime_ns))  # Names and sizes are also the same.
  np.testing.assert_array_equal(read_test_images(family_config), images)
  family_config.manual_dir = str(other)
  np.testing.assert_array_equal(read_test_images(family_config), changed)
  family_config.manual_dir = str(folder)
  assert builders.prepared(family_config).data_dir == first.data_dir


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
  last = builders.prepared(family_config)
  warnings = []
  monkeypatch.setattr(logging, "warning", lambda *args: warnings.append(args))
  for remove in (lambda: folder.rename(tmp_path / "moved"), folder.mkdir):
    remove()  # The second time, leaves an empty folder, like a mount point.
    np.testing.assert_array_equal(read_test_images(family_config), images[::-1])
    message, *args = warnings.pop()
    assert message % tuple(args) == (
      f"The files in config.manual_dir={folder} are gone; reading what was"
      f" prepared from them: {last.data_dir}"
    )
  family_config.dataset = "fashion_mnist"
  with pytest.raises(errors.UserError) as error:
    builders.prepared(family_config)
  assert str(error.value).startswith(
    f"config.manual_dir={folder}: has no files for fashion_mnist, and nothing"
    " was prepared from it; must be a folder with train-images-idx3-ubyte, "
  )


def cut_off(path):
  path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [os.unlink, cut_off])
@pytest.mark.parametrize("dataset", ["kmnist", "idx"])
def test_damaged_arrays_are_prepared_again(
  dataset, damage, family_config, family, monkeypatch
):
  folder, images, _ = family
  family_config.dataset = dataset
  prepared = pathlib.Path(builders.prepared(family_config).data_dir)
  damage(prepared / "test.arrays.npz")
  warnings = []
  monkeypatch.setattr(logging, "warning", lambda *args: warnings.append(args))
  for _ in range(2):  # The second time, they are intact.
    np.testing.assert_array_equal(read_test_images(family_config), images)
  ((message, *args),) = warnings
  assert message % tuple(args) == (
    f"{args[0]}; preparing {dataset} again"
  ) and str(args[0]).startswith(f"{prepared}/test.arrays.npz is ")

  damage(prepared / "test.arrays.npz")
  for file in folder.iterdir():
    file.unlink()
  with pytest.raises(errors.UserError) as error:
    read_test_images(family_config)
  assert str(error.value).startswith(f"{prepared}/test.arrays.npz is ")
  assert str(error.value).endswith(
    f", and config.manual_dir={folder} no longer has the files that it was made"
    " from"
  )
  assert (prepared / "train.arrays.npz").exists()


def test_intact_splits_survive_a_failure_to_repair_another(
  family_config, family
):
  folder, images, _ = family
  builder = builders.prepared(family_config)
  train, _ = builders.read_split(family_config, builder, "train")
  cut_off(pathlib.Path(builder.data_dir) / "test.arrays.npz")
  (folder / "t10k-images-idx3-ubyte").write_bytes(b"")
  with pytest.raises(errors.UserError, match="starts with nothing"):
    builders.read_split(family_config, builder, "test")
  (folder / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(images))
  kept, _ = builders.read_split(family_config, builder, "train")
  np.testing.assert_array_equal(kept, train)


def test_a_full_disk_is_reported_in_one_line(family_config, tmp_path):
  with files_of_at_most(50_000):
    with pytest.raises(errors.UserError) as error:
      input_pipeline.load(family_config)
  assert str(error.value).startswith(
    f"config.data_dir={tmp_path}/data: [Errno 27] File too large"
  )
  assert not [*(tmp_path / "data").rglob("*.npz*")]


def test_a_prepared_data_set_can_be_written_for_tfds(
  family_config, family, tmp_path
):
  _, images, labels = family
  folder = builders.write_records(family_config, tmp_path / "records")
  assert folder.is_relative_to(tmp_path / "records")
  builder = tfds.builder_from_directory(folder)
  assert builder.info.features["label"].names[9] == "wo"
  test = builder.as_data_source("test")
  assert len(test) == 100 and len(builder.as_data_source("train")) == 300
  for example, image, label in zip(test, images, labels, strict=True):
    np.testing.assert_array_equal(example["image"][..., 0], image)
    assert example["label"] == label
  # Another data set in the same folder does not replace it.
  (family[0] / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(images[::-1]))
  other = builders.write_records(family_config, tmp_path / "records")
  test = tfds.builder_from_directory(other).as_data_source("test")
  np.testing.assert_array_equal(test[0]["image"][..., 0], images[-1])
  # What this project prepares opens too, but has no records to read.
  builder = tfds.builder_from_directory(
    builders.prepared(family_config).data_dir
  )
  assert builder.info.splits["train"].num_examples == 300


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
    "cifar-10": "; did you mean cifar10 or cifar100 or cifar10_n?",
    "my_didgits": "; did you mean my_digits?",
    "no_such_set": "",
  }.items(),
)
def test_the_error_for_an_unknown_name_suggests_similar_ones(
  name, hint, family_config, tmp_path
):
  (tmp_path / "data/my_digits").mkdir(parents=True)
  family_config.update(dataset=name, manual_dir="")
  with pytest.raises(errors.UserError) as error:
    builders.prepared(family_config)
  assert str(error.value) == (
    f"config.dataset={name}: must be one of mnist, fashion_mnist, kmnist, idx,"
    f" image_folder, or a data set prepared in {tmp_path / 'data'}{hint}"
  )


def test_manual_dir_is_refused_with_a_tfds_data_set(family_config):
  family_config.dataset = "cifar10"
  with pytest.raises(
    errors.UserError, match='must be "" with config.dataset=c'
  ):
    builders.prepared(family_config)
