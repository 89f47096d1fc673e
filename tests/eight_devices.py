"""Trains on 1, 2 and 8 virtual devices in a process that has 8.

Prints what the tests compare, as JSON.
"""

import functools
import json
import pathlib
import re
import sys

import jax
import numpy as np
import optax

PROJECT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

import input_pipeline  # noqa: E402
from machine import compiling  # noqa: E402
from machine import devices  # noqa: E402
import model  # noqa: E402
from rundir import checkpoints  # noqa: E402
import steps  # noqa: E402

BATCH_SIZE, NUM_STEPS = 16, 20
INIT_RNG, ORDER_RNG, DROPOUT_RNG = jax.random.split(jax.random.key(0), 3)


def examples(size, seed):
  """Returns images with one bright row, at the index of the label."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 10, size).astype(np.int32)
  images = rng.integers(0, 100, (size, 28, 28, 1)).astype(np.uint8)
  images[np.arange(size), labels] = 255
  return input_pipeline.Examples(images.reshape(size, -1), labels)


@functools.cache
def train_steps(num_devices):
  del num_devices  # Only a cache key: each number needs its own program.
  return jax.jit(
    functools.partial(steps.train_on_next_batch, batch_size=BATCH_SIZE),
    compiler_options=compiling.compiler_options(),
  )


def use(num_devices):
  mesh = jax.make_mesh(
    (num_devices,),
    ("data",),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:num_devices],
  )
  devices.mesh = lambda: mesh


def train(num_devices, state, workdir=None):
  """Takes the remaining steps; returns the training state and the metrics.

  Saves a checkpoint halfway if `workdir` is given.
  """
  use(num_devices)
  data = devices.replicate(examples(100, seed=0))
  start_step = int(state.step)
  order = input_pipeline.order_at(ORDER_RNG, start_step, BATCH_SIZE, 100)
  training = devices.replicate(
    steps.Training(
      jax.device_get(state), jax.device_get(order), steps.Metrics.zero(10)
    )
  )
  metrics = []
  for step in range(start_step + 1, NUM_STEPS + 1):
    training = train_steps(num_devices)(training, data, ORDER_RNG, DROPOUT_RNG)
    metrics.append([float(x) for x in jax.tree.leaves(training.metrics)])
    training = steps.reset_metrics(training)
    if workdir and step == NUM_STEPS // 2:
      with checkpoints.open_manager(workdir, 0) as manager:
        manager.save(step, training.state, training.metrics, None)
  return training, metrics


def all_reduces(num_devices, training):
  """Returns the shapes that a step sums over the devices."""
  use(num_devices)
  data = devices.replicate(examples(100, seed=0))
  step = train_steps(num_devices)
  compiled = step.lower(training, data, ORDER_RNG, DROPOUT_RNG).compile()
  return re.findall(r"= (.*) all-reduce\(", compiled.as_text())


def difference(a, b):
  """Returns the largest difference between two trees of parameters."""
  differences = jax.tree.map(
    lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), a, b
  )
  return float(max(jax.tree.leaves(differences)))


def main() -> None:
  scratch = pathlib.Path(sys.argv[1])
  use(1)
  state = steps.create_train_state(INIT_RNG, model.CNN(), optax.sgd(0.001))
  result = {}
  for num_devices in (1, 2, 8):
    workdir = scratch / str(num_devices) if num_devices in (1, 8) else None
    training, metrics = train(num_devices, state, workdir)
    if num_devices == 1:
      expected = training.state.params
    result[str(num_devices)] = {
      "metrics": metrics,
      "difference": difference(expected, training.state.params),
      "devices": len(training.state.params["dense"]["kernel"].devices()),
    }
    if num_devices in (1, 8):  # 8 divides 32, but not 30.
      test = devices.replicate(examples(70, seed=1))
      result[str(num_devices)]["tests"] = [
        steps.evaluator(test, batch_size)(training.state)[0]
        for batch_size in (32, 30)
      ]
      # Here, the whole split is a single batch, which the devices divide.
      _, probabilities = steps.evaluator(
        devices.replicate(examples(64, 1)), 64
      )(training.state)
      result[str(num_devices)]["whole"] = (
        probabilities.sharding.is_fully_replicated
      )
  result["all_reduces"] = all_reduces(8, training)
  for before, after in ((8, 1), (1, 8)):
    use(after)
    restored, _ = checkpoints.restore(scratch / str(before), "last", state)
    training, metrics = train(after, restored)
    result[f"{before} to {after}"] = {
      "metrics": metrics,
      "difference": difference(expected, training.state.params),
    }
  print(json.dumps(result))


if __name__ == "__main__":
  main()
