"""What a run says: console, progress bar, metrics.jsonl and TensorBoard."""

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
  """A file that warns once when it cannot be written, and then drops the rest.

  Metrics are worth less than the run.
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
        "%s cannot be written (%s): training goes on without it",
        self._file.name,
        error.strerror,
      )


def _make_lossy(writer: tensorboardX.SummaryWriter) -> None:
  """Lets a writer's thread go on when its file cannot be written.

  TensorBoardX knows other files by the prefix of their path, but with a prefix
  the trackers that follow a run by its event files would not find them.
  """
  records = writer.file_writer.event_writer._ev_writer._py_recordio_writer
  records._writer = _LossyFile(records._writer)


class Logger:
  """Writes the metrics of one run; a context manager.

  On a terminal there is a progress bar; elsewhere there are plain lines. Of
  several processes, the first one alone writes.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    start_step: int,
  ):
    """Opens the files, and drops what they say of steps after `start_step`."""
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
    # Not add_hparams: it writes to a subdirectory, a run of its own.
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
    """Leaves the time until now out of the next steps per second."""
    self._clock = (step, time.perf_counter())

  def progress(self, step: int) -> None:
    """Moves the progress bar."""
    self._bar.update(step - self._bar.n)

  def train(self, step: int, means: dict[str, float], learning_rate: float):
    """Logs the means of the metrics over the steps since the last log."""
    scalars = {f"train_{name}": value for name, value in means.items()}
    scalars["learning_rate"] = learning_rate
    text = _text("train", means)
    self._bar.set_postfix_str(text)
    last_step, last_time = self._clock
    self.restart_clock(step)
    if step > last_step:  # The first step alone has no time of its own.
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
    if self._bar.disable:  # Else the bar says the same.
      self._say(step, text)

  def _add_charts(self, metrics: Iterable[str]) -> None:
    """Lets TensorBoard show training and validation in one chart."""
    charts = {
      name: ["Multiline", [_tag(f"train_{name}"), _tag(f"validation_{name}")]]
      for name in metrics
    }
    self._tensorboard.add_custom_scalars({"training and validation": charts})

  def evaluation(self, step: int, split: str, means: dict[str, float]) -> None:
    """Logs the means of the metrics on a whole split."""
    self._write(step, {f"{split}_{name}": x for name, x in means.items()})
    self._say(step, _text(split, means))

  def usual_probability(self, step: int, probabilities: jax.Array) -> None:
    """Logs what 98 % of the most probable classes of a split exceed."""
    usual = np.quantile(np.asarray(probabilities).max(axis=-1), 0.02)
    self._write(step, {"usual_probability": float(usual)})

  def probabilities(
    self, step: int, labels: np.ndarray, probabilities: np.ndarray
  ) -> None:
    """Logs softmax probabilities, [k, classes], of examples of [k] labels."""
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
    """Shows TensorBoard the inside of a network; what fails is a warning.

    Args:
      step: the number of steps so far.
      inspect: what to look at it with.
      state: of the network.
      data: with the validation split, n.
      probabilities: of that split, [n, classes].
    """
    try:
      inspection = inspect(state)
      if not self._writes:  # All processes had to compute it.
        return
      for name, norm in trees.named(jax.device_get(inspection.grad_norms)):
        self._tensorboard.add_scalar(f"weights/grad_norm/{name}", norm, step)
      # Skipped while earlier pictures are being drawn; the last ones never are.
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
    """Draws pictures, in the artist's thread, and writes them."""
    try:
      from report import tensorboard  # Takes a second: not at the start.

      for tag, picture in tensorboard.pictures(
        examples, probabilities, params, *rest
      ):
        self._tensorboard.add_figure(tag, picture, step, close=False)
      for name, value in trees.named(params):
        self._tensorboard.add_histogram(f"weights/{name}", value, step)
    except Exception as error:  # No picture is worth the run.
      logging.warning("No pictures of step %d: %s", step, error)

  def _write(self, step: int, scalars: dict[str, Any]) -> None:
    self._jsonl.write(json.dumps({"step": step, **scalars}) + "\n")
    self._jsonl.flush()
    for key, value in scalars.items():
      self._tensorboard.add_scalar(_tag(key), value, step)

  def _say(self, step: int, text: str) -> None:
    width = len(str(self._num_steps))
    logging.info("step %*d/%d  %s", width, step, self._num_steps, text)


def _tag(key: str) -> str:
  """Returns TensorBoard's name of a scalar: it groups by what is before a /."""
  split, _, metric = key.partition("_")
  if split in ("train", "validation", "test"):
    return f"{metric}/{split}"
  return f"training/{key}"


def _text(split: str, means: dict[str, float]) -> str:
  return "  ".join(f"{split} {name} {x:.4f}" for name, x in means.items())


def _truncate(path: pathlib.Path, step: int, num_steps: int) -> None:
  """Keeps the lines that a run restored at `step` will not write again."""

  def is_kept(line):
    try:
      record = json.loads(line)
      is_final = record["step"] == num_steps and "test_loss" in record
      return record["step"] <= step and not is_final
    except (ValueError, TypeError, KeyError):  # Its process ended meanwhile.
      return False

  lines = path.read_text(errors="replace").splitlines(keepends=True)
  files.write_text(path, "".join(filter(is_kept, lines)))
