"""Walks through folders."""

from collections.abc import Iterator
import os
import pathlib

from absl import logging


def walk(
  folder: pathlib.Path,
) -> Iterator[tuple[pathlib.Path, list[str], list[str]]]:
  """Does what os.walk does, through links too, but yields no folder twice.

  Warns of folders that cannot be read.
  """

  def warn(error):
    if isinstance(error, PermissionError):  # Other errors mean that it is none.
      logging.warning("Skipped %s: %s", error.filename, error.strerror)

  seen = set()
  for path, folders, names in os.walk(folder, onerror=warn, followlinks=True):
    real = os.path.realpath(path)
    if real in seen:
      folders.clear()  # It may be a link to a folder above.
      continue
    seen.add(real)
    # Visit a folder by its own name if it is beside a link to it.
    folders.sort(key=lambda name: (os.path.islink(f"{path}/{name}"), name))
    yield pathlib.Path(path), folders, names
