import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from machine import errors
from rundir import experiment


def test_a_run_is_named_after_its_overrides():
  def name(**overrides):
    return experiment.name("default", overrides)

  assert name() == "default"
  assert (
    name(dropout_rate=0.5, batch_size=256)
    == "default,batch_size=256,dropout_rate=0.5"
  )
  assert name(data_dir="/a", eval_every_steps=9, log_every_steps=9) == "default"
  first = name(train_split="train[5000:]" * 2, dataset="a/b")
  assert "/" not in first and "[" not in first
  assert name(train_split="train[:9]") != name(train_split="train[9:]")
  assert name(init_from="runs/first/") == "default,init_from=first"
  assert name(init_from="") == "default,init_from="


@pytest.mark.parametrize(
  "key, value",
  [
    ("dataset", ""),
    ("batch_size", 0),
    ("batch_size", -1),
    ("batch_size", True),
    ("eval_batch_size", 0),
    ("num_steps", 0),
    ("num_steps", 2**31),
    ("learning_rate", 0.0),
    ("learning_rate", -0.1),
    ("learning_rate", math.inf),
    ("learning_rate", math.nan),
    ("learning_rate", 1e-39),
    ("clip_norm", 1e39),
    ("dropout_rate", 1.0),
    ("dropout_rate", -0.1),
    ("dropout_rate", math.nan),
    ("dtype", "float16"),
    ("seed", -1),
    ("seed", 2**32),
    ("log_every_steps", 0),
    ("log_probabilities_every_steps", -1),
    ("eval_every_steps", 0),
    ("checkpoint_every_steps", 0),
  ],
)
def test_an_invalid_value_is_refused(key, value):
  config = default.get_config()
  config[key] = value
  with pytest.raises(errors.UserError) as error:
    experiment.check(config)
  assert str(error.value).startswith(f"config.{key}={value}: must be ")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"momentum": 0.9, "optimizer": "adamw"}, "momentum=0.9: must be 0"),
    ({"adam_b2": 0.99}, "adam_b2=0.99: must be 0.999"),
    ({"weight_decay": 0.1}, "weight_decay=0.1: must be 0"),
    ({"warmup_steps": 5}, "warmup_steps=5: must be 0"),
    (
      {"warmup_steps": 5, "schedule": "cosine", "num_steps": 9},
      "lower config.warmup_steps=5 to at most 4, half of config.num_steps",
    ),
    ({"clean_steps": 5}, "clean_steps=5: must be 0 unless"),
    (
      {"clean_steps": 5, "augment_shift": 2.0, "num_steps": 9},
      "lower config.clean_steps=5 to at most 4, half of config.num_steps",
    ),
  ],
)
def test_a_value_without_effect_is_refused(changes, message):
  config = default.get_config()
  config.update(changes)
  with pytest.raises(errors.UserError, match=message):
    experiment.check(config)


def test_the_default_config_is_valid():
  experiment.check(default.get_config())


@pytest.mark.parametrize(
  "key", sorted({*default.get_config()} - {*experiment.INCIDENTAL})
)
def test_every_key_of_the_experiment_is_in_its_name(key):
  value = default.get_config()[key]
  value = "other" if isinstance(value, str) else value + 1
  assert experiment.name("default", {key: value}) == f"default,{key}={value}"


@pytest.mark.parametrize(
  ("value", "kept"),
  [
    (np.float32(0.5), 0.5),
    (np.bool_(True), True),
    (jnp.float32(2), 2.0),
    ((1, np.int64(2)), [1, 2]),
    ({"a": (1,), "b": {"c": np.uint8(3)}}, {"a": [1], "b": {"c": 3}}),
    (None, None),
    (jnp.bfloat16, errors.UserError),
    (np.zeros(2), errors.UserError),
    ({"of": [{1, 2}]}, errors.UserError),
  ],
)
def test_custom_keys_hold_what_json_can_hold(value, kept):
  config = default.get_config()
  with config.unlocked():
    config.own = value
  if kept is errors.UserError:
    with pytest.raises(
      errors.UserError, match=r"config\.own=.* must be a value"
    ):
      experiment.check(config)
  else:
    experiment.check(config)
    own = experiment.to_json(config)["own"]
    assert own == kept and json.dumps(own)
