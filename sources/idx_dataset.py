"""Reads IDX files: MNIST, Fashion-MNIST, Kuzushiji-MNIST, EMNIST or your own.

TFDS's own builders need TensorFlow to prepare these data sets, and shuffle
them. The builder here keeps the order of the files: test example i is image i.

The IDX format: http://yann.lecun.com/exdb/mnist/
"""

import collections
import dataclasses
import gzip
import hashlib
import math
import os
import pathlib
import re
import string
import zlib

from absl import logging
import numpy as np
import tensorflow_datasets as tfds

from machine import errors
from sources import own_images

_IMAGE_SHAPE = (28, 28)
_NUM_CLASSES = 10
_SPLITS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}

# Matches the original names and Kaggle's (`train-images.idx3-ubyte`). EMNIST's
# begin with the name of the set: `emnist-letters-`.
_FILE = re.compile(
  r"(?:(.+)-)?(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(?:\.gz)?"
)
_EMNIST_CLASSES = {
  "byclass": string.digits + string.ascii_uppercase + string.ascii_lowercase,
  "letters": " " + string.ascii_uppercase,  # Its labels start at 1.
}
_EMNIST_OTHER_CLASSES = string.digits + string.ascii_uppercase + "abdefghnqrt"

_MNIST_SHA256 = {  # Hashes of the decompressed files.
  "train-images-idx3-ubyte": (
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
  ),
  "train-labels-idx1-ubyte": (
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
  ),
  "t10k-images-idx3-ubyte": (
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
  ),
  "t10k-labels-idx1-ubyte": (
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
  ),
}


@dataclasses.dataclass(kw_only=True)
class IdxConfig(tfds.core.BuilderConfig):
  """A data set in MNIST's format.

  Attributes:
    url: the address of its four gzipped files. TFDS checks the ones whose
      checksums it knows.
    sha256: the hashes of its decompressed files by name; empty if unknown.
    class_names: the names of labels 0 to 9.
  """

  url: str
  class_names: tuple[str, ...]
  sha256: dict[str, str] = dataclasses.field(default_factory=dict)


_CONFIGS = [
  IdxConfig(
    name="mnist",
    description="MNIST, digits, http://yann.lecun.com/exdb/mnist/.",
    url="https://storage.googleapis.com/cvdf-datasets/mnist/",
    sha256=_MNIST_SHA256,
    class_names=tuple("0123456789"),
  ),
  IdxConfig(
    name="fashion_mnist",
    description="Zalando's article images, arXiv 1708.07747.",
    url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    class_names=(
      "T-shirt/top",
      "Trouser",
      "Pullover",
      "Dress",
      "Coat",
      "Sandal",
      "Shirt",
      "Sneaker",
      "Bag",
      "Ankle boot",
    ),
  ),
  IdxConfig(
    name="kmnist",
    description="Kuzushiji-MNIST, cursive Japanese, arXiv 1812.01718.",
    url="http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
    class_names=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
  ),
]

NAMES = tuple(config.name for config in _CONFIGS)


class IdxDataset(own_images.OwnImages, skip_registration=True):  # type: ignore[call-arg]  # As for OwnImages.
  """Builds one of `NAMES`: `IdxDataset(config="mnist", manual_dir=...)`."""

  BUILDER_CONFIGS = _CONFIGS

  def __init__(self, *, config: str, manual_dir: os.PathLike, **kwargs):
    """Uses the files in `manual_dir`, or downloads them if there are none."""
    class_names = self.builder_configs[config].class_names
    source = own_images.Source((*_IMAGE_SHAPE, 1), class_names, splits={})
    super().__init__(source=source, config=config, **kwargs)
    self._manual_dir = pathlib.Path(manual_dir)

  def _read(self, dl_manager):
    config = self.builder_config
    paths = find(self._manual_dir, config.name) or self._download(dl_manager)
    return {
      split: read_split(paths, prefix, num_examples, config.sha256)
      for split, (prefix, num_examples) in _SPLITS.items()
    }

  def _download(self, dl_manager):
    import requests  # Imported here because it takes a tenth of a second.

    config = self.builder_config
    urls = {name: f"{config.url}{name}.gz" for name in FILE_NAMES}
    logging.info("Downloading %s", config.url)
    try:
      # Check first, because without a network TFDS would retry for minutes.
      first = requests.head(urls[FILE_NAMES[0]], timeout=5)
      first.raise_for_status()
      return dl_manager.download(urls)
    except Exception as error:  # From requests, urllib3 or TFDS.
      raise errors.UserError(
        f"{config.url}: cannot be downloaded ({' '.join(str(error).split())});"
        f" put its four files into {self._manual_dir / config.name}, or set"
        f" config.manual_dir to their folder: {', '.join(FILE_NAMES)}"
      ) from error


def _file_names(prefix: str) -> tuple[str, str]:
  return f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"


FILE_NAMES = (*_file_names("train"), *_file_names("t10k"))


def find(manual_dir: pathlib.Path, dataset: str) -> dict[str, pathlib.Path]:
  """Finds IDX files, gzipped or not.

  Args:
    manual_dir: the folder to search. Its subfolder named after the data set, if
      there is one, is searched first.
    dataset: one of NAMES; "idx" for your own files; or "idx/NAME" for files
      whose names start with `NAME-`.

  Returns:
    The path of each file, by its name in MNIST; {} if no files are found.

  Raises:
    errors.UserError: if a file is missing, or if there are several sets.
  """
  name, _, wanted = dataset.partition("/")
  for folder in (manual_dir / name, manual_dir):
    sets: dict[str, dict] = collections.defaultdict(dict)
    for path in sorted((*folder.glob("*"), *folder.glob("*-ubyte/*"))):
      if (match := _FILE.fullmatch(path.name)) and path.is_file():
        before, prefix, kind = match.groups("")
        prefix = prefix.replace("test", "t10k")
        original = _file_names(prefix)[kind == "labels"]
        sets[before].setdefault(original, path)
    if name == "idx" and len(sets) == 1 and not wanted:
      (wanted,) = sets
    if found := sets[wanted]:
      needed = set(FILE_NAMES)
      if name == "idx":  # Your own files may have just one split.
        prefixes = tuple(each.split("-")[0] for each in found)
        needed = {each for each in FILE_NAMES if each.startswith(prefixes)}
      if missing := sorted(needed - found.keys()):
        raise errors.UserError(
          f"{folder} has IDX files but lacks {', '.join(missing)}"
        )
      return found
    if name == "idx" and (others := sorted(sets.keys() - {wanted})):
      names = ", ".join(f"idx/{each}" if each else "idx" for each in others)
      raise errors.UserError(
        f"config.dataset={dataset}: {folder} has {names}; must be one of these"
      )
  return {}


def read(paths: dict[str, pathlib.Path]) -> own_images.Source:
  """Reads IDX files with any number of images, any image size and any classes.

  Classes are named after their labels, or, in EMNIST, after the characters.
  EMNIST stores its images transposed; this turns them upright.

  Args:
    paths: the files, as returned by `find`.

  Raises:
    errors.UserError: if a file is wrong; the message names it.
  """
  images, labels, shape = {}, {}, (None, None, None)
  for split, (prefix, _) in _SPLITS.items():
    names = _file_names(prefix)
    if names[0] in paths:
      of_images, of_labels = (paths[name] for name in names)
      images[split] = read_idx(of_images, shape)
      labels[split] = read_idx(of_labels, images[split].shape[:1])
      shape = (None, *images[split].shape[1:])
      if not images[split].size:
        raise errors.UserError(f"{of_images}: has no images")
  values = np.unique(np.concatenate([*labels.values()])).tolist()
  first = next(iter(paths.values()))
  if emnist := re.match(r"emnist-(\w+)-", first.name):
    logging.info("%s is from EMNIST; transposing the images", first)
    images = {split: array.swapaxes(1, 2) for split, array in images.items()}
    characters = _EMNIST_CLASSES.get(emnist[1], _EMNIST_OTHER_CLASSES)
    if values[-1] >= len(characters):
      raise errors.UserError(
        f"{first.parent}: EMNIST's {emnist[1]} has no label {values[-1]}"
      )
    class_names = tuple(characters[value] for value in values)
  else:
    class_names = tuple(map(str, values))
  splits = {
    split: (array[..., np.newaxis], np.searchsorted(values, labels[split]))
    for split, array in images.items()
  }
  height, width = next(iter(images.values())).shape[1:]
  return own_images.Source((height, width, 1), class_names, splits)


def read_split(
  paths: dict[str, os.PathLike],
  prefix: str,
  num_examples: int,
  sha256: dict[str, str],
) -> tuple[np.ndarray, np.ndarray]:
  """Reads the images and labels of one split, and checks them.

  Args:
    paths: the IDX files, gzipped or not, by their original names.
    prefix: "train" or "t10k".
    num_examples: how many examples there must be.
    sha256: the hashes of the decompressed files by name, if known.

  Returns:
    Images, uint8 [num_examples, 28, 28, 1], and labels, uint8 [num_examples].

  Raises:
    errors.UserError: if a file is damaged or not the expected one; the message
      names it.
  """
  images_name, labels_name = _file_names(prefix)
  images = read_idx(paths[images_name], (num_examples, *_IMAGE_SHAPE))
  labels = read_idx(paths[labels_name], (num_examples,))
  for name, array in ((images_name, images), (labels_name, labels)):
    header = (
      bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    )
    found = hashlib.sha256(header + array.tobytes()).hexdigest()
    if name in sha256 and found != sha256[name]:
      raise errors.UserError(
        f"{paths[name]}: is not the original file: its SHA-256 is {found}, not"
        f" {sha256[name]}; config.dataset=idx reads any IDX files"
      )
    if name not in sha256 and found in _MNIST_SHA256.values():
      raise errors.UserError(
        f"{paths[name]}: is a file from MNIST, not from this data set"
      )
  if labels.max() >= _NUM_CLASSES:
    raise errors.UserError(
      f"{paths[labels_name]}: has label {labels.max()} at index"
      f" {labels.argmax()}; must be 0 to {_NUM_CLASSES - 1}"
    )
  return images[..., np.newaxis], labels


def read_idx(path: os.PathLike, shape: tuple[int | None, ...]) -> np.ndarray:
  """Reads an IDX file of unsigned bytes, gzipped or not.

  Args:
    path: the file.
    shape: the shape that the file must have; None stands for any size. If no
      size is None, no more is read than this shape needs.

  Returns:
    The uint8 array.

  Raises:
    errors.UserError: if the file is wrong; the message names it and says why.
  """
  magic = bytes([0, 0, 8, len(shape)])  # 8 stands for unsigned bytes.
  start = 4 + 4 * len(shape)
  sizes = [n for n in shape if n is not None]
  limit = start + math.prod(sizes) + 1 if len(sizes) == len(shape) else -1
  try:
    with open(path, "rb") as file:
      is_gzip = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if is_gzip else open(path, "rb") as file:
      content = file.read(limit)
  except (OSError, EOFError, zlib.error) as error:
    raise errors.UserError(f"{path}: cannot be read: {error}") from error
  if content[:4] != magic:
    raise errors.UserError(
      f"{path}: starts with {content[:4].hex(' ') or 'nothing'}; an IDX file"
      f" of {len(shape)} dimensions starts with {magic.hex(' ')}"
    )
  found = tuple(n or 0 for n in shape)
  if len(content) >= start:
    found = tuple(np.frombuffer(content[4:start], ">u4").tolist())
  if any(n not in (None, m) for n, m in zip(shape, found, strict=True)):
    raise errors.UserError(
      f"{path}: declares {' x '.join(map(str, found))} values; expected"
      f" {' x '.join('any' if n is None else str(n) for n in shape)}"
    )
  size = start + math.prod(found)
  if len(content) != size:
    raise errors.UserError(
      f"{path}: has {'more' if len(content) > size else len(content)} bytes;"
      f" expected {size}"
    )
  return np.frombuffer(content, np.uint8, offset=start).reshape(found)
