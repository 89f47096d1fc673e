"""Compares the network with values that TensorFlow 2.15 computed."""

import collections
import functools
import pathlib

from conftest import if_meant
from conftest import jit
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import input_pipeline
from model import CNN
import steps

# Computed by the tutorial's network in tf.compat.v1.layers, in float32 on a
# CPU, from the first 16 test images, without dropout. Never compute them with
# this code.
GOLDEN = np.load(pathlib.Path(__file__).parent / "tf_layers.npz")
LAYERS = {
  "conv1": (5, 5, 1, 32),
  "conv2": (5, 5, 32, 64),
  "dense": (3136, 1024),
  "logits": (1024, 10),
}


def golden_params():
  """Returns the weights from which the golden values were computed."""
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
  np.testing.assert_allclose(
    actual,
    GOLDEN[key],
    rtol=0,
    atol=1e-5,
    err_msg=if_meant(
      f"use TensorFlow, never this code, to recompute {key} in"
      " tests/tf_layers.npz"
    ),
  )


@pytest.fixture(scope="module")
def grads():
  """The gradients of the mean loss."""
  state = golden_state(learning_rate=1.0)

  def loss(params):
    logits = state.apply_fn({"params": params}, golden_batch()[0])
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, golden_batch()[1]
    ).mean()

  return jit(jax.grad(loss))(state.params)


def test_the_forward_pass_agrees_with_tensorflow():
  images, labels = golden_batch()
  logits = jit(CNN().apply)({"params": golden_params()}, images)
  assert_golden(logits, "logits")
  assert_golden(jax.nn.softmax(logits), "probabilities")
  assert_golden(logits.argmax(axis=-1), "classes")
  metrics = steps.Metrics.of(logits, labels)
  assert_golden(metrics.means()["loss"], "loss")


@pytest.mark.parametrize("layer", LAYERS)
def test_gradient_norms_agree_with_tensorflow(grads, layer):
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
def test_gradients_agree_with_tensorflow(grads, key, part):
  assert_golden(part(grads), key)


@pytest.mark.parametrize("learning_rate", [0.001, 0.1])
def test_five_training_steps_agree_with_tensorflow(learning_rate):
  state = golden_state(learning_rate)
  train_step = jit(steps.train_step)
  for _ in range(5):
    state, _ = train_step(state, *golden_batch(), jax.random.key(0))
  assert state.step == 5
  images, labels = golden_batch()
  logits = jit(state.apply_fn)({"params": state.params}, images)
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


def initial_params():
  return steps.create_train_state(
    jax.random.key(0), CNN(), optax.sgd(0.1)
  ).params


def test_the_number_of_parameters_is_that_of_the_tutorial():
  shapes = jax.tree.map(jnp.shape, initial_params())
  assert shapes == {
    name: {"kernel": shape, "bias": shape[-1:]}
    for name, shape in LAYERS.items()
  }
  sizes = [p.size for p in jax.tree.leaves(initial_params())]
  assert sum(sizes) == 3_274_634, if_meant(
    "update it wherever `git grep -E 3.?274.?634` finds it"
  )


def test_the_initializers_are_those_of_tf_layers():
  params = initial_params()
  for name, shape in LAYERS.items():
    kernel, bias = params[name]["kernel"], params[name]["bias"]
    limit = np.sqrt(6 / (np.prod(shape[:-2]) * (shape[-2] + shape[-1])))
    assert np.abs(kernel).max() <= limit
    # The standard deviation of a uniform distribution, within 5%.
    np.testing.assert_allclose(kernel.std(), limit / np.sqrt(3), rtol=0.05)
    assert not bias.any()


def test_all_shapes_of_an_image_give_the_same_logits():
  images, _ = golden_batch()
  variables = {"params": golden_params()}
  apply = jit(CNN().apply)
  expected = apply(variables, images)
  for shape in ((16, 28, 28), (16, 784)):
    actual = apply(variables, images.reshape(shape))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
  "shape", [(2, 28, 28, 3), (2, 27, 28), (2, 783), (28, 28, 1), (784,), ()]
)
def test_other_image_shapes_are_refused(shape):
  with pytest.raises(ValueError) as error:
    CNN().apply({"params": golden_params()}, jnp.zeros(shape))
  for accepted in ("[B, 28, 28, 1]", "[B, 28, 28]", "[B, 784]"):
    assert accepted in str(error.value)
  assert str(list(shape)) in str(error.value)


def test_a_model_can_be_built_for_other_image_shapes():
  model = CNN(num_classes=7, image_shape=(33, 20, 3))
  images = jnp.zeros((2, 33, 20, 3))
  logits, variables = jax.eval_shape(
    model.init_with_output, jax.random.key(1), images
  )
  assert logits.shape == (2, 7)
  assert variables["params"]["dense"]["kernel"].shape == (8 * 5 * 64, 1024)
  for gray in (images[..., :1], images[..., 0]):
    with pytest.raises(ValueError, match="(?m)3. or .B, 1980.$"):
      jax.eval_shape(model.apply, variables, gray)


def test_dropout_is_active_only_in_training():
  images, _ = golden_batch()
  variables = {"params": golden_params()}

  @functools.partial(jit, static_argnums=(1, 2))
  def compute(variables, rate, train, seed):
    rngs = {"dropout": jax.random.key(seed)}
    return CNN(dropout_rate=rate).apply(variables, images, train, rngs=rngs)

  logits = functools.partial(compute, variables)
  np.testing.assert_allclose(
    logits(0.4, False, 0), logits(0.0, True, 0), rtol=0, atol=1e-6
  )
  assert (logits(0.4, True, 0) != logits(0.4, True, 1)).all()
  # Inverted dropout keeps the expected activation, and so the mean logit.
  many = np.stack([logits(0.4, True, seed) for seed in range(100)])
  np.testing.assert_allclose(many.mean(axis=0), logits(0.4, False, 0), atol=0.2)


def equations(jaxpr):
  """Yields the equations of a jaxpr and of all jaxprs inside it."""
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(
      equation.params, is_leaf=lambda x: hasattr(x, "eqns")
    ):
      if hasattr(value, "eqns"):
        yield from equations(value)


def test_bfloat16_is_used_for_layers_and_float32_for_everything_else():
  state = golden_state(learning_rate=0.1).replace(
    apply_fn=CNN(dropout_rate=0.0, dtype="bfloat16").apply
  )
  images, labels = golden_batch()
  logits = jit(state.apply_fn)({"params": state.params}, images)
  error = np.abs(logits - GOLDEN["logits"]).max()
  # bfloat16 has 8 bits of precision, float32 has 24: the logits must be near
  # the reference, but not equal to it.
  assert 1e-4 < error < 0.02 * np.abs(GOLDEN["logits"]).max()
  new_state, metrics = jit(steps.train_step)(
    state, images, labels, jax.random.key(0)
  )
  floats = (logits, new_state.params, metrics.sums["loss"])
  assert {x.dtype for x in jax.tree.leaves(floats)} == {np.dtype(np.float32)}
  step = jax.make_jaxpr(steps.train_step)(
    state, images, labels, jax.random.key(0)
  )
  found = collections.Counter(
    (equation.primitive.name, *(str(x.aval.dtype) for x in equation.invars))
    for equation in equations(step)
    if equation.primitive.name in ("conv_general_dilated", "dot_general")
  )
  assert {*found} == {
    ("conv_general_dilated", "bfloat16", "bfloat16"),
    # The dense layer. A kernel's gradient may be a product too.
    ("dot_general", "bfloat16", "bfloat16"),
    ("dot_general", "float32", "float32"),
  }
  # Only the last layer: forward, the gradients of its kernel and its input.
  assert found["dot_general", "float32", "float32"] == 3
  # The probabilities and the loss are computed in float32 too.
  others = {
    str(x.aval.dtype)
    for equation in equations(step)
    if equation.primitive.name in ("exp", "log", "argmax")
    for x in equation.invars
  }
  assert others == {"float32"}
