import json
import re
import runpy

from conftest import PROJECT
import pytest

from configs import default
from configs import kmnist
import train

CONFIGS = sorted((PROJECT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_loads_locked_with_the_default_keys(path):
  config = runpy.run_path(str(path))["get_config"]()
  assert list(config) == list(default.get_config())
  assert config.is_locked
  with pytest.raises(AttributeError):
    config.no_such_key = 1
  config.batch_size = 7
  assert config.batch_size == 7
  with pytest.raises(TypeError):
    config.batch_size = "many"


def test_every_key_is_read():
  code = "".join(path.read_text() for path in PROJECT.glob("*.py"))
  read = set(re.findall(r"config\.(\w+)", code))
  # The splits are read in a loop over their names.
  read |= {"train_split", "validation_split", "test_split"}
  assert set(default.get_config()) <= read


def test_kmnist_trains_on_files_of_the_users(family, tmp_path):
  folder, images, _ = family
  config = kmnist.get_config()
  config.update(
    data_dir=str(tmp_path / "data"),
    manual_dir=str(folder),
    train_split="train[100:]",
    validation_split="train[:100]",
    num_steps=3,
    warmup_steps=1,
    clean_steps=1,
    batch_size=16,
  )
  result = train.train_and_evaluate(config, tmp_path / "run")
  assert result["global_step"] == 3
  assert result["accuracy"] * len(images) == pytest.approx(
    round(result["accuracy"] * len(images))
  )
  dataset = json.loads((tmp_path / "run/dataset.json").read_text())
  assert dataset["class_names"][:3] == ["o", "ki", "su"]
