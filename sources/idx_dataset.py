"""Reads IDX files: MNIST, Fashion-MNIST, Kuzushiji-MNIST, EMNIST or your own.

TFDS's own builders need TensorFlow to prepare these data sets, and shuffle
them. Here, the files' order is kept: test example i is image i.

The IDX format: http://yann.lecun.com/exdb/mnist/
"""

import collections
import gzip
import hashlib
import math
import pathlib
import re
import string
import sys
import zlib

from absl import logging
import ml_collections
import numpy as np
import tensorflow_datasets as tfds

from machine import errors
from sources import arrays

_IMAGE_SHAPE = (28, 28)
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


# Data sets in MNIST's format: the address of the four gzipped files, whose
# checksums TFDS knows, and the names of labels 0 to 9.
CONFIGS = {
  "mnist": (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "0,1,2,3,4,5,6,7,8,9",
  ),
  "fashion_mnist": (  # Zalando's articles of clothing, arXiv 1708.07747.
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,"
    "Ankle boot",
  ),
  "kmnist": (  # Kuzushiji-MNIST, cursive Japanese, arXiv 1812.01718.
    "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
    "o,ki,su,tsu,na,ha,ma,ya,re,wo",
  ),
}


def _file_names(prefix: str) -> tuple[str, str]:
  return f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"


FILE_NAMES = (*_file_names("train"), *_file_names("t10k"))
FILES = f"{', '.join(FILE_NAMES)}, gzipped or not"
_MNIST_SHA256 = dict(  # Hashes of the decompressed files.
  zip(
    FILE_NAMES,
    (
      "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
      "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
      "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
      "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    strict=True,
  )
)


def find(manual_dir: pathlib.Path, dataset: str) -> dict[str, pathlib.Path]:
  """Finds IDX files, gzipped or not.

  Args:
    manual_dir: the folder to search. Its subfolder named after the data set, if
      there is one, is searched first.
    dataset: one of CONFIGS; "idx" for your own files; or "idx/NAME" for files
      whose names start with `NAME-`.

  Returns:
    The path of each file, by its name in MNIST; {} if no files are found.

  Raises:
    errors.UserError: if a file is missing, or if there are several sets.
  """
  kind, _, wanted = dataset.partition("/")
  for folder in (manual_dir / kind, manual_dir):
    sets: dict[str, dict] = collections.defaultdict(dict)
    for path in sorted((*folder.glob("*"), *folder.glob("*-ubyte/*"))):
      if (match := _FILE.fullmatch(path.name)) and path.is_file():
        name, prefix, content = match.groups("")
        names = _file_names(prefix.replace("test", "t10k"))
        sets[name].setdefault(names[content == "labels"], path)
    needed = set(FILE_NAMES)
    if kind == "idx":  # Your own files may have just one split.
      if len(sets) == 1 and not wanted:
        (wanted,) = sets
      if sets and wanted not in sets:
        others = ", ".join(f"idx/{s}" if s else "idx" for s in sorted(sets))
        raise errors.UserError(
          f"config.dataset={dataset}: {folder} has {others}; must be one of"
          " these"
        )
      prefixes = tuple(each.split("-")[0] for each in sets[wanted])
      needed = {each for each in FILE_NAMES if each.startswith(prefixes)}
    if found := sets[wanted]:
      if missing := sorted(needed - found.keys()):
        raise errors.UserError(
          f"{folder} has IDX files but lacks {', '.join(missing)}"
        )
      return found
  return {}


def download(dataset: str, data_dir: pathlib.Path) -> dict[str, pathlib.Path]:
  """Downloads the files of one of CONFIGS to where TFDS would.

  Raises:
    errors.UserError: if that fails.
  """
  import requests  # Imported here because it takes a tenth of a second.

  url, _ = CONFIGS[dataset]
  urls = {name: f"{url}{name}.gz" for name in FILE_NAMES}
  logging.info("Downloading %s", url)
  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  try:
    # Check first, because without a network TFDS would retry for minutes.
    requests.head(urls[FILE_NAMES[0]], timeout=5).raise_for_status()
    manager = tfds.download.DownloadManager(download_dir=data_dir / "downloads")
    return manager.download(urls)
  except Exception as error:  # From requests, urllib3 or TFDS.
    raise errors.UserError(
      f"{url}: cannot be downloaded ({' '.join(str(error).split())}); put its"
      " four files into a folder and set config.manual_dir to it:"
      f" {', '.join(FILE_NAMES)}"
    ) from error


def read(
  paths: dict[str, pathlib.Path], config: ml_collections.ConfigDict
) -> arrays.Source:
  """Reads IDX files.

  Your own may have any number of images, any image size and any classes, which
  are named after their labels, or, in EMNIST, after the characters. EMNIST
  stores its images transposed; this turns them upright.

  Args:
    paths: the files, as returned by `find` or `download`.
    config: its `dataset` is what they must be: one of CONFIGS, or your own.

  Raises:
    errors.UserError: if a file is wrong; the message names it.
  """
  is_own = config.dataset not in CONFIGS
  emnist = re.match(r"emnist-(\w+)-", next(iter(paths.values())).name)
  splits = {}
  shape: tuple[int | None, ...] = (None, None) if is_own else _IMAGE_SHAPE
  for split, (prefix, size) in _SPLITS.items():
    image_file, label_file = _file_names(prefix)
    if image_file not in paths:
      continue
    images = read_idx(paths[image_file], (None if is_own else size, *shape))
    labels = read_idx(paths[label_file], images.shape[:1])
    shape = images.shape[1:]
    if not images.size:
      raise errors.UserError(f"{paths[image_file]}: has no images")
    if not is_own:
      _check_file(paths[image_file], image_file, images, config.dataset)
      _check_file(paths[label_file], label_file, labels, config.dataset)
    elif emnist:
      images = images.swapaxes(1, 2)
    splits[split] = arrays.Examples(images[..., np.newaxis], labels)
  if not is_own:
    return arrays.in_memory(
      tuple(CONFIGS[config.dataset][1].split(",")), splits
    )
  if not emnist:
    return arrays.from_values(splits)
  characters = _EMNIST_CLASSES.get(emnist[1], _EMNIST_OTHER_CLASSES)
  return arrays.from_values(
    splits, lambda label: characters[label : label + 1] or str(label)
  )


def _check_file(path: pathlib.Path, name: str, array, dataset: str) -> None:
  """Raises errors.UserError if a file is not that of one of CONFIGS."""
  header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
  found = hashlib.sha256(header + array.tobytes()).hexdigest()
  if dataset == "mnist" and found != _MNIST_SHA256[name]:
    raise errors.UserError(
      f"{path}: is not the original file: its SHA-256 is {found}, not"
      f" {_MNIST_SHA256[name]}; config.dataset=idx reads any IDX files"
    )
  if dataset != "mnist" and found in _MNIST_SHA256.values():
    raise errors.UserError(
      f"{path}: is a file from MNIST, not from this data set"
    )
  if array.ndim == 1 and array.max() > 9:
    raise errors.UserError(
      f"{path}: has label {array.max()} at index {array.argmax()}; must be 0"
      " to 9"
    )


def read_idx(path: pathlib.Path, shape: tuple[int | None, ...]) -> np.ndarray:
  """Reads an IDX file of unsigned bytes, gzipped or not.

  Args:
    path: the file.
    shape: the shape that the file must have; None stands for any size.

  Returns:
    The uint8 array.

  Raises:
    errors.UserError: if the file is wrong; the message names it and says why.
  """
  try:
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
      content = gzip.decompress(content)
  except (OSError, EOFError, zlib.error) as error:
    raise errors.UserError(f"{path}: cannot be read: {error}") from error
  magic = bytes([0, 0, 8, len(shape)])  # 8 stands for unsigned bytes.
  start = 4 + 4 * len(shape)
  if content[:4] != magic or len(content) < start:
    raise errors.UserError(
      f"{path}: starts with {content[:4].hex(' ') or 'nothing'}; an IDX file"
      f" of {len(shape)} dimensions starts with {magic.hex(' ')} and its sizes"
    )
  found = tuple(np.frombuffer(content[4:start], ">u4").tolist())
  if any(n not in (None, m) for n, m in zip(shape, found, strict=True)):
    raise errors.UserError(
      f"{path}: declares {' x '.join(map(str, found))} values; expected"
      f" {' x '.join('any' if n is None else str(n) for n in shape)}"
    )
  size = start + math.prod(found)
  if len(content) != size:
    raise errors.UserError(f"{path}: has {len(content)} bytes; expected {size}")
  return np.frombuffer(content, np.uint8, offset=start).reshape(found)
