"""Logs a run to the console, metrics.jsonl and TensorBoard."""

from collections.abc import Callable
from collections.abc import Iterable
from concurrent import futures
import json
import os
import pathlib
import time
from typing import IO
from typing import Any

from absl import logging
import jax
import ml_collections
import numpy as np
import tensorboardX
from tensorboardX import summary
import tqdm

import input_pipeline
from machine import processes
from report import network
from rundir import experiment
from rundir import files
from rundir import trees
import steps


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


def _make_lossy(writer: tensorboardX.SummaryWriter) -> None:
  """Keeps a writer's thread alive if its file cannot be written.

  TensorBoardX accepts another file class, but only for paths with a prefix, and
  experiment trackers would not find event files at such a path.
  """
  records = writer.file_writer.event_writer._ev_writer._py_recordio_writer
  records._writer = _LossyFile(records._writer)


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
    if self._writes and path.exists():
      _truncate(path, start_step, config.num_steps)
    self._jsonl = _LossyFile(open(path if self._writes else os.devnull, "a"))
    self._tensorboard = tensorboardX.SummaryWriter(
      str(workdir), purge_step=start_step + 1, write_to_disk=self._writes
    )
    if self._writes:
      _make_lossy(self._tensorboard)
    hparams = {
      key: value
      for key, value in config.items()
      if key not in experiment.INCIDENTAL
    }
    # add_hparams would write to a subdirectory, which looks like another run.
    for record in summary.hparams(hparams, {_tag("test_accuracy"): 0.0}):
      self._tensorboard.file_writer.add_summary(record)
    self._has_charts = False
    self._artist = futures.ThreadPoolExecutor(max_workers=1)
    self._drawing: futures.Future | None = None
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
    self._artist.shutdown()
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
    if not self._has_charts:
      self._has_charts = True
      self._add_charts(means)
    if self._bar.disable:  # Otherwise the bar shows the same.
      self._say(step, text)

  def _add_charts(self, metrics: Iterable[str]) -> None:
    """Makes TensorBoard show training and validation in one chart."""
    charts = {
      name: ["Multiline", [_tag(f"train_{name}"), _tag(f"validation_{name}")]]
      for name in metrics
    }
    self._tensorboard.add_custom_scalars({"training and validation": charts})

  def evaluation(self, step: int, split: str, means: dict[str, float]) -> None:
    """Logs the means of the metrics over a whole split."""
    self._write(step, {f"{split}_{name}": x for name, x in means.items()})
    self._say(step, _text(split, means))

  def usual_probability(self, step: int, probabilities: jax.Array) -> None:
    """Logs the probability that 98% of a split's predictions exceed."""
    usual = np.quantile(np.asarray(probabilities).max(axis=-1), 0.02)
    self._write(step, {"usual_probability": float(usual)})

  def probabilities(
    self, step: int, labels: np.ndarray, probabilities: np.ndarray
  ) -> None:
    """Logs softmax probabilities, [k, classes], of examples with labels [k]."""
    self._tensorboard.add_histogram("probabilities", probabilities, step)
    for label, row in zip(labels, probabilities, strict=True):
      self._say(step, f"label {label}: {' '.join(f'{p:.2f}' for p in row)}")

  def inside(
    self,
    step: int,
    inspect: Callable[[steps.TrainState], network.Inspection],
    state: steps.TrainState,
    data: input_pipeline.Data,
    probabilities: jax.Array,
  ) -> None:
    """Shows the inside of a network in TensorBoard; warns if that fails.

    Args:
      step: the number of steps so far.
      inspect: `network.inspect` with all arguments bound except the state.
      state: the state to inspect.
      data: the data set, with n validation examples.
      probabilities: predicted for these examples, [n, classes].
    """
    try:
      inspection = inspect(state)
      if not self._writes:  # The computation above needs all processes.
        return
      for name, norm in trees.named(jax.device_get(inspection.grad_norms)):
        self._tensorboard.add_scalar(f"weights/grad_norm/{name}", norm, step)
      # While earlier pictures are being drawn, skip all but the last step's.
      if step == self._num_steps or not self._drawing or self._drawing.done():
        learned = jax.device_get(
          (data.validation, probabilities, state.eval_params, inspection)
        )
        self._drawing = self._artist.submit(
          self._draw, step, *learned, data.class_names
        )
    except Exception as error:
      logging.warning("The network of step %d is not shown: %s", step, error)

  def _draw(self, step, examples, probabilities, params, *rest) -> None:
    """Draws pictures and writes them; runs in the artist's thread."""
    try:
      from report import tensorboard  # Takes a second, so not at startup.

      for tag, picture in tensorboard.pictures(
        examples, probabilities, params, *rest
      ):
        self._tensorboard.add_figure(tag, picture, step, close=False)
      for name, value in trees.named(params):
        self._tensorboard.add_histogram(f"weights/{name}", value, step)
    except Exception as error:  # A failed picture must not stop the run.
      logging.warning("Pictures of step %d cannot be drawn: %s", step, error)

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
  """Drops the lines that a run resumed at `step` will write again."""

  def is_kept(line):
    try:
      record = json.loads(line)
      is_final = record["step"] == num_steps and "test_loss" in record
      return record["step"] <= step and not is_final
    except (ValueError, TypeError, KeyError):  # A line that was cut off.
      return False

  lines = path.read_text(errors="replace").splitlines(keepends=True)
  files.write_text(path, "".join(filter(is_kept, lines)))
