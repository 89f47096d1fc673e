"""Writes a prepared data set as TFDS's records, for other programs."""

import os
import pathlib
import re
import zlib

import ml_collections
import numpy as np
import tensorflow_datasets as tfds

from sources import arrays
from sources import builders


# mypy looks for `skip_registration` in `object`, as TFDS has no annotations.
class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
  """A TFDS builder that, unlike TFDS's own, does not need TensorFlow."""

  name = "own_images"
  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, *, source: arrays.Source, **kwargs):
    self._source = source
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    images, _ = next(iter(self._source.splits.values()))
    # A Tensor is written and read three times as fast as a PNG image.
    features = {
      "image": tfds.features.Tensor(
        shape=images.shape[1:],
        dtype=np.uint8,
        encoding=tfds.features.Encoding.BYTES,
      ),
      "label": tfds.features.ClassLabel(names=list(self._source.class_names)),
    }
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      supervised_keys=("image", "label"),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing is downloaded.
    return {
      split: self._generate_examples(*examples)
      for split, examples in self._source.splits.items()
    }

  def _generate_examples(self, images, labels):
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
      yield index, {"image": image, "label": int(label)}


def write(
  config: ml_collections.ConfigDict, data_dir: str | os.PathLike
) -> pathlib.Path:
  """Writes `config.dataset` as array_record, in the order of its examples.

  Returns:
    A folder in `data_dir` to open with `tfds.builder_from_directory`.
  """
  prepared = builders.prepared(config)
  splits = {split: prepared.read(split) for split in prepared.splits}
  # TFDS would take another data set in the same folder for this one.
  checksum = 0
  for images, _ in splits.values():
    checksum = zlib.crc32(images.data, checksum)
  name = re.sub(r"\W", "_", config.dataset) + f"-{checksum:08x}"
  builder = _Builder(
    source=arrays.Source(prepared.class_names, splits),
    data_dir=pathlib.Path(data_dir).expanduser() / name,
  )
  builder.download_and_prepare(file_format="array_record")
  return pathlib.Path(builder.data_dir)
