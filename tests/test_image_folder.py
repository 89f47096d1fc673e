import errno
import os
import re
import shutil

from absl import logging
import ml_collections
import numpy as np
from PIL import Image
import pytest

import input_pipeline
from machine import errors
from sources import image_files
from sources import image_folder


def find(folder):
  return image_folder.find(folder, "image_folder")


def read(found, image_size=0):
  config = ml_collections.ConfigDict({"image_size": image_size})
  return image_folder.read(found, config)


def write(path, value, mode="RGB", size=(6, 5)):
  """Writes an image of one color and returns its pixels."""
  path.parent.mkdir(parents=True, exist_ok=True)
  image = Image.new(mode, size, value)
  image.save(path)
  return np.asarray(image)


@pytest.fixture
def animals(tmp_path):
  """A folder of three classes; red encodes the class, green the image."""
  folder = tmp_path / "animals"
  for split, size in (("train", 20), ("test", 4)):
    for index, name in enumerate(("cat", "dog", "owl")):
      for i in range(size):
        write(folder / split / name / f"{i}.png", (index, i, 255))
  # These are not images of the data set.
  (folder / "train/cat/._1.png").write_bytes(b"")
  (folder / "train/cat/notes.txt").touch()
  write(folder / "train/owl/.ipynb_checkpoints/1.png", (9, 9, 9))
  (folder / "train/cat/gone.png").symlink_to("nowhere")
  os.mkfifo(folder / "train/cat/pipe.png")  # Reading it would wait for ever.
  write(folder / "sketches/cat/1.png", (9, 9, 9))
  write(folder / "train/1.png", (9, 9, 9))
  write(folder / "train/run/learning_curve.png", (9, 9, 9))
  (folder / "train/run/config.json").touch()
  (folder / "train/run/checkpoints").mkdir()
  return folder


@pytest.fixture
def animals_config(animals, default_config, tmp_path):
  config = default_config.copy_and_resolve_references()
  config.update(
    dataset="image_folder",
    data_dir=str(tmp_path / "data"),
    manual_dir=str(animals),
    train_split="train[20%:]",
    validation_split="train[:20%]",
  )
  return config


def test_a_folder_of_images_loads_as_a_data_set(animals_config):
  data = input_pipeline.load(animals_config)
  assert data.class_names == ("cat", "dog", "owl")
  seen = {}
  for split in ("train", "validation", "test"):
    examples = getattr(data, split)
    assert examples.image_shape == (5, 6, 3)
    pixels = np.asarray(examples.unflatten(examples.images))
    assert (pixels == pixels[:, :1, :1]).all()
    np.testing.assert_array_equal(pixels[:, 0, 0, 0], examples.labels)
    assert {*np.asarray(examples.labels)} == {0, 1, 2}  # They are shuffled.
    seen[split] = {tuple(pixel) for pixel in pixels[:, 0, 0, :2]}
  assert seen["test"] == {(label, i) for label in range(3) for i in range(4)}
  assert len(seen["train"]) == 48 and len(seen["validation"]) == 12
  assert seen["train"] | seen["validation"] == {
    (label, i) for label in range(3) for i in range(20)
  }


def test_a_folder_without_splits_is_the_train_split(animals):
  found = find(animals / "test")
  assert {*found} == {
    f"train/{name}/{i}.png" for name in ("cat", "dog", "owl") for i in range(4)
  }
  assert found["train/owl/2.png"] == animals / "test/owl/2.png"
  assert find(animals / "no") == {}


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", os.fsdecode(b"\xff")])
def test_a_class_whose_name_cannot_be_printed_is_refused(name, animals):
  (animals / "train/owl").rename(animals / "train" / name)
  with pytest.raises(errors.UserError) as error:
    read(find(animals))
  assert str(error.value) == f"{name!r}: the name of a class must be printable"


@pytest.mark.parametrize(
  "mode, value, expected",
  [
    ("L", 77, [77]),
    ("1", 1, [255]),
    ("P", 1, None),
    ("LA", (77, 255), [77]),
    ("RGBA", (1, 2, 3, 255), [1, 2, 3]),
    ("RGBA", (10, 20, 30, 0), [255, 255, 255]),
    ("LA", (0, 102), [153]),  # A black that covers 40% of the white.
    ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
  ],
)
def test_images_are_read_as_gray_or_rgb_on_white(
  mode, value, expected, tmp_path
):
  path = tmp_path / f"train/cat/1.{'tif' if mode == 'CMYK' else 'png'}"
  write(path, value, mode)
  if mode == "P":
    image = Image.new("P", (6, 5), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(path)
    expected = [10, 20, 30]
  source = read(find(tmp_path))
  (image,), (label,) = source.splits["train"]
  assert image.shape == (5, 6, len(expected))
  assert image.dtype == np.uint8 and label == 0
  np.testing.assert_array_equal(image, np.broadcast_to(expected, image.shape))


@pytest.mark.parametrize(
  "mode, size, message",
  [
    (
      "RGB",
      (7, 5),
      "is 7x5, but {first} is 6x5; set --config.image_size to scale and crop"
      " all images to one size",
    ),
    ("I;16", (6, 5), "cannot be decoded: its mode is I;16; must be 8-bit gray"),
    (None, None, "is not an image in a supported format"),
  ],
)
def test_the_error_for_an_image_that_differs_names_it(
  mode, size, message, animals
):
  path, first = animals / "train/dog/20.png", animals / "test/cat/0.png"
  if mode:
    write(path, 0, mode, size)
  else:
    path.write_bytes(b"<html>")
  with pytest.raises(errors.UserError) as error:
    read(find(animals))
  assert str(error.value).startswith(f"{path}: {message.format(first=first)}")


def test_gray_images_among_colored_ones_become_rgb(animals):
  write(animals / "train/dog/gray.png", 77, "L")
  images, _ = read(find(animals)).splits["train"]
  assert images.shape == (61, 5, 6, 3)
  (gray,) = images[(images == 77).all(axis=(1, 2, 3))]
  assert gray.shape == (5, 6, 3)


@pytest.fixture
def messages(monkeypatch):
  """What is logged."""
  result = []
  monkeypatch.setattr(
    logging, "info", lambda text, *args: result.append(text % args)
  )
  return result


def test_images_may_lie_deeper_and_what_is_passed_over_is_said(
  animals, messages
):
  write(animals / "train/owl/barn/young/1.png", (2, 50, 255))
  write(animals / "train/elk/summer/1.png", (3, 0, 255))
  found = find(animals)
  assert found["train/owl/barn/young/1.png"].is_file()
  source = read(found)
  assert source.class_names == ("cat", "dog", "elk", "owl")
  images, labels = source.splits["train"]
  pixels = images[:, 0, 0]
  assert labels[(pixels == (2, 50, 255)).all(axis=1)] == [3]
  assert labels[(pixels == (3, 0, 255)).all(axis=1)] == [2]
  assert messages == [
    f"Passed over 9 files in {animals} that are hidden, are not images or are"
    " not in a class's folder: sketches/cat/1.png, train/1.png,"
    " train/cat/._1.png, ..."
  ]


def test_a_folder_that_cannot_be_read_is_named(animals, monkeypatch, caplog):
  def scandir(path, really=os.scandir):
    if str(path).endswith("train/owl"):
      raise PermissionError(errno.EACCES, "Permission denied", path)
    return really(path)

  monkeypatch.setattr(os, "scandir", scandir)
  with caplog.at_level("WARNING"):
    assert "train/cat/1.png" in find(animals)
  assert caplog.messages == [f"Skipped {animals}/train/owl: Permission denied"]


def test_a_folder_without_strays_says_nothing(animals, messages):
  find(animals / "test")
  assert not messages


@pytest.mark.parametrize(
  "names, splits",
  {
    "training testing": "train test",
    "Train Val TEST": "train validation test",
    "train valid": "train validation",
    "training validation": "train validation",
  }.items(),
)
def test_splits_have_several_names(names, splits, tmp_path):
  for value, name in enumerate(names.split()):
    for label in ("cat", "dog"):
      write(tmp_path / name / label / "1.png", (value, 0, 0))
  source = read(find(tmp_path))
  assert source.class_names == ("cat", "dog")
  assert {*source.splits} == {*splits.split()}
  for value, split in enumerate(splits.split()):
    images, _ = source.splits[split]
    assert (images[..., 0] == value).all() and len(images) == 2


@pytest.mark.parametrize("name", ["train", "Test"])
def test_a_class_may_have_the_name_of_a_split(name, tmp_path):
  for label in ("bus", "car", name):
    write(tmp_path / label / "1.png", 0)
    write(tmp_path / label / "red/2.png", 0)
    write(tmp_path / label / "3.png", 0)
  found = find(tmp_path)
  assert len(found) == 9
  assert {key.split("/")[1] for key in found} == {"bus", "car", name}


def test_a_split_without_classes_is_passed_over(tmp_path, messages):
  """As in Kaggle's competitions: the images in test/ have no labels."""
  for i in range(3):
    for label in ("cat", "dog"):
      write(tmp_path / f"train/{label}/{i}.png", 0)
    write(tmp_path / f"test/{i}.png", 0)
  assert {key.split("/")[0] for key in find(tmp_path)} == {"train"}
  assert "test/0.png, test/1.png, test/2.png" in messages[0]
  write(tmp_path / "flat/train/1.png", 0)
  write(tmp_path / "flat/test/1.png", 0)
  assert find(tmp_path / "flat") == {}  # Not two classes.


def test_linked_folders_are_read(animals, tmp_path):
  (tmp_path / "links/train").mkdir(parents=True)
  for label in ("cat", "dog"):
    link = tmp_path / "links/train" / label
    link.symlink_to(animals / "test" / label)
  assert len(find(tmp_path / "links")) == 8


def picture(width, height):
  """A smooth picture, whose red is the column and green the row, in percent."""
  image = np.zeros((height, width, 3), np.uint8)
  image[..., 0] = np.linspace(0, 100, width)
  image[..., 1] = np.linspace(0, 100, height)[:, None]
  return Image.fromarray(image)


def test_images_are_scaled_and_cropped_to_image_size(tmp_path):
  folder = tmp_path / "train/cat"
  folder.mkdir(parents=True)
  picture(200, 100).save(folder / "0.png")
  turned = Image.Exif()
  turned[0x0112] = 6  # A camera held upright: turn it clockwise.
  picture(200, 100).transpose(Image.Transpose.ROTATE_90).save(
    folder / "1.png", exif=turned
  )
  stripes = np.zeros((90, 90, 3), np.uint8)
  stripes[::2] = 255  # Without antialiasing, all black or all white.
  Image.fromarray(stripes).save(folder / "2.png")
  found = find(tmp_path)
  source = read(found, image_size=10)
  images, _ = source.splits["train"]
  assert images.shape == (3, 10, 10, 3)
  by_kind = {int(image[5, 5, 2]) // 100: image for image in images}
  assert (abs(by_kind[1].astype(int) - 128) < 15).all()  # The stripes.
  pictures = [image for image in images if image[5, 5, 2] == 0]
  np.testing.assert_array_equal(*pictures)
  for first, last, axis in ((26, 73, 1), (4, 95, 0)):  # The middle half.
    line = pictures[0].mean(axis=1 - axis)[:, 1 - axis]
    assert abs(line[0] - first) < 3 and abs(line[-1] - last) < 3


def test_the_size_is_that_of_torchvision():
  """The values are from torchvision 0.29.1, Resize(7) and CenterCrop(7)."""
  rng = np.random.default_rng(0)
  image = Image.fromarray(rng.integers(0, 256, (25, 18, 3), np.uint8))
  fitted = image_files._fitted(image, 7)
  assert fitted.shape == (7, 7, 3)
  assert fitted[::3, ::3, 0].tolist() == [
    [127, 134, 129],
    [114, 116, 135],
    [121, 136, 148],
  ]


def test_images_that_exceed_the_memory_are_refused(animals, monkeypatch):
  monkeypatch.setattr(
    os, "sysconf", {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}.get
  )
  found = find(animals)
  with pytest.raises(errors.UserError) as error:
    read(found, image_size=1000)
  assert str(error.value) == (
    f"{animals}/test/cat/0.png and 71 more images of 1000x1000 do not fit into"
    " this machine's memory of 0 GB; set --config.image_size to at most 9"
  )
  assert read(found, image_size=9).splits["test"][0].shape[1] == 9


def test_each_image_size_is_prepared_separately(animals_config, tmp_path):
  for size, height in ((0, 5), (8, 8), (4, 4), (0, 5)):
    animals_config.image_size = size
    assert input_pipeline.load(animals_config).test.image_shape[0] == height
  assert len([*(tmp_path / "data").rglob("*.npz")]) == 3


def test_without_a_test_folder_the_error_gives_splits_that_work(
  animals, animals_config
):
  shutil.rmtree(animals / "test")
  config = animals_config
  config.update(train_split="train[10%:]", validation_split="train[:10%]")
  with pytest.raises(errors.UserError) as error:
    input_pipeline.load(config)
  given = re.findall(r"--config\.(\w+_split)='(\S+)'", str(error.value))
  assert len(given) == 3
  config.update(dict(given))
  data = input_pipeline.load(config)
  sizes = [len(s.labels) for s in (data.train, data.validation, data.test)]
  assert sizes == [48, 6, 6]


def test_a_link_to_a_folder_above_adds_nothing(animals):
  expected = [*find(animals)]
  (animals / "train/cat/all").symlink_to(animals)
  assert [*find(animals)] == expected
