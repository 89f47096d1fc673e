import numpy as np
import pytest

import input_pipeline
from machine import errors
from sources import array_files

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 5, 4), np.uint8)
LABELS = np.arange(12) % 3 + 4  # 4, 5 and 6.


def read(folder, dataset="arrays"):
  return array_files.read(array_files.find(folder, dataset), None)


@pytest.mark.parametrize(
  "names, splits",
  [
    (("x_train", "y_train", "x_test", "y_test"), ("train", "test")),  # Keras.
    (("X_train", "y_train"), ("train",)),
    (
      ("train_images", "train_labels", "val_images", "val_labels"),  # MedMNIST.
      ("train", "validation"),
    ),
  ],
)
@pytest.mark.parametrize("channels", [(), (3,)])
def test_npz_files_are_read(names, splits, channels, tmp_path):
  shape = (12, 5, 4, *channels)
  images = RNG.integers(0, 256, shape, np.uint8)
  arrays = (images, LABELS, images[:4], LABELS[:4, None])
  np.savez(
    tmp_path / "some.npz", classes=[1], **dict(zip(names, arrays, strict=False))
  )
  source = read(tmp_path)
  assert source.class_names == ("4", "5", "6")
  assert tuple(source.splits) == splits
  expected = images if channels else images[..., None]
  for split, n in zip(splits, (12, 4), strict=False):
    found, labels = source.splits[split]
    np.testing.assert_array_equal(found, expected[:n])
    np.testing.assert_array_equal(labels, LABELS[:n] - 4)


def write_csv(path, images, labels=None, header=True):
  rows = images.reshape(len(images), -1)
  names = [f"pixel{i}" for i in range(rows.shape[1])]
  if labels is not None:
    rows = np.concatenate([labels[:, None], rows], axis=1)
    names = ["label", *names]
  lines = [",".join(map(str, row)) for row in rows.tolist()]
  path.write_text("\n".join([",".join(names), *lines]) + "\n")


def test_kaggles_csv_files_are_read(default_config, tmp_path):
  images = RNG.integers(0, 256, (12, 5, 5), np.uint8)
  write_csv(tmp_path / "train.csv", images, LABELS)
  write_csv(tmp_path / "test.csv", images)  # Without labels.
  (tmp_path / "sample_submission.csv").write_text("ImageId,Label\n1,0\n")
  source = read(tmp_path)
  assert tuple(source.splits) == ("train",)
  found, labels = source.splits["train"]
  np.testing.assert_array_equal(found, images[..., None])
  np.testing.assert_array_equal(labels, LABELS - 4)

  (tmp_path / "train.csv").rename(tmp_path / "fashion-mnist_Train.CSV")
  with pytest.raises(errors.UserError, match="test.csv: has no column `label`"):
    read(tmp_path, "arrays/test")
  (tmp_path / "test.csv").unlink()  # Fashion-MNIST's has labels.
  path = tmp_path / "fashion-mnist_test.csv"
  write_csv(path, images[:4], LABELS[:4])
  path.write_text(path.read_text(), "utf-8-sig")  # As Excel saves it.
  config = default_config.copy_and_resolve_references()
  config.update(
    dataset="arrays",
    data_dir=str(tmp_path / "data"),
    manual_dir=str(tmp_path),
    train_split="train[25%:]",
    validation_split="train[:25%]",
  )
  data = input_pipeline.load(config)
  assert [len(s.labels) for s in data.splits.values()] == [9, 3, 4]
  np.testing.assert_array_equal(data.test.labels, LABELS[:4] - 4)


def test_a_name_picks_one_of_several_files(tmp_path):
  for name, value in (("bloodmnist", 0), ("pathmnist", 1), ("pathmnist_64", 2)):
    np.savez(
      tmp_path / f"{name}.npz",
      train_images=IMAGES * 0 + value,
      train_labels=LABELS,
    )
  for name, value in (("pathmnist", 1), ("pathmnist_64", 2), ("blood", 0)):
    images, _ = read(tmp_path, f"arrays/{name}").splits["train"]
    assert (images == value).all()
  with pytest.raises(errors.UserError) as error:
    read(tmp_path)
  assert str(error.value) == (
    f"{tmp_path}/pathmnist.npz: is another set; pick one by"
    " arrays/pathmnist.npz"
  )
  assert array_files.find(tmp_path, "arrays/blod") == {}


BAD = {
  "other names": (
    dict(a=IMAGES, b=LABELS),
    "has a, b, but not x_train and y_t",
  ),
  "floats": (
    dict(x_train=IMAGES / 255, y_train=LABELS),
    "has float64 (12, 5, 4), int64 (12,); must be uint8 (n, height, width[, ",
  ),
  "volumes": (
    dict(x_train=np.zeros((2, 4, 4, 4), np.uint8), y_train=LABELS[:2]),
    "has uint8 (2, 4, 4, 4), int64 (2,); must be uint8 (n, height, width[, 3",
  ),
  "several labels": (
    dict(x_train=IMAGES, y_train=np.zeros((12, 14), int)),
    "has uint8 (12, 5, 4), int64 (12, 14); must be uint8",
  ),
  "names for labels": (
    dict(x_train=IMAGES, y_train=LABELS.astype(str)),
    "has uint8 (12, 5, 4), <U21 (12,); must be uint8",
  ),
  "too few labels": (
    dict(x_train=IMAGES, y_train=LABELS[1:]),
    "has uint8 (12, 5, 4), int64 (11,); must be uint8",
  ),
  "no images": (
    dict(x_train=IMAGES[:0], y_train=LABELS[:0]),
    "has uint8 (0, 5, 4), int64 (0,); must be uint8",
  ),
  "no squares": (
    dict(x_train=IMAGES.reshape(12, 20)[:, 1:], y_train=LABELS),
    "has uint8 (12, 19), int64 (12,); must be uint8",
  ),
  "other sizes": (
    dict(x_train=IMAGES, y_train=LABELS)
    | dict(x_test=IMAGES[:, 1:], y_test=LABELS),
    "has images of several sizes; all must have one",
  ),
  "objects": (
    dict(x_train=np.array([{}, 1]), y_train=LABELS),
    "Object arrays cannot be loaded",
  ),
}


@pytest.mark.parametrize("name", BAD)
def test_the_error_for_a_bad_npz_names_it(name, tmp_path):
  arrays, message = BAD[name]
  np.savez(tmp_path / "a.npz", **arrays)
  with pytest.raises(errors.UserError) as error:
    read(tmp_path)
  assert str(error.value).startswith(f"{tmp_path}/a.npz: {message}")


@pytest.mark.parametrize(
  "content, message",
  [
    ("a,b\n1,2\n", "has no column `label`"),
    ("label,a\n1,300\n", "could not convert string '300' to uint8"),
    ("label,a,b\n1,2,3\n", "has uint8 .*; must be uint8"),  # No square.
    ("label,a\n1,2\n1,2,3\n", "the number of columns changed"),
    ("", "has no column `label`"),
    ("label,a\n", "input contained no data"),
  ],
)
def test_the_error_for_a_bad_csv_names_it(content, message, tmp_path):
  (tmp_path / "train.csv").write_text(content)
  with pytest.raises(errors.UserError, match=message) as error:
    read(tmp_path)
  assert str(error.value).startswith(f"{tmp_path}/train.csv: ")


def test_a_truncated_npz_is_refused(tmp_path):
  np.savez(tmp_path / "a.npz", x_train=IMAGES, y_train=LABELS)
  content = (tmp_path / "a.npz").read_bytes()
  (tmp_path / "a.npz").write_bytes(content[:-100])
  with pytest.raises(errors.UserError, match="a.npz: "):
    read(tmp_path)
