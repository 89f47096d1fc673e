"""The tutorial's network in several libraries, written as their users would.

Each class is one program. All but MatrixProduct start from the same weights and
train on batches of the same images; of these, all but Estimator also evaluate.
`throughput.py` runs each in its own process, some with another Python:

    python benchmarks/peers.py CLASS ARGUMENTS

ARGUMENTS are the constructor's, as JSON. The process then reads one request per
line: the name of a method and its arguments, as JSON. It answers each with a
line of JSON: what the method returned and the seconds that it took.
"""

import functools
import json
import os
import pathlib
import sys
import threading
import time

import numpy as np

NUM_IMAGES = 10_000
LEARNING_RATE = 0.001
DROPOUT_RATE = 0.4


def make_data() -> tuple[np.ndarray, np.ndarray]:
  """Returns random images, uint8 [n, 28, 28, 1], and labels, int32 [n]."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (NUM_IMAGES, 28, 28, 1), np.uint8)
  return images, rng.integers(0, 10, NUM_IMAGES, np.int32)


def first_images() -> np.ndarray:
  """Returns the images for which all programs must give the same logits."""
  return make_data()[0][:100].astype(np.float32) / 255


def make_params() -> dict[str, dict[str, np.ndarray]]:
  """Returns the weights that all programs start from, in Flax's layout."""
  rng = np.random.default_rng(1)
  params = {}
  for name, shape in {
    "conv1": (5, 5, 1, 32),
    "conv2": (5, 5, 32, 64),
    "dense": (3136, 1024),
    "logits": (1024, 10),
  }.items():
    scale = np.sqrt(2 / np.prod(shape[:-1]))
    params[name] = {
      "kernel": rng.normal(0, scale, shape).astype(np.float32),
      "bias": rng.normal(0, 0.1, shape[-1]).astype(np.float32),
    }
  return params


class This:
  """This project's own step and evaluation, as train.py uses them."""

  def __init__(self, batch_size: int, num_images: int = NUM_IMAGES):
    import jax
    import jax.numpy as jnp
    import optax

    import input_pipeline
    from machine import compiling
    from machine import devices
    import model
    import steps

    compiling.keep_freed_memory()
    self._block = jax.block_until_ready
    network = model.CNN(dropout_rate=DROPOUT_RATE)
    state = steps.create_train_state(
      jax.random.key(0), network, optax.sgd(LEARNING_RATE)
    ).replace(params=jax.tree.map(jnp.asarray, make_params()))
    images, labels = make_data()
    repeats = -(-num_images // NUM_IMAGES)
    rows = np.tile(images.reshape(NUM_IMAGES, -1), (repeats, 1))[:num_images]
    labels = np.tile(labels, repeats)[:num_images]
    self._examples = input_pipeline.Examples(*jax.device_put((rows, labels)))
    self._rngs = tuple(jax.random.split(jax.random.key(1)))
    order = input_pipeline.order_at(self._rngs[0], 0, batch_size, num_images)
    self._training = devices.replicate(
      steps.Training(state, order, steps.Metrics.zero(10))
    )
    self._run = compiling.jit_loop(
      steps.train_on_next_batch, batch_size=batch_size
    )
    self._evaluate = steps.evaluator(self._examples, 1000)
    self._logits = lambda x: network.apply({"params": state.params}, x)

  def logits(self):
    return self._logits(first_images())

  def train(self, num_steps):
    self._training = self._run(
      self._training, num_steps, self._examples, *self._rngs
    )
    self._block(self._training)

  def evaluate(self):
    self._block(self._evaluate(self._training.state))


def plain_flax():
  """Builds the network and the training step as Flax's examples do.

  Returns:
    The module, and a function from a TrainState, images, labels and a key to
    the new state and the loss.
  """
  from flax import linen as nn
  import jax
  import optax

  class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      x = nn.relu(nn.Conv(32, (5, 5), name="conv1")(x))
      x = nn.max_pool(x, (2, 2), (2, 2))
      x = nn.relu(nn.Conv(64, (5, 5), name="conv2")(x))
      x = nn.max_pool(x, (2, 2), (2, 2))
      x = x.reshape((x.shape[0], -1))
      x = nn.relu(nn.Dense(1024, name="dense")(x))
      x = nn.Dropout(DROPOUT_RATE, deterministic=not train)(x)
      return nn.Dense(10, name="logits")(x)

  def train_step(state, images, labels, rng):
    rngs = {"dropout": jax.random.fold_in(rng, state.step)}

    def loss_fn(params):
      logits = state.apply_fn({"params": params}, images, True, rngs=rngs)
      return optax.softmax_cross_entropy_with_integer_labels(
        logits, labels
      ).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss

  return CNN(), train_step


class PlainFlax:
  """Flax linen, as in Flax's own examples."""

  def __init__(self, batch_size: int):
    from flax.training import train_state
    import jax
    import jax.numpy as jnp
    import optax

    @jax.jit
    def eval_step(state, images, labels):
      logits = state.apply_fn({"params": state.params}, images, False)
      return (logits.argmax(-1) == labels).sum()

    network, train_step = plain_flax()
    self._state = train_state.TrainState.create(
      apply_fn=network.apply,
      params=jax.tree.map(jnp.asarray, make_params()),
      tx=optax.sgd(LEARNING_RATE),
    )
    self._batch_size = batch_size
    images, self._labels = make_data()
    self._images = np.float32(images) / 255
    self._train_step, self._eval_step = jax.jit(train_step), eval_step
    self._rng, self._order = jax.random.key(0), np.random.default_rng(0)

  def logits(self):
    params = {"params": self._state.params}
    return self._state.apply_fn(params, first_images(), False)

  def train(self, num_steps):
    for _ in range(num_steps):
      batch = self._order.integers(0, NUM_IMAGES, self._batch_size)
      self._state, loss = self._train_step(
        self._state, self._images[batch], self._labels[batch], self._rng
      )
    loss.block_until_ready()

  def evaluate(self):
    correct = 0
    for start in range(0, NUM_IMAGES, 1000):
      batch = slice(start, start + 1000)
      correct += self._eval_step(
        self._state, self._images[batch], self._labels[batch]
      )
    int(correct)


def _multiply_as_xla() -> None:
  """Lets PyTorch multiply in TF32 on a GPU, which is XLA's default there."""
  import torch

  if torch.cuda.is_available():
    torch.set_float32_matmul_precision("high")


class Torch:
  """PyTorch, eager or compiled, in one of its two memory layouts.

  On a GPU the data set is on the device, as this project's is.
  """

  def __init__(
    self, batch_size: int, channels_last: bool, compile_mode: str | None
  ):
    import torch
    from torch import nn

    self._torch = torch
    self._device = "cuda" if torch.cuda.is_available() else "cpu"
    _multiply_as_xla()
    params = make_params()
    network = nn.Sequential(
      nn.Conv2d(1, 32, 5, padding=2),
      nn.ReLU(),
      nn.MaxPool2d(2),
      nn.Conv2d(32, 64, 5, padding=2),
      nn.ReLU(),
      nn.MaxPool2d(2),
      nn.Flatten(),
      nn.Linear(3136, 1024),
      nn.ReLU(),
      nn.Dropout(DROPOUT_RATE),
      nn.Linear(1024, 10),
    )
    # PyTorch flattens [channels, height, width] and stores [out, in] kernels.
    dense = params["dense"]["kernel"].reshape(7, 7, 64, 1024)
    kernels = {
      0: params["conv1"]["kernel"].transpose(3, 2, 0, 1),
      3: params["conv2"]["kernel"].transpose(3, 2, 0, 1),
      7: dense.transpose(2, 0, 1, 3).reshape(3136, 1024).T,
      10: params["logits"]["kernel"].T,
    }
    biases = {0: "conv1", 3: "conv2", 7: "dense", 10: "logits"}
    tensors = {}
    for index, kernel in kernels.items():
      tensors[f"{index}.weight"] = torch.tensor(kernel.copy())
      tensors[f"{index}.bias"] = torch.tensor(params[biases[index]]["bias"])
    network.load_state_dict(tensors)
    self._format = (
      torch.channels_last if channels_last else torch.contiguous_format
    )
    # PyTorch documents this signature, but its annotations lack it.
    network = network.to(self._device, memory_format=self._format)  # type: ignore[call-overload]
    self._network = network
    self._forward = network
    if compile_mode:
      self._forward = torch.compile(network, mode=compile_mode)
    self._optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)
    images, labels = make_data()
    on_device = torch.tensor(images, device=self._device)
    self._images = on_device.permute(0, 3, 1, 2)
    self._labels = torch.tensor(labels, device=self._device).long()
    self._batch_size = batch_size

  def _batch(self, index):
    images = self._images[index].float() / 255
    return images.contiguous(memory_format=self._format), self._labels[index]

  def logits(self):
    torch = self._torch
    self._network.eval()
    with torch.no_grad():
      images = torch.tensor(first_images(), device=self._device)
      return self._network(images.permute(0, 3, 1, 2)).cpu().numpy()

  def train(self, num_steps):
    torch = self._torch
    self._network.train()
    for _ in range(num_steps):
      index = torch.randint(
        0, NUM_IMAGES, (self._batch_size,), device=self._device
      )
      images, labels = self._batch(index)
      loss = torch.nn.functional.cross_entropy(self._forward(images), labels)
      self._optimizer.zero_grad()
      loss.backward()
      self._optimizer.step()
    loss.item()  # Waits for a GPU.

  def evaluate(self):
    torch = self._torch
    self._network.eval()
    correct = 0
    with torch.inference_mode():
      for start in range(0, NUM_IMAGES, 1000):
        images, labels = self._batch(slice(start, start + 1000))
        correct += (self._forward(images).argmax(1) == labels).sum()
    int(correct)


class Keras:
  """Keras 3, trained with its `fit`."""

  def __init__(self, batch_size: int, backend: str):
    os.environ["KERAS_BACKEND"] = backend
    import keras

    if backend == "torch":
      _multiply_as_xla()
    layers = keras.layers
    self._network = keras.Sequential(
      [
        keras.Input((28, 28, 1)),
        layers.Conv2D(32, 5, padding="same", activation="relu", name="conv1"),
        layers.MaxPooling2D(2),
        layers.Conv2D(64, 5, padding="same", activation="relu", name="conv2"),
        layers.MaxPooling2D(2),
        layers.Flatten(),
        layers.Dense(1024, activation="relu", name="dense"),
        layers.Dropout(DROPOUT_RATE),
        layers.Dense(10, name="logits"),
      ]
    )
    for name, weights in make_params().items():
      self._network.get_layer(name).set_weights(
        [weights["kernel"], weights["bias"]]
      )
    self._network.compile(
      optimizer=keras.optimizers.SGD(LEARNING_RATE),
      loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
      metrics=["accuracy"],
    )
    images, self._labels = make_data()
    self._images = np.float32(images) / 255
    self._batch_size = batch_size
    self._repeated = functools.cache(self._repeat)

  def _repeat(self, num_steps):
    index = np.arange(num_steps * self._batch_size) % NUM_IMAGES
    return self._images[index], self._labels[index]

  def logits(self):
    return self._network.predict_on_batch(first_images())

  def train(self, num_steps):
    self._network.fit(
      *self._repeated(num_steps), batch_size=self._batch_size, verbose=0
    )

  def evaluate(self):
    self._network.evaluate(
      self._images, self._labels, batch_size=1000, verbose=0
    )


class Estimator:
  """The tutorial's own program, with TensorFlow's Estimator and layers.

  It trains in a thread that waits between calls to `train`, because starting
  again would rebuild the graph and restore a checkpoint.
  """

  def __init__(self, batch_size: int):
    import tensorflow.compat.v1 as tf

    tf.logging.set_verbosity(tf.logging.ERROR)
    self._tf = tf
    self._wanted = threading.Semaphore(0)
    self._taken = threading.Semaphore(0)
    wanted, taken = self._wanted, self._taken

    class TakeTurns(tf.train.SessionRunHook):
      def before_run(self, run_context):
        wanted.acquire()

      def after_run(self, run_context, run_values):
        taken.release()

    images, labels = make_data()
    inputs = tf.estimator.inputs.numpy_input_fn(
      x={"x": np.float32(images) / 255},
      y=labels,
      batch_size=batch_size,
      num_epochs=None,
      shuffle=True,
    )
    estimator = tf.estimator.Estimator(self._model_fn)
    hooks = [
      tf.train.LoggingTensorHook({"probabilities": "softmax"}, every_n_iter=50),
      TakeTurns(),
    ]
    threading.Thread(
      target=estimator.train, args=(inputs, hooks), daemon=True
    ).start()

  def _network(self, images, training):
    tf = self._tf
    params = {
      name: {
        f"{kind}_initializer": tf.constant_initializer(value)
        for kind, value in layer.items()
      }
      for name, layer in make_params().items()
    }
    x = tf.reshape(images, [-1, 28, 28, 1])
    for name, filters in (("conv1", 32), ("conv2", 64)):
      x = tf.layers.conv2d(
        x,
        filters,
        [5, 5],
        padding="same",
        activation=tf.nn.relu,
        **params[name],
      )
      x = tf.layers.max_pooling2d(x, [2, 2], 2)
    x = tf.reshape(x, [-1, 7 * 7 * 64])
    x = tf.layers.dense(x, 1024, activation=tf.nn.relu, **params["dense"])
    x = tf.layers.dropout(x, DROPOUT_RATE, training=training)
    return tf.layers.dense(x, 10, **params["logits"])

  def _model_fn(self, features, labels, mode):
    tf = self._tf
    logits = self._network(features["x"], mode == tf.estimator.ModeKeys.TRAIN)
    tf.nn.softmax(logits, name="softmax")
    loss = tf.losses.sparse_softmax_cross_entropy(labels, logits)
    train_op = tf.train.GradientDescentOptimizer(LEARNING_RATE).minimize(
      loss, global_step=tf.train.get_global_step()
    )
    return tf.estimator.EstimatorSpec(mode, loss=loss, train_op=train_op)

  def logits(self):
    tf = self._tf
    with tf.Graph().as_default(), tf.Session() as session:
      logits = self._network(first_images(), training=False)
      session.run(tf.global_variables_initializer())
      return session.run(logits)

  def train(self, num_steps):
    self._wanted.release(num_steps)
    for _ in range(num_steps):
      self._taken.acquire()


class MatrixProduct:
  """The machine's limit: the rate of operations in large matrix products."""

  SIZE = 2048

  def __init__(self, batch_size: int):
    import jax
    import jax.numpy as jnp

    del batch_size
    self._matrix = jnp.ones((self.SIZE, self.SIZE), jnp.float32)
    self._product = jax.jit(jnp.dot)

  def train(self, num_products):
    for _ in range(num_products):
      product = self._product(self._matrix, self._matrix)
    product.block_until_ready()


def main() -> None:
  """Answers requests until standard input ends."""
  name, arguments = sys.argv[1], json.loads(sys.argv[2])
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # Libraries may print; that must not mix with the answers.
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
  program = globals()[name](**arguments)
  print("ready", file=answers, flush=True)
  for line in sys.stdin:
    method, *args = json.loads(line)
    start = time.perf_counter()
    result = getattr(program, method)(*args)
    seconds = time.perf_counter() - start
    result = None if result is None else np.asarray(result).tolist()
    print(json.dumps([result, seconds]), file=answers, flush=True)


if __name__ == "__main__":
  main()
