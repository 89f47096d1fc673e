"""Shows what XLA compiles the training loop to for a TPU, without a TPU.

    pip install -r benchmarks/requirements-tpu.txt
    python benchmarks/tpu_program.py --topology=v5e:2x4 --preset=accurate

libtpu compiles ahead of time for v5e:1x1, v5e:2x4, v6e:1x1 and others. For this
project's program and, for comparison, a plain Flax program, this prints how
much memory they need, the size of their code, the transfers to the host and,
inside the loop, the collectives and the copies of the whole data set. Nothing
is timed.
"""

import argparse
import collections
import functools
import importlib
import json
import math
import os
import pathlib
import re
import sys
from typing import Any
from unittest import mock

for name, value in {
  "JAX_PLATFORMS": "cpu",  # Nothing runs on the TPU.
  "TPU_SKIP_MDS_QUERY": "1",  # Don't ask a metadata server for a TPU's type.
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # Several processes may compile at once.
  # These three only silence warnings.
  "TPU_ACCELERATOR_TYPE": "v5litepod-1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_STDERR_LOG_LEVEL": "3",
}.items():
  os.environ.setdefault(name, value)
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from flax.training import train_state  # noqa: E402
import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import ml_collections  # noqa: E402
import numpy as np  # noqa: E402
import peers  # noqa: E402

import augmentation  # noqa: E402
import input_pipeline  # noqa: E402
from machine import compiling  # noqa: E402
from machine import devices  # noqa: E402
import model as model_lib  # noqa: E402
import optimizer  # noqa: E402
import steps  # noqa: E402

_NUM_EXAMPLES = 55_000
_IMAGE_SHAPE = (28, 28, 1)
_COLLECTIVE = re.compile(
  r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
  r"(?:-start)?\("
)
_HOST_TRANSFER = re.compile(
  r" (?:send|recv|infeed|outfeed)\(|custom_call_target=\"[^\"]*callback"
)


def topology_mesh(topology: str) -> jax.sharding.Mesh:
  """Returns what `devices.mesh` would for a topology such as "v5e:2x4"."""
  options = {}
  if math.prod(map(int, topology.split(":")[1].split("x"))) == 1:
    options["chips_per_host_bounds"] = [1, 1, 1]
  devices = topologies.get_topology_desc(
    platform="tpu", topology_name=topology, **options
  ).devices
  return jax.sharding.Mesh(
    np.array(devices), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )


def compile_loop(step, start) -> jax.stages.Compiled:
  """Compiles a loop of steps.

  Args:
    step: a function of a carry and other arguments that returns a new carry.
    start: a function that returns the first carry and the other arguments.
  """
  carry, *args = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=devices.replicated()
    ),
    jax.eval_shape(start),
  )
  num_steps = jax.ShapeDtypeStruct((), jnp.int32)
  return compiling.loop_on_device(step).lower(carry, num_steps, *args).compile()


def compile_project(config: ml_collections.ConfigDict) -> jax.stages.Compiled:
  """Compiles this project's loop, as train.py runs it."""

  def start():
    model = model_lib.CNN(dropout_rate=config.dropout_rate, dtype=config.dtype)
    rng = jax.random.key(0)
    state = steps.create_train_state(
      rng, model, optimizer.create(config), config.ema_decay
    )
    order = input_pipeline.order_at(rng, 0, config.batch_size, _NUM_EXAMPLES)
    metrics = steps.Metrics.zero(model.num_classes)
    training = steps.Training(state, order, metrics)
    images = jnp.zeros((_NUM_EXAMPLES, math.prod(_IMAGE_SHAPE)), jnp.uint8)
    labels = jnp.zeros(_NUM_EXAMPLES, jnp.int32)
    examples = input_pipeline.Examples(images, labels, _IMAGE_SHAPE)
    return training, examples, rng, rng

  step = functools.partial(
    steps.train_on_next_batch,
    batch_size=config.batch_size,
    label_smoothing=config.label_smoothing,
    limits=augmentation.from_config(config),
  )
  return compile_loop(step, start)


def compile_plain_flax(
  config: ml_collections.ConfigDict,
) -> jax.stages.Compiled:
  """Compiles a plain Flax loop with the same optimizer and batch size."""
  network, train_step = peers.plain_flax()

  def start():
    rng = jax.random.key(0)
    images = jnp.zeros((_NUM_EXAMPLES, *_IMAGE_SHAPE), jnp.uint8)
    params = network.init(rng, jnp.zeros((1, *_IMAGE_SHAPE)), False)["params"]
    state = train_state.TrainState.create(
      apply_fn=network.apply, params=params, tx=optimizer.create(config)
    ).replace(step=jnp.int32(0))
    labels = jnp.zeros(_NUM_EXAMPLES, jnp.int32)
    return (state, jnp.float32(0)), images, labels, rng

  def step(carry, images, labels, rng):
    state, _ = carry
    rng = jax.random.fold_in(rng, state.step)
    shape = (config.batch_size,)
    batch = devices.split(jax.random.randint(rng, shape, 0, _NUM_EXAMPLES))
    scaled = images[batch].astype(jnp.float32) / 255
    carry = train_step(state, devices.split(scaled), labels[batch], rng)
    return devices.gather(carry)

  return compile_loop(step, start)


def in_loops(hlo: str) -> list[str]:
  """Returns the instructions of all loops and of the computations they call."""
  computations: dict[str, list[str]] = {}
  instructions: list[str] = []
  for line in hlo.splitlines():
    if match := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
      instructions = computations[match[1]] = []
    elif " = " in line:
      instructions.append(line)

  def called(instructions):
    names = re.findall(r"%([\w.\-]+)", " ".join(instructions))
    return {name for name in names if name in computations}

  pending = {
    name
    for instructions in computations.values()
    for line in instructions
    if " while(" in line
    for name in called([line])
  }
  found = set()
  while pending:
    found |= pending
    pending = {
      name for each in pending for name in called(computations[each])
    } - found
  return [line for name in sorted(found) for line in computations[name]]


def _copies_data_set(instruction: str) -> bool:
  """Returns whether an instruction creates an array as large as all images."""
  match = re.search(r" = \w+\[([\d,]+)\]\S* ([\w-]+)\(", instruction)
  if not match or match[2] in ("parameter", "get-tuple-element", "bitcast"):
    return False
  size = math.prod(map(int, match[1].split(",")))
  return size == _NUM_EXAMPLES * math.prod(_IMAGE_SHAPE)


def describe(compiled: jax.stages.Compiled) -> dict[str, Any]:
  """Collects the figures of a compiled program."""
  hlo = compiled.as_text()
  memory = compiled.memory_analysis()
  assert hlo and memory  # A TPU's compiler has both.
  loops = in_loops(hlo)
  return {
    "loop_collectives": dict(
      collections.Counter(
        match[1] for line in loops if (match := _COLLECTIVE.search(line))
      )
    ),
    "host_transfers": len(_HOST_TRANSFER.findall(hlo)),
    "dataset_copies_in_loop": sum(map(_copies_data_set, loops)),
    "argument_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
    "code_bytes": memory.generated_code_size_in_bytes,
  }


def _print(result: dict[str, Any]) -> None:
  print(f"{'':24} {'this project':>16} {'plain Flax':>16}")
  for key, plain in result["plain_flax"].items():
    cells = []
    for value in (result[key], plain):
      if isinstance(value, dict):
        value = ", ".join(f"{n} {name}" for name, n in value.items()) or "none"
      cells.append(value if isinstance(value, str) else f"{value:,}")
    print(f"{key:24} {cells[0]:>16} {cells[1]:>16}")


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--topology", default="v5e:1x1")
  parser.add_argument(
    "--preset", default="default", help="the name of a file in configs/"
  )
  parser.add_argument("--json", help="where to write the result")
  args = parser.parse_args()
  config = importlib.import_module(f"configs.{args.preset}").get_config()
  mesh = topology_mesh(args.topology)
  # train.py requires a batch size that is divisible by the number of chips.
  config.batch_size += -config.batch_size % mesh.size
  with (
    mock.patch.object(devices, "mesh", lambda: mesh),
    mock.patch.object(jax, "default_backend", lambda: "tpu"),
  ):
    result = {
      "topology": args.topology,
      "preset": args.preset,
      "batch_size": config.batch_size,
      "jax": jax.__version__,
      **describe(compile_project(config)),
      "plain_flax": describe(compile_plain_flax(config)),
    }
  _print(result)
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  main()
