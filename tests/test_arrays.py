import os
import pathlib

from conftest import pixels
import numpy as np
import pytest

import input_pipeline
from machine import errors
from sources import arrays


class Trap:
  def __reduce__(self):
    return pytest.fail, ("it was unpickled",)


def arrays_file(config):
  (path,) = pathlib.Path(config.data_dir).rglob("test.npz")
  return path


@pytest.fixture
def prepared_set(tiny_builder, tiny_set_config, monkeypatch):
  """The tiny set's builder, its config, and the splits read from records."""
  input_pipeline.load(tiny_set_config)
  reads = []
  read_records = arrays.read_records

  def counted(builder, split):
    reads.append(split)
    return read_records(builder, split)

  monkeypatch.setattr(arrays, "read_records", counted)
  return tiny_builder, tiny_set_config, reads


def test_the_arrays_are_cached(prepared_set):
  _, config, reads = prepared_set
  input_pipeline.load(config)
  assert not reads


@pytest.mark.parametrize(
  "damage",
  [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:-100]),
    lambda path: path.write_bytes(path.read_bytes()[:100]),
    lambda path: path.write_bytes(
      path.read_bytes().replace(bytes([7] * 144), bytes([8] * 144))
    ),
    lambda path: np.savez(path, images=np.zeros(3)),
    lambda path: np.savez(path, test_images=np.array([Trap()])),
    lambda path: path.write_bytes(b"not a zip file"),
  ],
)
def test_damaged_arrays_are_rebuilt(prepared_set, damage):
  _, config, reads = prepared_set
  damage(arrays_file(config))
  expected = np.repeat(np.arange(12), 144).reshape(12, 8, 6, 3)
  data = input_pipeline.load(config)
  np.testing.assert_array_equal(pixels(data.test), expected)
  assert reads == ["test"]
  input_pipeline.load(config)
  assert reads == ["test"]


def remove(path):
  path.unlink()


def truncate(path):
  os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [remove, truncate])
def test_the_error_for_damaged_records_names_them(
  tiny_builder, tiny_set_config, damage
):
  (records,) = tiny_builder.info.splits["test"].filepaths
  damage(pathlib.Path(records))
  with pytest.raises(errors.UserError, match="tiny_set/2.0.0") as error:
    input_pipeline.load(tiny_set_config)
  assert not list(pathlib.Path(tiny_set_config.data_dir).rglob("test*.npz"))
  assert "test" in str(error.value)


def test_loading_works_even_if_the_arrays_cannot_be_written(
  tiny_builder, tiny_set_config, monkeypatch
):
  del tiny_builder

  def no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np, "savez", no_space)
  data = input_pipeline.load(tiny_set_config)
  assert data.test.labels.shape == (12,)


def test_an_interruption_leaves_no_partial_file(tmp_path, monkeypatch):
  def interrupted(file, **kwargs):
    raise KeyboardInterrupt

  monkeypatch.setattr(np, "savez", interrupted)
  images = np.zeros((1, 28, 28, 1), np.uint8)
  examples = arrays.Examples(images, np.zeros(1, np.int32))
  with pytest.raises(KeyboardInterrupt):
    arrays.cached(
      tmp_path / "test.npz",
      lambda: arrays.in_memory(("0",), {"test": examples}),
    )
  assert not [*tmp_path.iterdir()]
