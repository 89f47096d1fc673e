from unittest import mock

from conftest import pixels
from conftest import read_events
from flax import linen as nn
import jax
from matplotlib import image
import numpy as np
import optax
import pytest

import input_pipeline
from machine import compiling
from model import CNN
from report import figures
from report import pictures
import steps


def create_state(**kwargs):
  return steps.create_train_state(
    jax.random.key(0), CNN(), optax.sgd(0.1), **kwargs
  )


def test_activations_lead_to_the_probabilities(mnist):
  """Those of the averaged parameters, if there are any."""
  state = create_state(ema_decay=0.9)
  params = jax.tree.map(lambda x: 2 * x, state.params)
  state = state.replace(ema_params=params)
  layers, probabilities = pictures.activations(
    state, input_pipeline.to_float(pixels(mnist.train)[0])
  )
  assert {name: x.shape for name, x in layers.items()} == {
    "conv1": (14, 14, 32),
    "conv2": (7, 7, 64),
    "dense": (1024,),
  }
  last = jax.device_get(params["logits"])
  logits = np.maximum(layers["dense"], 0) @ last["kernel"] + last["bias"]
  np.testing.assert_allclose(
    probabilities, jax.nn.softmax(logits), rtol=1e-4, atol=1e-7
  )


class Reversed(nn.Module):
  """A network whose layers are not in alphabetical order."""

  image_shape = (28, 28, 1)

  @nn.compact
  def __call__(self, images, train=False):
    x = images.reshape(len(images), -1)
    return nn.Dense(10, name="a")(nn.Dense(4, name="b")(x))


def test_activations_are_in_the_order_of_the_layers():
  state = steps.create_train_state(
    jax.random.key(0), Reversed(), optax.sgd(0.1)
  )
  layers, _ = pictures.activations(state, np.zeros((28, 28, 1), np.float32))
  assert [*layers] == ["b"]


@pytest.fixture
def drawn(tiny_config, mnist, tmp_path, monkeypatch):
  """Draws a run; returns what was drawn with which arguments, by function."""
  calls = {}
  for name in ("activations", "deformations", "filters", "mistakes"):
    function = mock.Mock(wraps=getattr(figures, name))
    monkeypatch.setattr(figures, name, function)
    calls[name] = function
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train_loss": 2.0}\n')
  tiny_config.update(augment_rotation=10.0)
  splits = {
    "train": jax.tree.map(lambda x: x[:30], mnist.train),
    "test": jax.tree.map(lambda x: x[:8], mnist.test),
  }
  data = input_pipeline.Data(mnist.class_names, {}, splits)
  state = create_state().replace(step=20)
  probabilities = np.eye(10, dtype=np.float32)[np.zeros(8, int)]
  pictures.draw(tmp_path, tiny_config, data, state, probabilities)
  return {name: call.call_args.args for name, call in calls.items()}


def test_a_run_is_drawn_in_its_directory_and_in_tensorboard(
  drawn, mnist, tmp_path
):
  names = {
    "activations",
    "augmentation",
    "calibration",
    "confusion_matrix",
    "filters",
    "learning_curve",
    "mistakes",
  }
  assert {path.stem for path in tmp_path.glob("*.png")} == names
  for name in names:
    assert image.imread(tmp_path / f"{name}.png").std() > 0.02
  # Its event file does not replace that of a log in the same second.
  assert [*tmp_path.glob("events.out.tfevents.*.pictures")]
  shown = {
    (value.tag, event.step)
    for event in read_events(tmp_path)
    for value in event.summary.value
  }
  assert shown == {(name, 20) for name in names}
  images, labels, probabilities, class_names = drawn["mistakes"]
  np.testing.assert_array_equal(images, pixels(mnist.test)[:8])
  np.testing.assert_array_equal(labels, mnist.test.labels[:8])
  assert class_names == mnist.class_names
  kernel, name = drawn["filters"]
  assert name == "conv1/kernel"
  np.testing.assert_array_equal(
    kernel, create_state().params["conv1"]["kernel"]
  )
  shown_image, label, *_ = drawn["activations"]
  np.testing.assert_array_equal(shown_image, pixels(mnist.test)[0])
  assert label == mnist.test.labels[0]
  originals, deformed = drawn["deformations"]
  np.testing.assert_allclose(
    originals, pixels(mnist.train)[:20] / np.float32(255), atol=1e-6
  )
  assert deformed.shape == originals.shape
  assert (np.asarray(deformed) != originals).any()


def test_a_picture_that_fails_does_not_stop_the_others(
  tiny_config, mnist, tmp_path, monkeypatch, caplog
):
  monkeypatch.setattr(
    compiling, "compiler_options", lambda: {"xla_unknown": True}
  )
  test = jax.tree.map(lambda x: x[:8], mnist.test)
  data = input_pipeline.Data(
    mnist.class_names, {}, {"train": test, "test": test}
  )
  pictures.draw(
    tmp_path, tiny_config, data, create_state(), np.full((8, 10), 0.1)
  )
  (warning,) = (text for text in caplog.messages if "xla_unknown" in text)
  assert warning.startswith("The picture activations cannot be drawn: ")
  assert (tmp_path / "filters.png").exists()
  assert not (tmp_path / "activations.png").exists()
