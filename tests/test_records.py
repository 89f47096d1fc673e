from conftest import idx_bytes
import numpy as np
import tensorflow_datasets as tfds

from sources import records


def test_a_data_set_can_be_written_for_tfds(default_config, family, tmp_path):
  folder, images, labels = family
  config = default_config.copy_and_resolve_references()
  config.update(
    dataset="kmnist", manual_dir=str(folder), data_dir=str(tmp_path / "data")
  )
  written = records.write(config, tmp_path / "records")
  assert written.is_relative_to(tmp_path / "records")
  builder = tfds.builder_from_directory(written)
  assert builder.info.features["label"].names[9] == "wo"
  test = builder.as_data_source("test")
  assert len(test) == 100 and len(builder.as_data_source("train")) == 300
  for example, image, label in zip(test, images, labels, strict=True):
    np.testing.assert_array_equal(example["image"][..., 0], image)
    assert example["label"] == label
  # Another data set in the same folder does not replace it.
  (folder / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(images[::-1]))
  other = records.write(config, tmp_path / "records")
  test = tfds.builder_from_directory(other).as_data_source("test")
  np.testing.assert_array_equal(test[0]["image"][..., 0], images[-1])
