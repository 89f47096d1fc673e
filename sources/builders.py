"""Finds or prepares a data set, and parses its splits."""

from collections.abc import Mapping
import difflib
import hashlib
import os
import pathlib
import re
import textwrap
from typing import Any

import ml_collections
import numpy as np
import tensorflow_datasets as tfds

from machine import errors
from sources import array_files
from sources import arrays
from sources import idx_dataset
from sources import image_folder

_PROJECT_DATA = pathlib.Path(__file__).resolve().parent.parent / "data"
_MODULES = {
  **dict.fromkeys((*idx_dataset.CONFIGS, "idx"), idx_dataset),
  "image_folder": image_folder,
  "arrays": array_files,
}


def prepared(config: ml_collections.ConfigDict) -> arrays.Source:
  """Opens `config.dataset`, preparing it if needed.

  Args:
    config: its `dataset`, `data_dir`, `manual_dir` and `image_size` are read.

  Raises:
    errors.UserError: if a key or a file is wrong; the message names it.
  """
  kind, _, name = config.dataset.partition("/")
  if kind not in _MODULES or name and kind not in ("idx", "arrays"):
    return arrays.open_records(_tfds_builder(config))
  module = _MODULES[kind]
  manual_dir = config.manual_dir or _PROJECT_DATA
  manual_dir = pathlib.Path(os.path.abspath(os.path.expanduser(manual_dir)))
  found = module.find(manual_dir, config.dataset)
  if not found and _is_own(config):
    raise errors.UserError(
      f"config.manual_dir={config.manual_dir}: must be a folder with"
      f" {module.FILES} for config.dataset={config.dataset}"
    )

  def make():
    files = found or idx_dataset.download(config.dataset, _root(config))
    source = module.read(files, config)
    if len(source.class_names) < 2:
      raise errors.UserError(
        f"config.manual_dir={config.manual_dir}: all images are of one class,"
        f" {source.class_names[0]}; there must be at least two classes"
      )
    return source

  return arrays.cached(_path(config, manual_dir, found), make)


def _is_own(config: ml_collections.ConfigDict) -> bool:
  """Returns whether the files are the user's, rather than this project's."""
  return bool(config.manual_dir) or config.dataset not in idx_dataset.CONFIGS


def _path(
  config: ml_collections.ConfigDict,
  manual_dir: pathlib.Path,
  found: dict[str, pathlib.Path],
) -> pathlib.Path:
  """Returns the file in which the data set is, or will be, prepared.

  The name of one made from your own files depends on their names, sizes and
  times, so changed files make a new data set.
  """
  name = config.dataset
  if _is_own(config):
    stats = [(file, path.stat()) for file, path in found.items()]
    made_from = (
      config.dataset,
      config.image_size,
      str(manual_dir),
      [(file, s.st_size, s.st_mtime_ns) for file, s in stats],
    )
    digest = hashlib.sha256(repr(made_from).encode()).hexdigest()[:12]
    name = re.sub(r"\W", "_", manual_dir.name)[:50] + f"-{digest}"
  return _root(config) / "own_images" / f"{name}.npz"


def parse_split(
  config: ml_collections.ConfigDict, key: str, known: Mapping[str, Any]
) -> list[tuple[str, range]]:
  """Parses the split in a config key, such as "train[:90%]".

  Returns:
    The names of existing splits, each with the examples to take from it.
  """
  spec = config[key]
  try:
    parts = tfds.core.ReadInstruction.from_spec(spec).to_absolute(known)
  except (ValueError, KeyError, NotImplementedError, AssertionError) as error:
    reason = " ".join(str(error).strip("'\".").split())
    sizes = (
      f"{split.num_examples} examples in {name}"
      for name, split in known.items()
    )
    raise errors.UserError(
      f"config.{key}={spec}: not a split of {config.dataset}, which has"
      f" {' and '.join(sizes)}: {reason}; percentages fit any size:"
      f" --config.train_split='train[{10 if 'test' in known else 20}%:]'"
      " --config.validation_split='train[:10%]'"
      + " --config.test_split='train[10%:20%]'"
      * ("test" not in known)
    ) from error
  return [
    (
      part.splitname,
      range(known[part.splitname].num_examples)[part.from_ : part.to],
    )
    for part in parts
  ]


def _tfds_builder(
  config: ml_collections.ConfigDict,
) -> tfds.core.DatasetBuilder:
  """Returns TFDS's builder of a prepared data set of images and labels."""
  if config.manual_dir:
    raise errors.UserError(
      f'config.manual_dir={config.manual_dir}: must be "" with config.dataset='
      f"{config.dataset}, which is read from config.data_dir"
    )
  root = _root(config)
  reason = (
    "with TensorFlow installed, TFDS prepares its data sets by `tfds build"
    f" {config.dataset} --file_format=array_record --data_dir={root}`"
  )
  formats = set()
  try:
    builder = tfds.builder(config.dataset, data_dir=root)
    formats = builder.info.available_file_formats()
  except Exception as error:  # TFDS may raise anything, with a long message.
    reason = f"TFDS cannot build it: {textwrap.shorten(str(error), 200)}"
  if not formats & tfds.core.FileFormat.with_random_access():
    plain = config.dataset.lower().replace("-", "_")
    if near := difflib.get_close_matches(plain, _MODULES, n=1):
      reason = f"did you mean {near[0]}?"
    raise errors.UserError(
      f"config.dataset={config.dataset}: must be one of {', '.join(_MODULES)},"
      f" or prepared as array_record in {root}; {reason}"
    )
  features = builder.info.features
  if not (
    {"image", "label"} <= set(features)
    and isinstance(features["label"], tfds.features.ClassLabel)
    and len(features["image"].shape) == 3
    and None not in features["image"].shape
    and features["image"].np_dtype == np.uint8
  ):
    raise errors.UserError(
      f"config.dataset={config.dataset}: has the features"
      f" {' '.join(str(features).split())}; must have a ClassLabel `label` and"
      " a uint8 `image` of a fixed shape [height, width, channels]"
    )
  return builder


def _root(config: ml_collections.ConfigDict) -> pathlib.Path:
  """Returns the folder that holds all prepared data sets."""
  data_dir = config.data_dir or tfds.core.constants.DATA_DIR
  return pathlib.Path(data_dir).expanduser()
