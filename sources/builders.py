"""The TFDS builder of a data set, prepared in a random access format."""

import contextlib
import os
import pathlib
import sys

from absl import app
from absl import logging
import ml_collections
import numpy as np
import tensorflow_datasets as tfds

from sources import idx_dataset

_PROJECT_DATA = pathlib.Path(__file__).resolve().parent.parent / "data"


def prepared(config: ml_collections.ConfigDict) -> tfds.core.DatasetBuilder:
  """Returns the builder of `config.dataset`, whose records can be read.

  Args:
    config: its `dataset`, `data_dir` and `manual_dir` are read.

  Raises:
    app.UsageError: names the key or the file that is wrong.
  """
  folder = config.data_dir or tfds.core.constants.DATA_DIR
  if os.path.expanduser(folder).startswith("~/"):
    raise app.UsageError(
      f"config.data_dir={config.data_dir}: must name a directory in full, as"
      f" HOME is not set for {folder}"
    )
  if config.dataset in idx_dataset.NAMES:
    return _prepared_idx_builder(config)
  return _tfds_builder(config)


def _prepared_idx_builder(
  config: ml_collections.ConfigDict,
) -> tfds.core.DatasetBuilder:
  """Prepares one of the data sets that we have a builder for, if need be."""
  builder = _idx_builder(config)
  if builder.info.splits:
    if config.manual_dir:
      logging.info(
        "%s is prepared in %s: config.manual_dir is not read",
        config.dataset,
        builder.data_dir,
      )
    return builder
  _prepare(builder)
  builder = _idx_builder(config)  # Another process may have been faster.
  if not builder.info.splits:
    raise app.UsageError(
      f"{builder.data_dir}: holds no data set, though it has its name; remove"
      " it and run again"
    )
  return builder


def _idx_builder(
  config: ml_collections.ConfigDict,
) -> idx_dataset.IdxDataset:
  """Constructs the builder, which has no splits until it is prepared."""
  manual_dir = pathlib.Path(
    os.path.expanduser(config.manual_dir or _PROJECT_DATA)
  )
  if config.manual_dir and not manual_dir.is_dir():
    raise app.UsageError(
      f"config.manual_dir={config.manual_dir}: not a directory; must be one"
      ' with the IDX files, or "" for the project\'s data/'
    )
  try:
    return idx_dataset.IdxDataset(
      config=config.dataset, data_dir=_data_dir(config), manual_dir=manual_dir
    )
  except Exception as error:  # TFDS raises anything.
    raise app.UsageError(
      f"config.data_dir={config.data_dir}: the prepared {config.dataset} in"
      f" it is damaged: {error}; remove that and run again"
    ) from error


def _prepare(builder: idx_dataset.IdxDataset) -> None:
  logging.info(
    "Preparing %s in %s", builder.builder_config.name, builder.data_dir
  )
  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  # Another process that prepares the same may come first.
  with contextlib.suppress(FileExistsError):
    with contextlib.redirect_stdout(None):  # It says more than we did.
      builder.download_and_prepare(file_format="array_record")


def _tfds_builder(
  config: ml_collections.ConfigDict,
) -> tfds.core.DatasetBuilder:
  """Returns a builder of TFDS's, if it has prepared images and labels."""
  try:
    builder = tfds.builder(config.dataset, data_dir=_data_dir(config))
  except Exception as error:  # TFDS raises anything.
    raise app.UsageError(
      f"config.dataset={config.dataset}: neither one of"
      f" {', '.join(idx_dataset.NAMES)} nor a data set that TFDS can build:"
      f" {error}"
    ) from error
  formats = builder.info.available_file_formats()
  if not formats & tfds.core.FileFormat.with_random_access():
    raise app.UsageError(
      f"config.dataset={config.dataset}: not prepared as array_record in"
      f" {builder.data_dir_root}; where TensorFlow is installed, `tfds build"
      f" {config.dataset} --file_format=array_record --data_dir=DIR` prepares"
      " it, and --config.data_dir=DIR then reads it"
    )
  features = builder.info.features
  if not (
    {"image", "label"} <= set(features)
    and isinstance(features["label"], tfds.features.ClassLabel)
    and len(features["image"].shape) == 3
    and None not in features["image"].shape
    and features["image"].np_dtype == np.uint8
  ):
    raise app.UsageError(
      f"config.dataset={config.dataset}: has the features"
      f" {' '.join(str(features).split())}; must have a class `label` and a"
      " uint8 `image` of fixed [height, width, channels]"
    )
  return builder


def _data_dir(config: ml_collections.ConfigDict) -> str | None:
  return os.path.expanduser(config.data_dir) or None
