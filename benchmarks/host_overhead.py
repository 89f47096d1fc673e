"""Measures where the host's time goes if the steps themselves take no time.

    python benchmarks/host_overhead.py --json=docs/host_overhead.json

Runs the loop for accelerators at the cadence of configs/default.py, with steps
and evaluations that compute nothing. The time that remains is what a fast
device would wait for. Compilation, everything before the first step, and
everything after the last step (the last checkpoint and the pictures) are
counted separately.
"""

import argparse
import collections
from collections.abc import Callable
import contextlib
import json
import pathlib
import sys
import tempfile
import threading
import time
from typing import Any
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax  # noqa: E402

from configs import default  # noqa: E402
import input_pipeline  # noqa: E402
from machine import compiling  # noqa: E402
from rundir import checkpoints  # noqa: E402
from rundir import logs  # noqa: E402
import steps  # noqa: E402
import train  # noqa: E402


def no_step(training, examples, order_rng, dropout_rng, **static):
  """Replaces a training step; only counts steps and examples."""
  del examples, order_rng, dropout_rng
  state = training.state.replace(step=training.state.step + 1)
  metrics = training.metrics.replace(
    num_examples=training.metrics.num_examples + static["batch_size"],
  )
  return training.replace(state=state, metrics=metrics)


def no_evaluation(carry, state, examples, *, batch_size):
  del state, examples
  start, logits = carry
  return start + batch_size, logits


class Clock:
  """Adds up the seconds spent in functions, by kind."""

  def __init__(self):
    self.seconds = collections.Counter()
    jax.monitoring.register_event_duration_secs_listener(self._on_compiling)

  def _on_compiling(self, event: str, seconds: float, **_) -> None:
    if event.startswith("/jax/core/compile/"):
      self.seconds["compile"] += seconds

  def timed(self, kind: str, function: Callable) -> Callable:
    """Wraps a function to add its time to a kind.

    Time that was added to any kind while the function ran is not added again.
    """

    def call(*args, **kwargs):
      if threading.current_thread() is not threading.main_thread():
        return function(*args, **kwargs)
      others, start = self.seconds.total(), time.perf_counter()
      try:
        return function(*args, **kwargs)
      finally:
        seconds = time.perf_counter() - start
        self.seconds[kind] += seconds - (self.seconds.total() - others)

    return call


def measure(num_steps: int) -> dict[str, Any]:
  """Runs the loop and returns the seconds spent on each kind of work."""
  config = default.get_config()
  config.num_steps = num_steps
  clock, times = Clock(), {}
  jit_loop = compiling.jit_loop
  logger, manager = logs.Logger, checkpoints.Manager
  wait = manager.wait

  def timed_jit_loop(step, **static):
    run = jit_loop(step, **static)
    dispatch = clock.timed("dispatches of steps", run)

    def call(carry, *args):
      if not isinstance(carry, steps.Training):
        return run(carry, *args)
      if "start" in times:
        return dispatch(carry, *args)
      carry = jax.block_until_ready(run(carry, *args))
      times["start"] = time.perf_counter()
      clock.seconds.clear()
      return carry

    return call

  def end_loop(self):
    if "end" not in times:
      times["end"] = time.perf_counter()
      times["kinds"] = dict(clock.seconds)
    wait(self)

  patches = [
    (jax, "default_backend", lambda: "tpu"),
    (compiling, "jit_loop", timed_jit_loop),
    (steps, "train_on_next_batch", no_step),
    (steps, "eval_on_next_batch", no_evaluation),
    (jax, "device_get", clock.timed("fetches", jax.device_get)),
    (manager, "save", clock.timed("saves", manager.save)),
    (manager, "wait", end_loop),
    (logger, "train", clock.timed("logs", logger.train)),
    (logger, "evaluation", clock.timed("logs", logger.evaluation)),
  ]
  with (
    contextlib.ExitStack() as stack,
    tempfile.TemporaryDirectory() as folder,
  ):
    for patch in patches:
      stack.enter_context(mock.patch.object(*patch))
    start = time.perf_counter()
    train.train_and_evaluate(config, pathlib.Path(folder, "run"))
    end = time.perf_counter()
  kinds = times["kinds"]
  in_loop = times["end"] - times["start"]
  return {
    "seconds_before_the_loop": times["start"] - start,
    "seconds_in_the_loop": in_loop - kinds["compile"],
    "seconds_after_the_loop": end - times["end"],
    "of_the_loop": {**kinds, "rest": in_loop - sum(kinds.values())},
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--num_steps", type=int, default=20_000)
  parser.add_argument("--json", help="where to write the result")
  args = parser.parse_args()
  input_pipeline.load(default.get_config())  # Prepares the data if needed.
  result = {"num_steps": args.num_steps, **measure(args.num_steps)}
  print(json.dumps(result, indent=2))
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  main()
