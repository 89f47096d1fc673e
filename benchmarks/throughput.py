r"""Measures the training and evaluation speed of this project and its peers.

    pip install -r benchmarks/requirements.txt
    python benchmarks/throughput.py --json=throughput.json
    python benchmarks/throughput.py --draw docs/throughput*.json \
      --picture=docs/throughput.png

The two programs that use TensorFlow need separate environments, and are left
out unless their Python is given:

    python3.11 -m venv tf
    tf/bin/pip install -r benchmarks/requirements-tensorflow.txt
    python3.11 -m venv keras
    keras/bin/pip install -r benchmarks/requirements-keras-tensorflow.txt
    python benchmarks/throughput.py --tensorflow_python=tf/bin/python \
      --keras_tensorflow_python=keras/bin/python

All programs run at the same time, each in its own process, and take turns: each
round measures all of them once. The results are medians over the rounds. Ratios
are taken within each round, so they hold even if the machine's speed varies.
Before measuring, all programs must compute the same logits.
"""

import argparse
from collections.abc import Callable
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
from typing import Any

import jax
from matplotlib import figure
import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import peers  # noqa: E402

from report import figures  # noqa: E402

# Floating-point operations per training image: two for each multiplication, in
# the forward pass, in the gradient of the kernel and, except for conv1, in that
# of the input.
_MULTIPLICATIONS = {
  "conv1": 28 * 28 * 5 * 5 * 1 * 32,
  "conv2": 14 * 14 * 5 * 5 * 32 * 64,
  "dense": 3136 * 1024,
  "logits": 1024 * 10,
}
FLOP_PER_IMAGE = 2 * (
  3 * sum(_MULTIPLICATIONS.values()) - _MULTIPLICATIONS["conv1"]
)

THIS = "this project"
LIMIT = "limit: 2048x2048 jnp.dot"
CUDA_GRAPHS = "PyTorch, CUDA graphs"
TENSORFLOW = "the tutorial, TensorFlow 2.15"
KERAS_TENSORFLOW = "Keras 3 on TensorFlow"
PROGRAMS: dict[str, tuple[str, dict[str, Any]]] = {
  THIS: ("This", {}),
  "plain Flax linen": ("PlainFlax", {}),
  "PyTorch, channels_last": (
    "Torch",
    {"channels_last": True, "compile_mode": None},
  ),
  "PyTorch, NCHW": ("Torch", {"channels_last": False, "compile_mode": None}),
  "PyTorch, torch.compile": (
    "Torch",
    {"channels_last": True, "compile_mode": "default"},
  ),
  CUDA_GRAPHS: (
    "Torch",
    {"channels_last": True, "compile_mode": "reduce-overhead"},
  ),
  "Keras 3 on JAX": ("Keras", {"backend": "jax"}),
  "Keras 3 on PyTorch": ("Keras", {"backend": "torch"}),
  KERAS_TENSORFLOW: ("Keras", {"backend": "tensorflow"}),
  TENSORFLOW: ("Estimator", {}),
  LIMIT: ("MatrixProduct", {}),
}
_PEERS = pathlib.Path(__file__).with_name("peers.py")
pythons = {name: sys.executable for name in PROGRAMS}


class Worker:
  """A program in its own process."""

  def __init__(self, name: str, batch_size: int, **arguments):
    cls, fixed = PROGRAMS[name]
    arguments = {"batch_size": batch_size, **fixed, **arguments}
    self._process = subprocess.Popen(
      [pythons[name], _PEERS, cls, json.dumps(arguments)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    assert self._process.stdout is not None
    self._answers = self._process.stdout
    if self._answers.readline() != "ready\n":
      raise RuntimeError(f"{name} could not be started")

  def __call__(self, method: str, *args) -> tuple[Any, float]:
    """Returns what the method returns, and the seconds it took."""
    print(json.dumps([method, *args]), file=self._process.stdin, flush=True)
    return json.loads(self._answers.readline())

  def close(self) -> None:
    self._process.kill()
    self._process.wait()


def on_gpu() -> bool:
  return jax.default_backend() == "gpu"


def steps_per_turn(batch_size: int) -> int:
  """Returns how many steps take about half a second, at least two."""
  images = 100_000 if on_gpu() else 500
  return max(2, round(images / batch_size))


def check_same_function(workers: dict[str, Worker]) -> None:
  tolerance = 1e-2 if on_gpu() else 1e-4  # A GPU multiplies in TF32.
  expected = np.array(workers[THIS]("logits")[0])
  for name, worker in workers.items():
    if name == LIMIT:
      continue
    logits = np.array(worker("logits")[0])
    np.testing.assert_allclose(
      logits, expected, rtol=0, atol=tolerance, err_msg=name
    )
    difference = np.abs(logits - expected).max()
    print(f"{name}: logits differ by at most {difference:.1e}", file=sys.stderr)


def measure(
  names: list[str], batch_size: int, rounds: int, evaluate: bool
) -> dict[str, dict[str, list[float]]]:
  """Measures the programs in rounds.

  Returns:
    For each program, "train" (seconds per step in each round) and, if asked
    for, "evaluate" (seconds per image in each round).
  """
  workers = {name: Worker(name, batch_size) for name in names}
  try:
    if THIS in workers:
      check_same_function(workers)
    num_steps = steps_per_turn(batch_size)
    times: dict[str, dict[str, list[float]]] = {
      name: {"train": [], "evaluate": []} for name in names
    }
    for number in range(rounds + 1):
      for name, worker in workers.items():
        if name == LIMIT:
          _, seconds = worker("train", steps_per_turn(125))
          flop = steps_per_turn(125) * 2 * peers.MatrixProduct.SIZE**3
          train = seconds / flop * FLOP_PER_IMAGE * batch_size
        else:
          train = worker("train", num_steps)[1] / num_steps
        images = None
        if evaluate and name not in (LIMIT, TENSORFLOW):
          images = worker("evaluate")[1] / peers.NUM_IMAGES
        if number:  # The first round compiles.
          times[name]["train"].append(train)
          if images:
            times[name]["evaluate"].append(images)
      print(f"batch {batch_size}: round {number}/{rounds}", file=sys.stderr)
  finally:
    for worker in workers.values():
      worker.close()
  return times


def summarize(times: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
  """Computes each program's median times and median ratios to this project."""
  result: dict[str, Any] = {}
  for name, kinds in times.items():
    result[name] = {}
    for kind, seconds in kinds.items():
      if not seconds:
        continue
      ratios = [
        t / own for t, own in zip(seconds, times[THIS][kind], strict=True)
      ]
      result[name][kind] = {
        "seconds": statistics.median(seconds),
        "minimum_seconds": min(seconds),
        "this_project_is_faster_by": statistics.median(ratios),
      }
  return result


def scaling(rounds: int) -> dict[str, Any]:
  """Measures seconds per step by "batch_size" and by "num_images"."""

  def interleave(workers, num_steps: Callable[[Any], int]):
    times: dict[int, list[float]] = {key: [] for key in workers}
    for number in range(rounds + 1):
      for key, worker in workers.items():
        seconds = worker("train", num_steps(key))[1] / num_steps(key)
        if number:
          times[key].append(seconds)
    for worker in workers.values():
      worker.close()
    return {key: statistics.median(times[key]) for key in times}

  batch_sizes = [32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
  by_batch_size: dict[int, float] = {}
  for group in (batch_sizes[:5], batch_sizes[5:]):
    workers = {size: Worker(THIS, size) for size in group}
    by_batch_size |= interleave(workers, steps_per_turn)
  sizes = [1000, 10_000, 55_000, 200_000]
  workers = {size: Worker(THIS, 100, num_images=size) for size in sizes}
  by_num_images = interleave(workers, lambda _: 2 * steps_per_turn(100))
  return {
    "batch_size": by_batch_size,
    "num_images": by_num_images,
  }


def describe_machine() -> dict[str, Any]:
  packages = ("jax", "jaxlib", "flax", "torch", "keras", "numpy")
  processor, extensions = _processor()
  return {
    "date": datetime.date.today().isoformat(),
    "device": jax.devices()[0].device_kind,
    "processor": processor,
    "vector_extensions": extensions,
    "cores": os.cpu_count(),
    "python": platform.python_version(),
    "versions": {name: importlib.metadata.version(name) for name in packages},
  }


def _processor() -> tuple[str, str]:
  """Returns the processor's name and its widest vector extension."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor() or platform.machine(), "unknown"
  pairs = [line.split(":", 1) for line in lines if ":" in line]
  info = {key.strip(): value.strip() for key, value in pairs}
  flags = info.get("flags", "").split()
  known = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX"}
  widest = next((known[flag] for flag in known if flag in flags), "no AVX")
  return info.get("model name", platform.machine()), widest


def _hardware(machine: dict[str, Any]) -> str:
  cores = (
    f"{machine['cores']} cores, {machine['processor']},"
    f" {machine['vector_extensions']}"
  )
  device = machine["device"]
  return cores if device == "cpu" else f"{device}, {cores}"


def print_tables(result: dict[str, Any]) -> None:
  """Prints the result as the tables of docs/performance.md."""

  def row(*cells):
    print("|", " | ".join(map(str, cells)), "|")

  machine = result["machine"]
  print(f"{_hardware(machine)}, {machine['date']}\n")
  row("batch 100", "training steps/s", "x", "evaluation images/s", "x")
  row(*["---"] * 5)
  for name, kinds in result["batch_size"]["100"].items():
    cells = [name]
    for kind in ("train", "evaluate"):
      if kind in kinds:
        cells.append(f"{1 / kinds[kind]['seconds']:,.1f}")
        cells.append(f"{kinds[kind]['this_project_is_faster_by']:.2f}")
      else:
        cells += ["", ""]
    row(*cells)
  print("\nx: how many times as long it takes as this project (median).\n")

  others = [size for size in result["batch_size"] if size != "100"]
  if not others:
    return
  row("training images/s", *(f"batch {size}" for size in others))
  row(*["---"] * (1 + len(others)))
  for name in result["batch_size"][others[0]]:
    cells = [name]
    for size in others:
      train = result["batch_size"][size][name]["train"]
      cells.append(
        f"{int(size) / train['seconds']:,.0f}"
        f" ({train['this_project_is_faster_by']:.2f})"
      )
    row(*cells)

  print()
  row("this project, by batch size", "ms per step", "ms per image")
  row(*["---"] * 3)
  for size, seconds in result["scaling"]["batch_size"].items():
    row(size, f"{seconds * 1e3:.3g}", f"{seconds / int(size) * 1e3:.3g}")
  print()
  row("this project, by size of the data set", "ms per step", "s per epoch")
  row(*["---"] * 3)
  for size, seconds in result["scaling"]["num_images"].items():
    row(size, f"{seconds * 1e3:.3g}", f"{seconds * int(size) / 100:.3g}")


@figures.styled
def draw(results: list[dict[str, Any]]) -> figure.Figure:
  """Draws the rates at batch size 100 as bars, a row for each machine."""
  picture = figure.Figure(
    figsize=(10, 3.2 * len(results)), layout="constrained"
  )
  for row, result in zip(
    picture.subfigures(len(results), squeeze=False)[:, 0], results, strict=True
  ):
    programs = result["batch_size"]["100"]
    machine = result["machine"]
    title = f"{_hardware(machine)}, jax {machine['versions']['jax']}"
    row.suptitle(title, fontsize="medium")
    for axes, kind, title in zip(
      row.subplots(1, 2, sharey=True),
      ("train", "evaluate"),
      ("training steps/s, batch 100", "evaluation images/s"),
      strict=True,
    ):
      names = [name for name in programs if kind in programs[name]]
      rates = [1 / programs[name][kind]["seconds"] for name in names]
      colors = ["C0" if name == THIS else "lightgray" for name in names]
      bars = axes.barh(names, rates, color=colors)
      axes.bar_label(
        bars, fmt="{:,.1f}" if kind == "train" else "{:,.0f}", padding=2
      )
      axes.xaxis.set_major_formatter("{x:,.0f}")
      axes.margins(x=0.15)
      axes.set_title(title)
      axes.grid(axis="y", visible=False)
    axes.invert_yaxis()
  return picture


def main() -> None:
  # Several programs share a GPU's memory.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rounds", type=int, default=15)
  parser.add_argument(
    "--other_batch_sizes",
    type=int,
    nargs="*",
    default=[32, 256, 1024],
    help="measured besides 100; if there are none, scaling is not measured",
  )
  parser.add_argument(
    "--tensorflow_python", help="a Python with TensorFlow 2.15"
  )
  parser.add_argument(
    "--keras_tensorflow_python", help="a Python with Keras 3 and TensorFlow"
  )
  parser.add_argument("--json", help="where to write the result")
  parser.add_argument("--picture", type=pathlib.Path, help="where to draw it")
  parser.add_argument(
    "--draw", nargs="+", metavar="JSON", help="only draw these earlier results"
  )
  args = parser.parse_args()
  if args.draw and not args.picture:
    parser.error("--draw needs --picture")
  if args.draw:
    results = [json.loads(pathlib.Path(path).read_text()) for path in args.draw]
    figures.save(draw(results), args.picture)
    return

  if not on_gpu():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # PyTorch must not use one either.
  elif not torch.cuda.is_available():
    parser.error("JAX finds a GPU but PyTorch does not; install it for CUDA")
  elif args.tensorflow_python or args.keras_tensorflow_python:
    parser.error("the programs that use TensorFlow are for a CPU")
  pythons[CUDA_GRAPHS] = sys.executable if on_gpu() else ""
  pythons[TENSORFLOW] = args.tensorflow_python
  pythons[KERAS_TENSORFLOW] = args.keras_tensorflow_python
  names = [name for name in PROGRAMS if pythons[name]]
  result = {"machine": describe_machine(), "batch_size": {}}
  for size in (100, *args.other_batch_sizes):
    times = measure(names, size, args.rounds, evaluate=size == 100)
    result["batch_size"][str(size)] = summarize(times)
  if args.other_batch_sizes:
    result["scaling"] = scaling(args.rounds)
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
  print_tables(result)
  if args.picture:
    figures.save(draw([result]), args.picture)


if __name__ == "__main__":
  main()
