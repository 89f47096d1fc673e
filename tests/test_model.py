"""The network against values that TensorFlow 2.15 computed."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import input_pipeline
from model import CNN
import steps

# The tutorial's network, from tf.compat.v1.layers in float32 on a CPU, on the
# first 16 test images, without dropout. Made once; never from this code.
GOLDEN = np.load(pathlib.Path(__file__).parent / "tf_layers.npz")
LAYERS = {
  "conv1": (5, 5, 1, 32),
  "conv2": (5, 5, 32, 64),
  "dense": (3136, 1024),
  "logits": (1024, 10),
}


def golden_params():
  """The weights behind the golden values, made by the recipe they came with."""
  rng = np.random.RandomState(0)
  params = {}
  for name, shape in LAYERS.items():
    receptive_field = np.prod(shape[:-2])
    limit = np.sqrt(6 / (receptive_field * (shape[-2] + shape[-1])))
    params[name] = {
      "kernel": rng.uniform(-limit, limit, shape).astype(np.float32),
      "bias": rng.uniform(-0.1, 0.1, shape[-1]).astype(np.float32),
    }
  return params


def golden_state(learning_rate):
  return steps.TrainState.create(
    apply_fn=CNN(dropout_rate=0.0).apply,
    params=jax.tree.map(jnp.asarray, golden_params()),
    tx=optax.sgd(learning_rate),
  )


def golden_batch():
  images = input_pipeline.to_float(jnp.asarray(GOLDEN["image"]))
  return images, jnp.asarray(GOLDEN["label"])


def assert_golden(actual, key):
  np.testing.assert_allclose(actual, GOLDEN[key], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def grads():
  """The gradients of the mean loss, recovered from one step of SGD at 1."""
  state = golden_state(learning_rate=1.0)

  def loss(params):
    logits = state.apply_fn({"params": params}, golden_batch()[0])
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, golden_batch()[1]
    ).mean()

  return jax.jit(jax.grad(loss))(state.params)


def test_forward_pass_is_tensorflows():
  images, labels = golden_batch()
  logits = CNN().apply({"params": golden_params()}, images)
  assert_golden(logits, "logits")
  assert_golden(jax.nn.softmax(logits), "probabilities")
  np.testing.assert_array_equal(logits.argmax(axis=-1), GOLDEN["classes"])
  metrics = steps.Metrics.of(logits, labels)
  assert_golden(metrics.means()["loss"], "loss")


@pytest.mark.parametrize("layer", LAYERS)
def test_gradient_norms_are_tensorflows(grads, layer):
  for kind in ("kernel", "bias"):
    norm = np.linalg.norm(np.asarray(grads[layer][kind], np.float64))
    assert_golden(norm, f"grad_norm_{layer}_{kind}")


@pytest.mark.parametrize(
  "key, part",
  [
    ("grad_conv1_kernel", lambda grads: grads["conv1"]["kernel"]),
    ("grad_conv1_bias", lambda grads: grads["conv1"]["bias"]),
    ("grad_conv2_kernel_tap00", lambda grads: grads["conv2"]["kernel"][0, 0]),
    ("grad_conv2_bias", lambda grads: grads["conv2"]["bias"]),
    ("grad_dense_kernel_rows", lambda grads: grads["dense"]["kernel"][::196]),
    ("grad_dense_bias", lambda grads: grads["dense"]["bias"]),
    ("grad_logits_kernel_rows", lambda grads: grads["logits"]["kernel"][::64]),
    ("grad_logits_bias", lambda grads: grads["logits"]["bias"]),
  ],
)
def test_gradients_are_tensorflows(grads, key, part):
  assert_golden(part(grads), key)


@pytest.mark.parametrize("learning_rate", [0.001, 0.1])
def test_five_training_steps_are_tensorflows(learning_rate):
  state = golden_state(learning_rate)
  train_step = jax.jit(steps.train_step)
  for _ in range(5):
    state, _, _ = train_step(state, *golden_batch(), jax.random.key(0))
  assert state.step == 5
  images, labels = golden_batch()
  logits = state.apply_fn({"params": state.params}, images)
  assert_golden(logits, f"logits_after_5_steps_lr_{learning_rate}")
  loss = steps.Metrics.of(logits, labels).means()["loss"]
  assert_golden(loss, f"loss_after_5_steps_lr_{learning_rate}")


def test_every_golden_value_is_compared():
  compared = {"image", "label", "logits", "probabilities", "classes", "loss"}
  compared |= {f"grad_norm_{x}_{y}" for x in LAYERS for y in ("kernel", "bias")}
  compared |= {
    "grad_conv1_kernel",
    "grad_conv1_bias",
    "grad_conv2_kernel_tap00",
    "grad_conv2_bias",
    "grad_dense_kernel_rows",
    "grad_dense_bias",
    "grad_logits_kernel_rows",
    "grad_logits_bias",
  }
  for rate in ("0.001", "0.1"):
    compared |= {f"{x}_after_5_steps_lr_{rate}" for x in ("logits", "loss")}
  assert set(GOLDEN.files) == compared
