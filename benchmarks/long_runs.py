"""Checks that a long run neither leaks memory nor slows down.

    python benchmarks/long_runs.py --json=docs/long_runs.json

First measures, with steps of the default size, how much time a checkpoint costs
the training loop. Then trains for 100,000 tiny steps at the default cadence of
logs, validations, pictures and checkpoints, compares the memory and the time
per step of steps 5,000 to 10,000 with those of the last 5,000, and measures the
sizes of the files.
"""

import argparse
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

import jax

PROJECT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from configs import default  # noqa: E402
import input_pipeline  # noqa: E402
from machine import compiling  # noqa: E402
from machine import devices  # noqa: E402
from rundir import checkpoints  # noqa: E402
from rundir import files  # noqa: E402
from rundir import runs  # noqa: E402
import steps  # noqa: E402

_TINY = {
  "train_split": "train[5000:6000]",
  "validation_split": "train[:100]",
  "test_split": "test[:100]",
  "batch_size": 4,
}


def resident_mebibytes(pid: int) -> float:
  status = pathlib.Path(f"/proc/{pid}/status").read_text()
  return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def long_run(folder: pathlib.Path, num_steps: int) -> dict[str, float]:
  """Compares the early steps of a long run of tiny steps with the last ones."""
  flags = {**_TINY, "num_steps": num_steps}
  process = subprocess.Popen(
    [
      *(sys.executable, str(PROJECT / "train.py"), f"--workdir={folder}"),
      *(f"--config.{key}={value}" for key, value in flags.items()),
    ],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  memory = {}
  assert process.stderr is not None
  for line in process.stderr:
    if match := re.search(r"step +(\d+)/\d+ +train loss", line):
      memory[int(match[1])] = resident_mebibytes(process.pid)
  if process.wait():
    raise RuntimeError("train.py failed")
  records = files.read_metrics(folder)
  ms = {
    record["step"]: 1000 / record["steps_per_second"]
    for record in records
    if "steps_per_second" in record
  }
  tenth = num_steps // 10

  def compared(values):
    # Both parts come after the first validation, which compiles more code.
    first = [x for step, x in values.items() if tenth // 2 < step <= tenth]
    last = [x for step, x in values.items() if step > num_steps - tenth // 2]
    first, last = statistics.median(first), statistics.median(last)
    return {"first": first, "last": last, "ratio": last / first}

  events = sum(p.stat().st_size for p in folder.glob("events.out.tfevents.*"))
  return {
    "steps": num_steps,
    "resident_mebibytes": compared(memory),
    "ms_per_step": compared(ms),
    "metrics_jsonl_megabytes": (folder / "metrics.jsonl").stat().st_size / 1e6,
    "tensorboard_megabytes": events / 1e6,
    "checkpoints_megabytes": sum(
      p.stat().st_size for p in folder.glob("checkpoints/**/*") if p.is_file()
    )
    / 1e6,
  }


def cost_of_saving(folder: pathlib.Path, rounds: int) -> dict[str, float]:
  """Measures steps of the default size with and without a checkpoint."""
  config = default.get_config()
  data = input_pipeline.load(config)
  image_shape = data.train.image_shape
  init_rng, order_rng, dropout_rng = jax.random.split(jax.random.key(0), 3)
  state = runs.create_state(init_rng, config, image_shape, data.class_names)
  order = input_pipeline.order_at(
    order_rng, 0, config.batch_size, data.train.labels.size
  )
  training = devices.replicate(
    steps.Training(state, order, steps.Metrics.zero(10))
  )
  train_steps = compiling.jit_loop(
    steps.train_on_next_batch, batch_size=config.batch_size
  )

  num_steps = 20  # Enough to outlast a checkpoint in the background.
  seconds: dict[bool, list[float]] = {False: [], True: []}
  blocked = []
  with checkpoints.open_manager(folder, 0) as manager:
    for index in range(2 * rounds + 1):
      saves = index % 2 == 0
      start = time.perf_counter()
      if saves:
        manager.save(
          int(training.state.step) + 1,
          training.state.replace(step=training.state.step + 1),
          training.metrics,
          None,
        )
        blocked.append(time.perf_counter() - start)
      for _ in range(num_steps):
        training = train_steps(training, 1, data.train, order_rng, dropout_rng)
      jax.block_until_ready(training)
      if index:  # The first round includes compilation.
        seconds[saves].append(time.perf_counter() - start)
      manager.wait()
  step = statistics.median(seconds[False]) / num_steps
  extra = statistics.median(
    with_save - without
    for without, with_save in zip(seconds[False], seconds[True], strict=True)
  )
  every = config.checkpoint_every_steps
  return {
    "rounds": rounds,
    "seconds_per_step": step,
    "seconds_blocked_by_a_checkpoint": statistics.median(blocked[1:]),
    "extra_seconds_of_a_checkpoint": extra,
    "share_of_the_loop": extra / (every * step),
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--steps", type=int, default=100_000)
  parser.add_argument("--rounds", type=int, default=15)
  parser.add_argument(
    "--json", type=pathlib.Path, help="where to write the result"
  )
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as scratch:
    result = {
      "cost_of_saving": cost_of_saving(pathlib.Path(scratch, "a"), args.rounds),
      "long_run": long_run(pathlib.Path(scratch, "b"), args.steps),
    }
  print(json.dumps(result, indent=2))
  if args.json:
    files.write_json(args.json, result)


if __name__ == "__main__":
  main()
