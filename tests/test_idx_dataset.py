import contextlib
import gzip
import http.server
import pathlib
import re
import shutil
import tempfile
import threading
import zlib

from conftest import PROJECT
from conftest import damaged
from conftest import idx_bytes
from conftest import pixels
import hypothesis
from hypothesis import strategies as st
import ml_collections
import numpy as np
import pytest
import tensorflow_datasets as tfds

from machine import errors
from sources import idx_dataset

SHIPPED = PROJECT / "data/mnist"
FILES = (
  "train-images-idx3-ubyte",
  "train-labels-idx1-ubyte",
  "t10k-images-idx3-ubyte",
  "t10k-labels-idx1-ubyte",
)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_read_idx(tmp_path, compress):
  array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
  path = tmp_path / "file"
  path.write_bytes(compress(idx_bytes(array)))
  np.testing.assert_array_equal(idx_dataset.read_idx(path, (2, 3, 4)), array)


GOOD = idx_bytes(np.arange(6).reshape(2, 3))
BAD = {
  "empty": (b"", "starts with nothing"),
  "not IDX": (b"<html>" + GOOD, "starts with 3c 68 74 6d"),
  "not bytes": (b"\0\0\x0d" + GOOD[3:], "starts with 00 00 0d 02"),
  "other dimensions": (idx_bytes(np.arange(6)), "starts with 00 00 08 01"),
  "other shape": (idx_bytes(np.zeros((3, 2))), "declares 3 x 2"),
  "2^31 rows": (GOOD[:4] + b"\x80\0\0\0" + GOOD[8:], "declares 2147483648 x 3"),
  "cut in the header": (GOOD[:9], "starts with 00 00 08 02 and its sizes"),
  "cut after the header": (GOOD[:12], "has 12 bytes; expected 18"),
  "cut in the data": (GOOD[:-1], "has 17 bytes; expected 18"),
  "too long": (GOOD + b"\0", "has 19 bytes; expected 18"),
  "gzip cut": (gzip.compress(GOOD)[:-9], "cannot be read"),
  "gzip damaged": (gzip.compress(GOOD)[:-9] + bytes(9), "cannot be read"),
}


@pytest.mark.parametrize("content, message", BAD.values(), ids=BAD.keys())
def test_the_error_for_a_bad_file_names_it(tmp_path, content, message):
  path = tmp_path / "some-file"
  path.write_bytes(content)
  with pytest.raises(errors.UserError, match=message) as error:
    idx_dataset.read_idx(path, (2, 3))
  assert str(path) in str(error.value)


def test_read_idx_accepts_any_size_for_none(tmp_path):
  path = tmp_path / "file"
  path.write_bytes(GOOD)
  np.testing.assert_array_equal(
    idx_dataset.read_idx(path, (None, 3)), [[0, 1, 2], [3, 4, 5]]
  )
  for content, shape, message in (
    (GOOD, (None, 4), "declares 2 x 3 values; expected any x 4"),
    (GOOD[:9], (None, None), "starts with 00 00 08 02 and its sizes"),
    (GOOD[:-1], (None, None), "has 17 bytes; expected 18"),
    (
      GOOD[:4] + b"\xff" * 8 + GOOD[12:],
      (None, None),
      "has 18 bytes; expected",
    ),
  ):
    path.write_bytes(content)
    with pytest.raises(errors.UserError, match=message):
      idx_dataset.read_idx(path, shape)


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(
  st.binary(max_size=100) | damaged([GOOD, gzip.compress(GOOD, mtime=0)])
)
def test_any_bytes_give_the_right_array_or_a_clean_error(content):
  with contextlib.suppress(OSError, EOFError, zlib.error):
    is_gzip = content[:2] == b"\x1f\x8b"
    plain = gzip.decompress(content) if is_gzip else content
  with tempfile.NamedTemporaryFile() as file:
    file.write(content)
    file.flush()
    try:
      array = idx_dataset.read_idx(pathlib.Path(file.name), (2, 3))
    except errors.UserError as error:
      assert str(error).startswith(f"{file.name}: ")
    else:
      assert idx_bytes(array) == plain


def test_a_changed_mnist_file_is_refused(tmp_path):
  name = "t10k-labels-idx1-ubyte"
  content = bytearray(gzip.decompress((SHIPPED / f"{name}.gz").read_bytes()))
  content[100] = (content[100] + 1) % 10
  for file in FILES:
    shutil.copy(SHIPPED / f"{file}.gz", tmp_path)
  (tmp_path / name).write_bytes(content)  # Takes precedence over the .gz.
  with pytest.raises(errors.UserError, match=f"{name}: is not the original"):
    read("mnist", tmp_path)


def read(dataset, manual_dir):
  config = ml_collections.ConfigDict({"dataset": dataset})
  return idx_dataset.read(idx_dataset.find(manual_dir, dataset), config)


def test_wrong_sets_of_files_are_refused(family, tmp_path):
  folder, _, labels = family

  def refuses(message):
    with pytest.raises(errors.UserError, match=message):
      read("kmnist", tmp_path)
    for file in tmp_path.glob("*-ubyte"):
      file.unlink()

  def link(names, of=FILES):
    for name, target in zip(names, of, strict=True):
      (tmp_path / name).symlink_to(folder / target)

  link(FILES[:2], of=FILES[:2])
  refuses(f"lacks {FILES[2]}, {FILES[3]}")
  link(FILES, of=(*FILES[1::-1], *FILES[2:]))  # Images and labels swapped.
  refuses(f"{FILES[0]}: starts with 00 00 08 01")
  link(FILES, of=(*FILES[2:], *FILES[:2]))  # Training and test swapped.
  refuses(f"{FILES[0]}: declares 100 x 28 x 28")
  link(FILES[:3], of=FILES[:3])
  labels = labels.copy()
  labels[43] = 10
  (tmp_path / FILES[3]).write_bytes(idx_bytes(labels))
  refuses(f"{FILES[3]}: has label 10 at index 43; must be 0 to 9")


def test_plain_files_are_read_in_their_order(family):
  folder, images, labels = family
  source = read("kmnist", folder)
  assert source.class_names[9] == "wo"
  read_images, read_labels = source.splits["test"]
  np.testing.assert_array_equal(read_images[..., 0], images)
  np.testing.assert_array_equal(read_labels, labels)


@pytest.mark.parametrize(
  "train, test",
  [
    ("train-{}.idx{}-ubyte", "t10k-{}.idx{}-ubyte"),  # As on Kaggle.
    ("train-{0}-idx{1}-ubyte/train-{0}-idx{1}-ubyte", "t10k-{}.idx{}-ubyte"),
    ("train-{}-idx{}-ubyte", "test-{}-idx{}-ubyte.gz"),
  ],
)
def test_files_with_other_common_names_are_found(train, test, family, tmp_path):
  folder, *_ = family
  for name in FILES:
    split, kind, dimensions, _ = name.split("-")
    new = (train if split == "train" else test).format(kind, dimensions[-1])
    (tmp_path / "kmnist" / new).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).rename(tmp_path / "kmnist" / new)
    (tmp_path / name).touch()  # Another data set's.
  (tmp_path / "kmnist/.DS_Store").touch()
  found = idx_dataset.find(tmp_path, "kmnist")
  assert {*found} == {*FILES}
  for name, path in found.items():
    assert name.split("-")[1] in path.name
    assert path.is_file() and tmp_path / "kmnist" in path.parents
  assert idx_dataset.find(tmp_path / "elsewhere", "kmnist") == {}


def write_idx(folder, name, images, labels):
  for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
    path = folder / f"{name.format(kind)}-ubyte.gz"
    path.write_bytes(gzip.compress(idx_bytes(array), compresslevel=1))


def read_own(folder, dataset="idx"):
  return read(dataset, folder)


def test_own_files_may_have_images_of_any_number_size_and_class(tmp_path):
  images = np.arange(5 * 3 * 4).reshape(5, 3, 4)
  write_idx(tmp_path, "train-{}", images, [7, 40, 7, 200, 7])
  write_idx(tmp_path, "t10k-{}", images[:2] + 100, [40, 3])
  source = read_own(tmp_path)
  assert source.class_names == ("3", "7", "40", "200")
  train, train_labels = source.splits["train"]
  test, test_labels = source.splits["test"]
  np.testing.assert_array_equal(train, images[..., None])
  np.testing.assert_array_equal(test, images[:2, ..., None] + 100)
  np.testing.assert_array_equal(train_labels, [1, 2, 1, 3, 1])
  np.testing.assert_array_equal(test_labels, [2, 0])


def test_emnists_letters_are_turned_upright(tmp_path):
  upright = np.arange(3 * 28 * 28).reshape(3, 28, 28) % 251
  lying = upright.swapaxes(1, 2)
  write_idx(tmp_path, "emnist-letters-train-{}", lying, [1, 26, 2])
  source = read_own(tmp_path)  # A test set is not required.
  assert source.class_names == ("A", "B", "Z")
  images, labels = source.splits["train"]
  np.testing.assert_array_equal(images, upright[..., None])
  np.testing.assert_array_equal(labels, [0, 2, 1])
  assert {*source.splits} == {"train"}

  write_idx(tmp_path, "emnist-balanced-train-{}", lying, [0, 10, 46])
  with pytest.raises(errors.UserError) as error:
    read_own(tmp_path)
  assert str(error.value) == (
    f"config.dataset=idx: {tmp_path} has idx/emnist-balanced,"
    " idx/emnist-letters; must be one of these"
  )
  source = read_own(tmp_path, "idx/emnist-balanced")
  assert source.class_names == ("0", "A", "t")
  write_idx(tmp_path, "emnist-byclass-train-{}", lying, [61, 36, 62])
  source = read_own(tmp_path, "idx/emnist-byclass")
  assert source.class_names == ("a", "z", "62")  # EMNIST has no label 62.


def test_the_error_for_a_bad_own_file_names_it(tmp_path):
  images = np.zeros((2, 3, 4))
  write_idx(tmp_path, "train-{}", images, [0, 1])
  for test, labels, message in (
    (images, [0], "t10k-labels.*declares 1 values; expected 2"),
    (np.zeros((2, 4, 4)), [0, 1], "declares 2 x 4 x 4 values; expected any x"),
    (images[:0], [], "t10k-images-idx3-ubyte.gz: has no images"),
  ):
    write_idx(tmp_path, "t10k-{}", test, labels)
    with pytest.raises(errors.UserError, match=message):
      read_own(tmp_path)
  (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
  with pytest.raises(errors.UserError, match="lacks t10k-labels-idx1-ubyte$"):
    read_own(tmp_path)


def serve_from(url, monkeypatch):
  _, class_names = idx_dataset.CONFIGS["fashion_mnist"]
  monkeypatch.setitem(idx_dataset.CONFIGS, "fashion_mnist", (url, class_names))


def test_a_download_without_a_network_is_not_retried(tmp_path, monkeypatch):
  serve_from("http://127.0.0.1:1/", monkeypatch)  # No server.
  monkeypatch.setattr(tfds.download.DownloadManager, "download", pytest.fail)
  with pytest.raises(errors.UserError) as error:
    idx_dataset.download("fashion_mnist", tmp_path)
  assert re.fullmatch(
    r"http://127.0.0.1:1/: cannot be downloaded \(.*refused.*\); put its four"
    r" files into a folder and set config.manual_dir to it:"
    rf" {', '.join(FILES)}",
    str(error.value),
  )


def test_missing_files_are_downloaded(family, tmp_path, monkeypatch):
  folder, images, _ = family
  (tmp_path / "served").mkdir()
  for name in FILES:
    content = gzip.compress((folder / name).read_bytes(), compresslevel=1)
    (tmp_path / "served" / f"{name}.gz").write_bytes(content)

  class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args):
      super().__init__(*args, directory=str(tmp_path / "served"))

    def log_message(self, *args):
      pass

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  serve_from(f"http://127.0.0.1:{server.server_port}/", monkeypatch)
  try:
    found = idx_dataset.download("fashion_mnist", tmp_path / "data")
    (tmp_path / f"served/{FILES[0]}.gz").unlink()
    monkeypatch.setattr(tfds.download.DownloadManager, "download", pytest.fail)
    with pytest.raises(
      errors.UserError,
      match="cannot be downloaded.*404.*put its four files into",
    ):
      idx_dataset.download("fashion_mnist", tmp_path / "elsewhere")
  finally:
    server.shutdown()
    server.server_close()
  config = ml_collections.ConfigDict({"dataset": "fashion_mnist"})
  read_images, _ = idx_dataset.read(found, config).splits["test"]
  np.testing.assert_array_equal(read_images[..., 0], images)


def test_tfds_knows_the_checksums_of_all_urls():
  from tensorflow_datasets.core.download import checksums

  known = checksums.get_all_url_infos()
  for url, _ in idx_dataset.CONFIGS.values():
    for name in FILES:
      assert f"{url}{name}.gz" in known


def test_prepared_mnist_equals_the_shipped_files_in_order(mnist):
  def shipped(name, header):
    content = gzip.decompress((SHIPPED / f"{name}.gz").read_bytes())
    return np.frombuffer(content, np.uint8, offset=header)

  images = shipped(FILES[0], 16).reshape(-1, 28, 28, 1)
  labels = shipped(FILES[1], 8)
  np.testing.assert_array_equal(pixels(mnist.train), images[5000:])
  np.testing.assert_array_equal(mnist.train.labels, labels[5000:])
  np.testing.assert_array_equal(pixels(mnist.validation), images[:5000])
  np.testing.assert_array_equal(mnist.validation.labels, labels[:5000])
  images = shipped(FILES[2], 16).reshape(-1, 28, 28, 1)
  np.testing.assert_array_equal(pixels(mnist.test), images)
  np.testing.assert_array_equal(mnist.test.labels, shipped(FILES[3], 8))


def test_mnist_is_not_prepared_where_tfds_puts_its_own(default_config):
  names = {
    path.name for path in pathlib.Path(default_config.data_dir).iterdir()
  }
  assert names == {"own_images"}


def test_mnist_is_not_prepared_as_another_data_set():
  with pytest.raises(errors.UserError, match="is a file from MNIST, not from"):
    read("kmnist", SHIPPED)
