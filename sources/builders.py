"""Finds or prepares a data set, and parses its splits."""

from collections.abc import Mapping
import difflib
import hashlib
import os
import pathlib
import re
import textwrap
from typing import Any

from absl import logging
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


def prepared(config: ml_collections.ConfigDict) -> arrays.Prepared:
  """Opens `config.dataset`, preparing it if needed.

  Args:
    config: its `dataset`, `data_dir`, `manual_dir` and `image_size` are read.

  Raises:
    errors.UserError: if a key or a file is wrong; the message names it.
  """
  kind, _, name = config.dataset.partition("/")
  if kind not in _MODULES or name and kind not in ("idx", "arrays"):
    return arrays.open_records(_tfds_builder(config))
  found = _find(config)
  path = _path(config, found)
  if not path.exists():
    logging.info("Preparing %s in %s", config.dataset, path)
    arrays.write(path, _read(config, found))
  try:
    return arrays.open_file(path)
  except arrays.DamagedError as error:
    if config.manual_dir and not found:
      raise
    logging.warning("%s: this is done now", error)
    arrays.write(path, _read(config, found))
  return arrays.open_file(path)


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


def _path(
  config: ml_collections.ConfigDict, found: dict[str, pathlib.Path]
) -> pathlib.Path:
  """Returns the file in which the data set is, or will be, prepared.

  The name of one made from `config.manual_dir` depends on that path and on the
  names, sizes and times of the files there, so changed files make a new data
  set. If the files are gone, it is the newest data set made from that path.
  """
  folder = _root(config) / "own_images"
  if not config.manual_dir:
    return folder / f"{config.dataset}.npz"
  manual_dir = _manual_dir(config)
  what = [config.dataset, str(manual_dir)]
  if config.dataset == "image_folder":
    what.append(config.image_size)
  name = re.sub(r"\W", "_", manual_dir.name)[:50] + f"-{_digest(what)}"
  if found:
    stats = [(file, path.stat()) for file, path in found.items()]
    files = [(file, s.st_size, s.st_mtime_ns) for file, s in stats]
    return folder / f"{name}-{_digest(files)}.npz"
  made = [*folder.glob(f"{name}-*.npz")]
  if not made:
    problem = "is not a directory"
    if manual_dir.is_dir():
      problem = f"has no files for {config.dataset}"
    raise errors.UserError(
      f"config.manual_dir={config.manual_dir}: {problem}, and nothing was"
      f" prepared from it; must be a folder with {_module(config).FILES}"
    )
  path = max(made, key=os.path.getmtime)
  logging.warning(
    "The files in config.manual_dir=%s are gone; reading what was prepared from"
    " them: %s",
    config.manual_dir,
    path,
  )
  return path


def _module(config: ml_collections.ConfigDict):
  """Returns the module that reads a data set's files."""
  return _MODULES[config.dataset.partition("/")[0]]


def _find(config: ml_collections.ConfigDict) -> dict[str, pathlib.Path]:
  """Returns the files in `config.manual_dir` that the data set is made from."""
  if not config.manual_dir and config.dataset not in idx_dataset.CONFIGS:
    raise errors.UserError(
      f"config.dataset={config.dataset}: needs config.manual_dir, a folder with"
      f" {_module(config).FILES}"
    )
  if config.dataset == "image_folder":
    return image_folder.find(_manual_dir(config))
  return _module(config).find(_manual_dir(config), config.dataset)


def _read(
  config: ml_collections.ConfigDict, found: dict[str, pathlib.Path]
) -> arrays.Source:
  """Reads the files of a data set, or downloads them if there are none."""
  if config.dataset == "image_folder":
    source = image_folder.read(found, config.image_size)
  else:
    found = found or idx_dataset.download(config.dataset, _root(config))
    source = _module(config).read(found, config.dataset)
  if len(source.class_names) < 2:
    raise errors.UserError(
      f"config.manual_dir={config.manual_dir}: all images are of one class,"
      f" {source.class_names[0]}; there must be at least two classes"
    )
  return source


def _digest(value) -> str:
  return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


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
  try:
    return pathlib.Path(data_dir).expanduser()
  except RuntimeError as error:
    raise errors.UserError(
      f"config.data_dir={config.data_dir}: must be a full path, because"
      f" {data_dir} needs HOME, which is not set"
    ) from error


def _manual_dir(config: ml_collections.ConfigDict) -> pathlib.Path:
  folder = config.manual_dir or _PROJECT_DATA
  return pathlib.Path(os.path.abspath(os.path.expanduser(folder)))
