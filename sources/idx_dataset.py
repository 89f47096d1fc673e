"""MNIST, Fashion-MNIST and Kuzushiji-MNIST as a TFDS builder.

TFDS's own builders of these sets need TensorFlow to prepare them, and shuffle.
This one needs none, keeps the order of the files (test example i is image i),
and writes array_record under a name of its own, so it leaves alone whatever
else a shared `data_dir` holds.

The IDX format: http://yann.lecun.com/exdb/mnist/
"""

import dataclasses
import gzip
import hashlib
import os
import pathlib
import zlib

from absl import app
from absl import logging
import numpy as np
import tensorflow_datasets as tfds

_IMAGE_SHAPE = (28, 28)
_NUM_CLASSES = 10
_SPLITS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}

_MNIST_SHA256 = {  # Of the decompressed files.
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
  """One data set of the family.

  Attributes:
    url: the folder of its four gzipped files, the one that TFDS names, so that
      TFDS's checksums hold for the download.
    sha256: of its decompressed files, by name; empty where not recorded.
    class_names: of labels 0 to 9.
    homepage: where it is described.
  """

  url: str
  class_names: tuple[str, ...]
  homepage: str
  sha256: dict[str, str] = dataclasses.field(default_factory=dict)


_CONFIGS = [
  IdxConfig(
    name="mnist",
    description="The MNIST database of handwritten digits.",
    homepage="http://yann.lecun.com/exdb/mnist/",
    url="https://storage.googleapis.com/cvdf-datasets/mnist/",
    sha256=_MNIST_SHA256,
    class_names=tuple("0123456789"),
  ),
  IdxConfig(
    name="fashion_mnist",
    description="Zalando's article images, arXiv 1708.07747.",
    homepage="https://github.com/zalandoresearch/fashion-mnist",
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
    homepage="http://codh.rois.ac.jp/kmnist/index.html.en",
    url="http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
    class_names=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
  ),
]

NAMES = tuple(config.name for config in _CONFIGS)


class IdxDataset(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """The builder: `IdxDataset(config="mnist", data_dir=..., manual_dir=...)`."""

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = _CONFIGS

  def __init__(self, *, manual_dir: os.PathLike, **kwargs):
    """Looks for IDX files in `manual_dir/<config>/`, then `manual_dir/`."""
    super().__init__(**kwargs)
    self._manual_dir = pathlib.Path(manual_dir)

  def _info(self) -> tfds.core.DatasetInfo:
    config = self.builder_config
    return tfds.core.DatasetInfo(
      builder=self,
      description=config.description,
      homepage=config.homepage,
      # A Tensor is prepared and read three times as fast as a PNG image.
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Tensor(
            shape=(*_IMAGE_SHAPE, 1),
            dtype=np.uint8,
            encoding=tfds.features.Encoding.BYTES,
          ),
          "label": tfds.features.ClassLabel(names=list(config.class_names)),
        }
      ),
      supervised_keys=("image", "label"),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    names = [
      name for prefix, _ in _SPLITS.values() for name in _file_names(prefix)
    ]
    paths = _find(self._manual_dir, self.builder_config.name, names)
    if paths is None:
      paths = self._download(dl_manager, names)
    return {
      split: self._generate_examples(
        *read_split(paths, prefix, num_examples, self.builder_config.sha256)
      )
      for split, (prefix, num_examples) in _SPLITS.items()
    }

  def _download(self, dl_manager, names):
    config = self.builder_config
    logging.info("Downloading %s", config.url)
    try:
      return dl_manager.download({n: f"{config.url}{n}.gz" for n in names})
    except Exception as error:  # Of requests, urllib3 or TFDS.
      raise app.UsageError(
        f"{config.url}: cannot be downloaded ({' '.join(str(error).split())});"
        f" put its four files into {self._manual_dir / config.name}"
      ) from error

  def _generate_examples(self, images, labels):
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
      yield index, {"image": image, "label": int(label)}


def _file_names(prefix: str) -> tuple[str, str]:
  return f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"


def _find(
  manual_dir: pathlib.Path, dataset: str, names: list[str]
) -> dict[str, pathlib.Path] | None:
  """The path of each file, gzipped or not; None if there is none at all."""
  for folder in (manual_dir / dataset, manual_dir):
    paths = {}
    for name in names:
      for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
          paths[name] = path
          break
    if paths:
      if missing := sorted(set(names) - set(paths)):
        raise app.UsageError(
          f"{folder} has IDX files but lacks {', '.join(missing)}"
        )
      logging.info("Reading the IDX files in %s", folder)
      return paths
  return None


def read_split(
  paths: dict[str, os.PathLike],
  prefix: str,
  num_examples: int,
  sha256: dict[str, str],
) -> tuple[np.ndarray, np.ndarray]:
  """Reads the images and labels of one split, and checks them.

  Args:
    paths: of the IDX files, gzipped or not, by their original names.
    prefix: "train" or "t10k".
    num_examples: how many examples there must be.
    sha256: of the decompressed files by name, where known.

  Returns:
    images, uint8 [num_examples, 28, 28, 1], and labels, uint8 [num_examples].

  Raises:
    app.UsageError: names the file that is damaged or another one than expected.
  """
  images_name, labels_name = _file_names(prefix)
  images = read_idx(
    paths[images_name], (num_examples, *_IMAGE_SHAPE), sha256.get(images_name)
  )
  labels = read_idx(
    paths[labels_name], (num_examples,), sha256.get(labels_name)
  )
  if labels.max() >= _NUM_CLASSES:
    raise app.UsageError(
      f"{paths[labels_name]}: label {labels.max()} at index"
      f" {labels.argmax()}; labels are 0 to {_NUM_CLASSES - 1}"
    )
  return images[..., np.newaxis], labels


def read_idx(
  path: os.PathLike, shape: tuple[int, ...], sha256: str | None = None
) -> np.ndarray:
  """Reads an IDX file of unsigned bytes, gzipped or not.

  Args:
    path: the file.
    shape: the only shape accepted. No more is ever read than it takes.
    sha256: the only hash of the decompressed file that is accepted, if known.

  Returns:
    uint8 array of that shape.

  Raises:
    app.UsageError: names the file and what is wrong with it.
  """
  header = b"\0\0\x08" + bytes([len(shape)])  # Unsigned bytes; dimensions.
  header += np.array(shape, ">u4").tobytes()
  size = len(header) + int(np.prod(shape))
  try:
    with open(path, "rb") as file:
      is_gzip = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if is_gzip else open(path, "rb") as file:
      content = file.read(size + 1)
  except (OSError, EOFError, zlib.error) as error:
    raise app.UsageError(f"{path}: cannot be read: {error}") from error
  if content[:4] != header[:4]:
    raise app.UsageError(
      f"{path}: starts with {content[:4].hex(' ') or 'nothing'}; an IDX file"
      f" of {len(shape)} dimensions starts with {header[:4].hex(' ')}"
    )
  if len(content) >= len(header) and content[4 : len(header)] != header[4:]:
    found = np.frombuffer(content[4 : len(header)], ">u4")
    raise app.UsageError(
      f"{path}: announces {'x'.join(map(str, found))} values; expected"
      f" {'x'.join(map(str, shape))}"
    )
  if len(content) != size:
    raise app.UsageError(
      f"{path}: has {'more' if len(content) > size else len(content)} bytes;"
      f" expected {size}"
    )
  found = hashlib.sha256(content).hexdigest()
  if sha256 and found != sha256:
    raise app.UsageError(
      f"{path}: is not the original file: its SHA-256 is {found}, not {sha256}"
    )
  if not sha256 and found in _MNIST_SHA256.values():
    raise app.UsageError(f"{path}: is a file of MNIST, not of this data set")
  return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)
