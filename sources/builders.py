"""Finds or prepares a data set, and reads its splits."""

import contextlib
import difflib
import hashlib
import os
import pathlib
import re
import shutil
import sys
import textwrap
from typing import Any

from absl import logging
import ml_collections
import numpy as np
import tensorflow_datasets as tfds

from machine import errors
from sources import arrays
from sources import idx_dataset
from sources import image_folder
from sources import own_images

_PROJECT_DATA = pathlib.Path(__file__).resolve().parent.parent / "data"
_NAMES = (*idx_dataset.NAMES, "idx", "image_folder")


def prepared(config: ml_collections.ConfigDict) -> tfds.core.DatasetBuilder:
  """Returns the builder of `config.dataset`, preparing the data if needed.

  Args:
    config: its `dataset`, `data_dir` and `manual_dir` are read.

  Raises:
    errors.UserError: if a key or a file is wrong; the message names it.
  """
  if not _is_ours(config.dataset):
    return _tfds_builder(config)
  folder = _folder(config)
  if not (folder / "dataset_info.json").exists():
    _prepare(config, folder)
  try:
    return tfds.builder_from_directory(folder)
  except Exception as error:  # TFDS may raise anything.
    raise errors.UserError(
      f"config.data_dir={config.data_dir}: the prepared {config.dataset} in"
      f" it is damaged: {error}; remove {folder} and run again"
    ) from error


def _is_ours(dataset: str) -> bool:
  """Returns whether this project prepares the data set, rather than TFDS."""
  return dataset in _NAMES or dataset.startswith("idx/")


def parse_split(
  config: ml_collections.ConfigDict, key: str, known: tfds.core.SplitDict
) -> list[Any]:
  """Parses the split in a config key, such as "train[:90%]".

  Returns:
    Parts of existing splits, each with its `splitname` and the range from
    `from_` to `to`.
  """
  spec = config[key]
  try:
    return tfds.core.ReadInstruction.from_spec(spec).to_absolute(known)
  except (ValueError, KeyError, NotImplementedError, AssertionError) as error:
    reason = " ".join(str(error).strip("'\".").split())
    sizes = (
      f"{split.num_examples} examples in {name}"
      for name, split in known.items()
    )
    raise errors.UserError(
      f"config.{key}={spec}: not a split of {config.dataset}, which has"
      f" {' and '.join(sizes)}: {reason}; percentages, such as train[10%:]"
      " and train[:10%], fit any size"
    ) from error


def read_split(
  config: ml_collections.ConfigDict,
  builder: tfds.core.DatasetBuilder,
  split: str,
) -> tuple[np.ndarray, np.ndarray]:
  """Reads the images and labels of a split of `prepared(config)`.

  If the files of a data set that this project prepared are damaged, it is
  prepared again.
  """
  try:
    return arrays.read_split(builder, split)
  except arrays.DamagedError as error:
    if not _is_ours(config.dataset):
      raise errors.UserError(f"{error}, and the records are gone") from error
    if config.manual_dir and not _find(config):
      raise errors.UserError(
        f"{error}, and config.manual_dir={config.manual_dir} no longer has the"
        " files that it was made from"
      ) from error
    logging.warning("%s; preparing %s again", error, config.dataset)
  folder = pathlib.Path(builder.data_dir)
  damaged = folder.with_name(f"{folder.name}.damaged")
  shutil.rmtree(damaged, ignore_errors=True)
  folder.rename(damaged)  # Otherwise TFDS takes it for complete.
  try:
    _prepare(config, folder)
  except BaseException:
    damaged.rename(folder)  # Its other splits may be intact.
    raise
  shutil.rmtree(damaged)
  return arrays.read_split(builder, split)


def write_records(
  config: ml_collections.ConfigDict, data_dir: str | os.PathLike
) -> pathlib.Path:
  """Writes `config.dataset` as array_record, for other programs that use TFDS.

  Returns:
    A folder in `data_dir` to open with `tfds.builder_from_directory`.
  """
  builder = prepared(config)
  features = builder.info.features
  source = own_images.Source(
    features["image"].shape,
    tuple(features["label"].names),
    {
      split: read_split(config, builder, split) for split in builder.info.splits
    },
  )
  # TFDS would take another data set in the same folder for this one.
  name = re.sub(r"\W", "_", config.dataset)
  folder = pathlib.Path(os.path.expanduser(data_dir))
  records = own_images.OwnImages(
    source=source,
    records=True,
    data_dir=folder / f"{name}-{_digest(str(builder.data_dir))}",
  )
  records.download_and_prepare(file_format="array_record")
  return pathlib.Path(records.data_dir)


def _folder(config: ml_collections.ConfigDict) -> pathlib.Path:
  """Returns the folder in which the data set is, or will be, prepared."""
  is_idx = config.dataset in idx_dataset.NAMES
  builder = idx_dataset.IdxDataset if is_idx else own_images.OwnImages
  subfolders = [config.dataset] if is_idx else []
  inner = pathlib.Path(builder.name, *subfolders, str(builder.VERSION))
  if config.manual_dir:
    return _folder_of_manual_dir(config, inner)
  if not is_idx:
    raise errors.UserError(
      f"config.dataset={config.dataset}: needs config.manual_dir, a folder with"
      f" {_what(config.dataset)}"
    )
  return _root(config) / inner


def _folder_of_manual_dir(
  config: ml_collections.ConfigDict, inner: pathlib.Path
) -> pathlib.Path:
  """Returns the folder for the data set made from `config.manual_dir`.

  Its name depends on that path and on the names, sizes and times of the files
  there, so changed files make a new data set. If the files are gone, this is
  the folder of the newest data set made from that path.
  """
  manual_dir = _manual_dir(config)
  name = re.sub(r"\W", "_", manual_dir.name)[:50]
  name += f"-{_digest(config.dataset, str(manual_dir))}-"
  parent = _root(config) / "manual_dir"
  if found := _find(config):
    stats = [(file, path.stat()) for file, path in found.items()]
    name += _digest(*((file, s.st_size, s.st_mtime_ns) for file, s in stats))
    return parent / name / inner
  made = [*parent.glob(f"{name}*/{inner}/dataset_info.json")]
  if not made:
    problem = "is not a directory"
    if manual_dir.is_dir():
      problem = f"has no files for {config.dataset}"
    raise errors.UserError(
      f"config.manual_dir={config.manual_dir}: {problem}, and nothing was"
      f" prepared from it; must be a folder with {_what(config.dataset)}"
    )
  folder = max(made, key=os.path.getmtime).parent
  logging.warning(
    "The files in config.manual_dir=%s are gone; reading what was prepared from"
    " them: %s",
    config.manual_dir,
    folder,
  )
  return folder


def _find(config: ml_collections.ConfigDict) -> dict[str, pathlib.Path]:
  """Returns the files in `config.manual_dir` that the data set is made from."""
  if config.dataset == "image_folder":
    return image_folder.find(_manual_dir(config))
  return idx_dataset.find(_manual_dir(config), config.dataset)


def _what(dataset: str) -> str:
  """Describes the files that a data set is made from."""
  if dataset == "image_folder":
    return (
      "a subfolder of images for each class, such as train/cat and test/cat"
    )
  files = f"{', '.join(idx_dataset.FILE_NAMES)}, gzipped or not"
  return files if dataset.startswith("idx") else f'{files}, or ""'


def _digest(*values) -> str:
  return hashlib.sha256(repr(values).encode()).hexdigest()[:12]


def _prepare(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
  builder: own_images.OwnImages
  if config.dataset in idx_dataset.NAMES:
    builder = idx_dataset.IdxDataset(
      config=config.dataset,
      data_dir=folder.parents[2],
      manual_dir=_manual_dir(config),
    )
  else:
    module = image_folder if config.dataset == "image_folder" else idx_dataset
    source = module.read(_find(config))
    if len(source.class_names) < 2:
      raise errors.UserError(
        f"config.manual_dir={config.manual_dir}: all images are of one class,"
        f" {source.class_names[0]}; there must be at least two classes"
      )
    builder = own_images.OwnImages(source=source, data_dir=folder.parents[1])
  logging.info("Preparing %s in %s", config.dataset, folder)
  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  # Another process may prepare the same data set first.
  with contextlib.suppress(FileExistsError):
    with contextlib.redirect_stdout(None):  # TFDS prints too much.
      builder.download_and_prepare(file_format="array_record")


def _tfds_builder(
  config: ml_collections.ConfigDict,
) -> tfds.core.DatasetBuilder:
  """Returns TFDS's builder of a prepared data set of images and labels."""
  _check_name(config)
  if config.manual_dir:
    raise errors.UserError(
      f'config.manual_dir={config.manual_dir}: must be "" with config.dataset='
      f"{config.dataset}, which is read from config.data_dir"
    )
  try:
    builder = tfds.builder(config.dataset, data_dir=_root(config))
  except Exception as error:  # TFDS may raise anything, with a long message.
    raise errors.UserError(
      f"config.dataset={config.dataset}: TFDS cannot build it:"
      f" {textwrap.shorten(str(error), 300)}"
    ) from error
  formats = builder.info.available_file_formats()
  if not formats & tfds.core.FileFormat.with_random_access():
    raise errors.UserError(
      f"config.dataset={config.dataset}: not prepared as array_record in"
      f" {builder.data_dir_root}; with TensorFlow installed, run `tfds build"
      f" {config.dataset} --file_format=array_record --data_dir=DIR`, then use"
      " --config.data_dir=DIR"
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


def _check_name(config: ml_collections.ConfigDict) -> None:
  """Raises errors.UserError if neither this project nor TFDS knows the name."""
  root = _root(config)
  name = re.split(r"[^\w-]", config.dataset)[0]
  known = {*_NAMES, *tfds.list_builders(with_community_datasets=False)}
  with contextlib.suppress(OSError):
    known.update(os.listdir(root))
  if name in known:
    return
  plain = name.lower().replace("-", "_")
  near = [plain]
  if plain not in known:
    near = difflib.get_close_matches(plain, sorted(known))
  raise errors.UserError(
    f"config.dataset={config.dataset}: must be one of {', '.join(_NAMES)},"
    f" or a data set prepared in {root}"
    + (f"; did you mean {' or '.join(near)}?" if near else "")
  )


def _root(config: ml_collections.ConfigDict) -> pathlib.Path:
  """Returns the folder that holds all prepared data sets."""
  data_dir = config.data_dir or tfds.core.constants.DATA_DIR
  root = os.path.expanduser(data_dir)
  if root.startswith("~/"):
    raise errors.UserError(
      f"config.data_dir={config.data_dir}: must be a full path, because"
      f" {data_dir} needs HOME, which is not set"
    )
  return pathlib.Path(root)


def _manual_dir(config: ml_collections.ConfigDict) -> pathlib.Path:
  folder = config.manual_dir or _PROJECT_DATA
  return pathlib.Path(os.path.abspath(os.path.expanduser(folder)))
