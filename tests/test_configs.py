import re
import runpy

from conftest import PROJECT
import pytest

from configs import default

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
  read = set(re.findall(r"config\.([a-z_]+)", code))
  # The splits are read in a loop over their names.
  read |= {"train_split", "validation_split", "test_split"}
  assert set(default.get_config()) <= read
