"""A TFDS builder for images and labels that does not need TensorFlow.

It keeps the order of the examples, and writes array_record under its own name,
so that it does not interfere with other data sets in the same `data_dir`.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds


class Source(NamedTuple):
  """The content of a data set.

  Attributes:
    image_shape: (height, width, channels) of every image.
    class_names: the names of labels 0, 1, ...
    splits: each split's uint8 images and labels, by the split's name.
  """

  image_shape: tuple[int, int, int]
  class_names: tuple[str, ...]
  splits: Mapping[str, Iterable[tuple[np.ndarray, int]]]


# mypy looks for `skip_registration` in `object`, as TFDS has no annotations.
class OwnImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
  """Builds a data set: `OwnImages(source=..., data_dir=...)`."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, *, source: Source, **kwargs):
    self._source = source
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      # A Tensor is prepared and read three times as fast as a PNG image.
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Tensor(
            shape=self._source.image_shape,
            dtype=np.uint8,
            encoding=tfds.features.Encoding.BYTES,
          ),
          "label": tfds.features.ClassLabel(
            names=list(self._source.class_names)
          ),
        }
      ),
      supervised_keys=("image", "label"),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing is downloaded.
    return {
      split: self._generate_examples(examples)
      for split, examples in self._source.splits.items()
    }

  def _generate_examples(self, examples):
    for index, (image, label) in enumerate(examples):
      yield index, {"image": image, "label": int(label)}
