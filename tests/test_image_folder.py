import os

import numpy as np
from PIL import Image
import pytest

import input_pipeline
from machine import errors
from sources import image_folder


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
  write(folder / "sketches/cat/1.png", (9, 9, 9))
  write(folder / "train/1.png", (9, 9, 9))
  return folder


def test_a_folder_of_images_loads_as_a_data_set(
  animals, default_config, tmp_path
):
  config = default_config.copy_and_resolve_references()
  config.update(
    dataset="image_folder",
    data_dir=str(tmp_path / "data"),
    manual_dir=str(animals),
    train_split="train[20%:]",
    validation_split="train[:20%]",
  )
  data = input_pipeline.load(config)
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
  animals.rename(tmp_path / "moved")
  assert input_pipeline.load(config).crc32 == data.crc32


def test_a_folder_without_splits_is_the_train_split(animals):
  found = image_folder.find(animals / "test")
  assert {*found} == {
    f"train/{name}/{i}.png" for name in ("cat", "dog", "owl") for i in range(4)
  }
  assert found["train/owl/2.png"] == animals / "test/owl/2.png"
  assert image_folder.find(animals / "no") == {}


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", os.fsdecode(b"\xff")])
def test_a_class_whose_name_cannot_be_printed_is_refused(name, animals):
  (animals / "train/owl").rename(animals / "train" / name)
  with pytest.raises(errors.UserError) as error:
    image_folder.read(image_folder.find(animals))
  assert str(error.value) == f"{name!r}: the name of a class must be printable"


@pytest.mark.parametrize(
  "mode, value, expected",
  [
    ("L", 77, [77]),
    ("1", 1, [255]),
    ("P", 1, None),
    ("LA", (77, 255), [77]),
    ("RGBA", (1, 2, 3, 255), [1, 2, 3]),
  ],
)
def test_modes_that_convert_without_loss_are_read(
  mode, value, expected, tmp_path
):
  path = tmp_path / "train/cat/1.png"
  write(path, value, mode)
  if mode == "P":
    image = Image.new("P", (6, 5), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(path)
    expected = [10, 20, 30]
  source = image_folder.read(image_folder.find(tmp_path))
  assert source.image_shape == (5, 6, len(expected))
  (image,), (label,) = source.splits["train"]
  assert image.dtype == np.uint8 and label == 0
  np.testing.assert_array_equal(image, np.broadcast_to(expected, image.shape))


@pytest.mark.parametrize(
  "mode, size, message",
  [
    (
      "RGB",
      (7, 5),
      "is 7x5 RGB, but {first} is 6x5 RGB; all must have one size, and",
    ),
    (
      "L",
      (6, 5),
      "is 6x5 gray, but {first} is 6x5 RGB; all must have one size, and",
    ),
    ("RGBA", (6, 5), "cannot be read: its mode is RGBA; must be opaque 8-bit"),
    ("I;16", (6, 5), "cannot be read: its mode is I;16; must be opaque 8-bit"),
    (None, None, "cannot be read: cannot identify image file"),
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
    image_folder.read(image_folder.find(animals))
  assert str(error.value).startswith(f"{path}: {message.format(first=first)}")
