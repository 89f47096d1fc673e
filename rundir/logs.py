"""Logs a run to the console, metrics.jsonl and TensorBoard."""

import json
import os
import pathlib
import time
from typing import IO
from typing import Any

from absl import logging
import jax
import ml_collections
from tensorboardX import SummaryWriter
from tensorboardX import summary
import tqdm

from configs import default
from machine import processes
from rundir import experiment
from rundir import files


class _LossyFile:
  """A file that warns once if it cannot be written, and then drops the rest.

  It is better to lose metrics than the run.
  """

  def __init__(self, file: IO):
    self._file = file
    self._is_lost = False

  def write(self, data: str | bytes) -> None:
    self._try(self._file.write, data)

  def flush(self) -> None:
    self._try(self._file.flush)

  def close(self) -> None:
    self._try(self._file.close)

  def _try(self, operation, *args) -> None:
    if self._is_lost:
      return
    try:
      operation(*args)
    except OSError as error:
      self._is_lost = True
      logging.warning(
        "%s cannot be written (%s): training continues without it",
        self._file.name,
        error.strerror,
      )


def open_tensorboard(
  workdir: pathlib.Path, write_to_disk: bool = True, **kwargs
) -> SummaryWriter:
  """Opens an event file whose writer survives a full disk."""
  writer = SummaryWriter(str(workdir), write_to_disk=write_to_disk, **kwargs)
  if write_to_disk:
    # Otherwise its thread would end, and closing it would wait for ever.
    # TensorBoardX accepts another file class, but only for paths with a prefix,
    # and experiment trackers would not find event files at such a path.
    records = writer.file_writer.event_writer._ev_writer._py_recordio_writer
    records._writer = _LossyFile(records._writer)
  return writer


class Logger:
  """Writes the metrics of one run; a context manager.

  Shows a progress bar on a terminal, and plain lines elsewhere. If several
  processes train together, only the first one writes.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    start_step: int,
  ):
    """Opens the files and drops their records of steps after `start_step`."""
    self._num_steps = config.num_steps
    self._batch_size = config.batch_size
    self._writes = processes.is_first()
    path = workdir / "metrics.jsonl"
    if self._writes:
      if start_step == 0:
        _set_aside(workdir)
      elif path.exists():
        _truncate(path, start_step, config.num_steps)
    self._jsonl = _LossyFile(open(path if self._writes else os.devnull, "a"))
    self._tensorboard = open_tensorboard(
      workdir, purge_step=start_step + 1, write_to_disk=self._writes
    )
    # TensorBoard shows the first few: the keys that differ from the defaults.
    defaults = default.get_config()
    keys = [key for key in config if key not in experiment.INCIDENTAL]
    keys.sort(key=lambda key: config[key] == defaults.get(key))
    hparams = {key: config[key] for key in keys}
    # add_hparams would write to a subdirectory, which looks like another run.
    for record in summary.hparams(hparams, {_tag("test_accuracy"): 0.0}):
      self._tensorboard.file_writer.add_summary(record)
    self._bar = tqdm.tqdm(
      initial=start_step,
      total=config.num_steps,
      unit=" steps",
      disable=None if self._writes else True,
      dynamic_ncols=True,
    )
    self.restart_clock(start_step)

  def __enter__(self) -> "Logger":
    return self

  def __exit__(self, *_) -> None:
    self._bar.close()
    self._tensorboard.close()
    self._jsonl.close()

  def restart_clock(self, step: int) -> None:
    """Excludes the time until now from the next steps_per_second."""
    self._clock = (step, time.perf_counter())

  def progress(self, step: int) -> None:
    """Moves the progress bar to a step."""
    self._bar.update(step - self._bar.n)

  def train(self, step: int, means: dict[str, float], learning_rate: float):
    """Logs the means of the metrics over the steps since the last log."""
    scalars = {f"train_{name}": value for name, value in means.items()}
    scalars["learning_rate"] = learning_rate
    text = _text("train", means)
    self._bar.set_postfix_str(text)
    last_step, last_time = self._clock
    self.restart_clock(step)
    if step > last_step:  # Otherwise only the first step ran, which is untimed.
      rate = (step - last_step) / (self._clock[1] - last_time)
      scalars["steps_per_second"] = rate
      scalars["images_per_second"] = rate * self._batch_size
      left = tqdm.tqdm.format_interval((self._num_steps - step) / rate)
      text += (
        f"  {rate:.1f} steps/s  {rate * self._batch_size:.0f} images/s"
        f"  {left} left"
      )
    self._write(step, scalars)
    if self._bar.disable:  # Otherwise the bar shows the same.
      self._say(step, text)

  def evaluation(self, step: int, split: str, means: dict[str, float]) -> None:
    """Logs the means of the metrics over a whole split."""
    self._write(step, {f"{split}_{name}": x for name, x in means.items()})
    self._tensorboard.flush()
    self._say(step, _text(split, means))

  def temperature(self, step: int, temperature: float) -> None:
    """Logs the temperature that calibrates the probabilities."""
    self._write(step, {"temperature": temperature})

  def probabilities(
    self, step: int, labels: jax.Array, probabilities: jax.Array
  ) -> None:
    """Logs softmax probabilities, [k, classes], of examples with labels [k]."""
    labels, probabilities = jax.device_get((labels, probabilities))
    self._tensorboard.add_histogram("probabilities", probabilities, step)
    for label, row in zip(labels, probabilities, strict=True):
      self._say(step, f"label {label}: {' '.join(f'{p:.2f}' for p in row)}")

  def _write(self, step: int, scalars: dict[str, Any]) -> None:
    self._jsonl.write(json.dumps({"step": step, **scalars}) + "\n")
    self._jsonl.flush()
    for key, value in scalars.items():
      self._tensorboard.add_scalar(_tag(key), value, step)

  def _say(self, step: int, text: str) -> None:
    width = len(str(self._num_steps))
    logging.info("step %*d/%d  %s", width, step, self._num_steps, text)


def _tag(key: str) -> str:
  """Returns a scalar's tag; TensorBoard groups by what precedes the slash."""
  split, _, metric = key.partition("_")
  if split in ("train", "validation", "test"):
    return f"{metric}/{split}"
  return f"training/{key}"


def _text(split: str, means: dict[str, float]) -> str:
  return "  ".join(f"{split} {name} {x:.4f}" for name, x in means.items())


def _truncate(path: pathlib.Path, step: int, num_steps: int) -> None:
  """Drops the records that a run resumed at `step` will write again."""
  kept = [
    json.dumps(record) + "\n"
    for record in files.read_metrics(path.parent)
    if record["step"] <= step
    and not (record["step"] == num_steps and "test_loss" in record)
  ]
  files.write_text(path, "".join(kept))


def _set_aside(workdir: pathlib.Path) -> None:
  """Keeps the records of a run whose checkpoints are gone."""
  for path in (workdir / "metrics.jsonl", workdir / "result.json"):
    if path.exists() and path.stat().st_size:
      moved = files.set_aside(path, workdir / "before_restart")
      logging.warning(
        "%s has no checkpoint, so training starts over; moved its %s to %s",
        *(workdir, path.name, moved),
      )
