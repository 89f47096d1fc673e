import json
import runpy

from conftest import PROJECT
from conftest import if_meant
import pytest

from configs import default
from rundir import command_line
from sources import builders
import train

CONFIGS = sorted((PROJECT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_locked_and_has_the_default_keys(path):
  config = runpy.run_path(str(path))["get_config"]()
  assert list(config) == list(default.get_config())
  assert config.is_locked
  with pytest.raises(AttributeError):
    config.no_such_key = 1
  config.batch_size = 7
  assert config.batch_size == 7
  with pytest.raises(TypeError):
    config.batch_size = "many"


def test_a_run_finds_everything_in_the_home_directory(
  family, tiny_config, tmp_path, monkeypatch
):
  _, images, _ = family
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "elsewhere").mkdir()
  monkeypatch.chdir(tmp_path / "elsewhere")
  monkeypatch.setattr(train, "_draw", lambda *args: None)
  tiny_config.update(
    dataset="kmnist",
    data_dir="~/data",
    manual_dir="~/family",
    train_split="train[100:200]",
    num_steps=3,
  )
  result = train.train_and_evaluate(tiny_config, "~/run")
  assert result["global_step"] == 3
  images = images[:70]
  assert result["accuracy"] * len(images) == pytest.approx(
    round(result["accuracy"] * len(images))
  )
  dataset = json.loads((tmp_path / "run/dataset.json").read_text())
  assert dataset["class_names"][:3] == ["o", "ki", "su"]
  assert list((tmp_path / "data").rglob("family-*.npz"))
  assert not [*(tmp_path / "elsewhere").iterdir()]


def test_the_default_values_are_those_of_the_tutorial():
  config = default.get_config()
  assert config.to_dict() == {
    "dataset": "mnist",
    "train_split": "train[5000:]",
    "validation_split": "train[:5000]",
    "test_split": "test",
    "data_dir": "",
    "manual_dir": "",
    "image_size": 0,
    "batch_size": 100,
    "num_steps": 20000,
    "learning_rate": 0.001,
    "schedule": "constant",
    "warmup_steps": 0,
    "optimizer": "sgd",
    "momentum": 0.0,
    "adam_b2": 0.999,
    "weight_decay": 0.0,
    "clip_norm": 0.0,
    "label_smoothing": 0.0,
    "ema_decay": 0.0,
    "dropout_rate": 0.4,
    "dtype": "float32",
    "seed": 0,
    "init_from": "",
    "augment_flip": False,
    "augment_rotation": 0.0,
    "augment_scale": 0.0,
    "augment_shear": 0.0,
    "augment_shift": 0.0,
    "augment_elastic": 0.0,
    "clean_steps": 0,
    "eval_batch_size": 1000,
    "log_every_steps": 100,
    "log_probabilities_every_steps": 0,
    "eval_every_steps": 1000,
    "checkpoint_every_steps": 1000,
  }, if_meant("update the defaults in this test")


PRESETS = {
  "default": {},
  "accurate": {
    "augment_elastic": 20.0,
    "augment_rotation": 12.0,
    "augment_scale": 0.12,
    "augment_shear": 0.12,
    "augment_shift": 2.0,
    "batch_size": 50,
    "clean_steps": 4400,
    "dropout_rate": 0.5,
    "ema_decay": 0.9995,
    "learning_rate": 0.0014,
    "num_steps": 44000,
    "optimizer": "adamw",
    "schedule": "cosine",
    "train_split": "train[1000:]",
    "validation_split": "train[:1000]",
    "warmup_steps": 2000,
    "weight_decay": 0.05,
  },
  "fashion_mnist": {
    "augment_scale": 0.1,
    "augment_shift": 2.0,
    "dataset": "fashion_mnist",
    "ema_decay": 0.999,
    "learning_rate": 0.05,
    "momentum": 0.9,
    "num_steps": 5500,
    "schedule": "cosine",
    "warmup_steps": 275,
  },
  "fast": {
    "adam_b2": 0.98,
    "batch_size": 50,
    "dropout_rate": 0.0,
    "eval_every_steps": 50,
    "label_smoothing": 0.2,
    "learning_rate": 0.006,
    "log_every_steps": 25,
    "num_steps": 400,
    "optimizer": "nadamw",
    "schedule": "one_cycle",
    "warmup_steps": 40,
  },
}
PRESETS["kmnist"] = PRESETS["accurate"] | {"dataset": "kmnist"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_preset_changes_these_values(path):
  config = runpy.run_path(str(path))["get_config"]().to_dict()
  defaults = default.get_config().to_dict()
  assert {
    key: value for key, value in config.items() if value != defaults[key]
  } == PRESETS[path.stem], if_meant("update the preset in this test")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_phases_of_a_preset_follow_its_number_of_steps(path):
  def parse(*overrides):
    flags = [f"--config.{override}" for override in overrides]
    return command_line.parse(["train.py", f"--config={path}", *flags], "")

  args, whole = parse("num_steps=100"), PRESETS[path.stem]
  assert args.workdir.name == f"{path.stem},num_steps=100"
  for key in ("warmup_steps", "clean_steps"):
    expected = whole.get(key, 0) * 100 // whole.get("num_steps", 20000)
    assert args.config[key] == expected
    if expected:
      assert parse("num_steps=100", f"{key}=3").config[key] == 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_image_is_in_two_splits(path, default_config, mnist):
  """All presets' data sets have as many images as MNIST, so MNIST is used."""
  del mnist
  splits = builders.prepared(default_config).splits
  config = runpy.run_path(str(path))["get_config"]()
  examples = {
    key: {
      (name, index)
      for name, part in builders.parse_split(config, key, splits)
      for index in part
    }
    for key in ("train_split", "validation_split", "test_split")
  }
  sizes = (55000, 5000, 10000)
  if path.stem in ("accurate", "kmnist"):
    sizes = (59000, 1000, 10000)
  assert tuple(map(len, examples.values())) == sizes, if_meant(
    "update the sizes in this test"
  )
  assert len(set.union(*examples.values())) == sum(sizes)
