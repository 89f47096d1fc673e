"""What a run says: console, progress bar, metrics.jsonl and TensorBoard."""

from collections.abc import Iterator
from collections.abc import Sequence
from concurrent import futures
import contextlib
import json
import logging as python_logging
import os
import pathlib
import signal
import sys
import threading
import time
from typing import Any
from typing import NoReturn
import warnings

from absl import app
from absl import flags
from absl import logging
import jax
import ml_collections
import numpy as np
import tensorboardX
from tensorboardX import record_writer
from tensorboardX import summary
import tqdm

import input_pipeline
import processes
import steps
import workdir as workdir_lib

_PROJECT = pathlib.Path(__file__).resolve().parent
_PATIENCE = 5  # Seconds that a failed process waits for others to fail too.


def setup_console() -> None:
  """Shows our own messages and everybody's warnings, with the time alone."""
  if not flags.FLAGS.is_parsed():  # absl would warn of that.
    flags.FLAGS.mark_as_parsed()
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  sys.unraisablehook = _log_unraisable
  python_logging.getLogger("jax").setLevel(python_logging.WARNING)
  handler = logging.get_absl_handler()
  handler.setFormatter(
    python_logging.Formatter("%(asctime)s %(message)s", "%X")
  )
  handler.addFilter(
    lambda record: (
      pathlib.Path(record.pathname).resolve().parent == _PROJECT
      # What libraries log with a traceback they raise too.
      or (record.levelno > python_logging.INFO and not record.exc_info)
    )
  )


def _log_unraisable(unraisable) -> None:
  """Of threads and coroutines that Orbax leaves behind where a read fails."""
  logging.debug("Ignored: %s", unraisable.exc_value)


def printable(text: str) -> str:
  """Keeps the escape sequences of a stranger's file from the terminal."""
  return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def exit_with(message: str, status: int = 1) -> NoReturn:
  """Ends the program with one line on stderr."""
  line = f"{pathlib.Path(sys.argv[0]).name}: {' '.join(message.split())}"
  print(printable(line), file=sys.stderr)
  warnings.simplefilter("ignore")  # What libraries say while they are ended.
  if jax.distributed.is_initialized():
    # At its exit JAX waits minutes for the others, who may wait for this one.
    end = threading.Timer(_PATIENCE, os._exit, [status])
    end.daemon = True
    end.start()
  sys.exit(status)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
  """Ends the program with one line over a mistake of the user or a fault."""
  try:
    yield
    sys.stdout.flush()
  except BrokenPipeError:  # `| head` has seen enough.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)
  except (app.UsageError, OSError) as error:
    exit_with(str(error))
  except KeyboardInterrupt:
    exit_with("interrupted", 128 + signal.SIGINT)
  except jax.errors.JaxRuntimeError as error:
    if not jax.distributed.is_initialized():
      raise
    exit_with(
      "a device or another process has failed; the checkpoints are kept, and"
      f" the same command resumes: {error}"
    )


class _LossyFile:
  """A file that warns once when it cannot be written, and then drops the rest.

  Metrics are worth less than the run. TensorBoardX takes it for a file too; its
  own thread would end, and the training wait for it.
  """

  def __init__(self, path: str | os.PathLike, mode: str):
    self._file = open(path, mode)
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


class _LossyFiles:
  """TensorBoardX's way of opening files, of paths that begin with `lossy:`."""

  def open(self, path: str) -> _LossyFile:
    return _LossyFile(path.removeprefix("lossy:"), "wb")

  def directory_check(self, path: str) -> None:
    """The run directory exists."""


record_writer.register_writer_factory("lossy", _LossyFiles())


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
      _truncate(path, start_step)
    self._jsonl = _LossyFile(path if self._writes else os.devnull, "a")
    self._tensorboard = tensorboardX.SummaryWriter(
      f"lossy:{workdir}",
      purge_step=start_step + 1,
      write_to_disk=self._writes,
    )
    # Not add_hparams: it writes to a subdirectory, a run of its own.
    for record in summary.hparams(config.to_dict(), {"test_accuracy": 0.0}):
      self._tensorboard.file_writer.add_summary(record)
    self._artist = futures.ThreadPoolExecutor(max_workers=1)
    self._drawing = None
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
    """Logs the means of loss and accuracy over the steps since the last log."""
    scalars = {
      "train_loss": means["loss"],
      "train_accuracy": means["accuracy"],
      "learning_rate": learning_rate,
    }
    text = f"loss {means['loss']:.4f}  accuracy {means['accuracy']:.4f}"
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
    if self._bar.disable:  # Else the bar says the same.
      self._say(step, text)

  def evaluation(self, step: int, split: str, means: dict[str, float]) -> None:
    """Logs the mean loss and the accuracy on a whole split."""
    self._write(step, {f"{split}_{key}": means[key] for key in means})
    self._say(
      step,
      f"{split} loss {means['loss']:.4f}  accuracy {means['accuracy']:.4f}",
    )

  def probabilities(
    self, step: int, labels: np.ndarray, probabilities: np.ndarray
  ) -> None:
    """Logs softmax probabilities, [k, classes], of examples of [k] labels."""
    self._tensorboard.add_histogram("probabilities", probabilities, step)
    for label, row in zip(labels, probabilities, strict=True):
      self._say(step, f"label {label}: {' '.join(f'{p:.2f}' for p in row)}")

  def grad_norms(self, step: int, norms: dict[str, dict[str, float]]) -> None:
    """Logs the norm of the gradient of each parameter, for TensorBoard."""
    for layer, values in norms.items():
      for name, norm in values.items():
        tag = f"grad_norm/{layer}/{name}"
        self._tensorboard.add_scalar(tag, norm, step)

  def can_draw(self) -> bool:
    """Returns whether no earlier pictures are still being drawn."""
    return self._writes and (self._drawing is None or self._drawing.done())

  def pictures(
    self,
    step: int,
    examples: input_pipeline.Examples,
    probabilities: np.ndarray,
    params: dict[str, dict[str, np.ndarray]],
    inspection: steps.Inspection,
    class_names: Sequence[str],
  ) -> None:
    """Shows TensorBoard what the network learned, drawn while training goes on.

    Args:
      step: the number of steps so far.
      examples: of the validation split, n.
      probabilities: of the examples, [n, classes].
      params: those that were evaluated.
      inspection: of the network.
      class_names: of the labels.
    """
    if not self._writes:
      return
    self._drawing = self._artist.submit(  # Its one thread draws in turn.
      self._draw, step, examples, probabilities, params, inspection, class_names
    )

  def _draw(
    self, step, examples, probabilities, params, inspection, class_names
  ) -> None:
    try:
      for tag, picture in _draw_pictures(
        examples, probabilities, params, inspection, class_names
      ).items():
        self._tensorboard.add_figure(tag, picture, step, close=False)
      for layer, values in params.items():
        for name, value in values.items():
          tag = f"params/{layer}/{name}"
          self._tensorboard.add_histogram(tag, value, step)
    except Exception as error:  # No picture is worth the run.
      logging.warning("No pictures of step %d: %s", step, error)

  def _write(self, step: int, scalars: dict[str, Any]) -> None:
    self._jsonl.write(json.dumps({"step": step, **scalars}) + "\n")
    self._jsonl.flush()
    for key, value in scalars.items():
      self._tensorboard.add_scalar(key, value, step)

  def _say(self, step: int, text: str) -> None:
    line = f"step {step:{len(str(self._num_steps))}}/{self._num_steps}  {text}"
    if self._bar.disable:
      logging.info("%s", line)
    else:
      self._bar.write(line, file=self._bar.fp)


def _draw_pictures(examples, probabilities, params, inspection, class_names):
  """The figures that TensorBoard shows, by tag."""
  from sklearn import metrics

  import pictures  # These two take a second: not at the start.

  matrix = metrics.confusion_matrix(
    examples.labels,
    probabilities.argmax(axis=1),
    labels=range(len(class_names)),
  )
  deformed = {}
  if inspection.deformed is not None:
    deformed["augmentation"] = pictures.deformations(
      inspection.originals, inspection.deformed
    )
  return {
    **deformed,
    "confusion_matrix": pictures.confusion_matrix(matrix, class_names),
    "mistakes": pictures.mistakes(
      examples.unflatten(examples.images),
      examples.labels,
      probabilities,
      class_names,
      count=10,
    ),
    "filters": pictures.filters(params["conv1"]["kernel"]),
    "activations": pictures.activations(
      inspection.image,
      inspection.layers,
      inspection.probabilities,
      class_names,
    ),
  }


def _truncate(path: pathlib.Path, step: int) -> None:
  """Keeps the lines that a run restored at `step` will not write again."""

  def is_kept(line):
    try:
      record = json.loads(line)
    except ValueError:  # The process ended while it wrote this.
      return False
    return record["step"] <= step and "test_loss" not in record

  lines = path.read_text().splitlines(keepends=True)
  workdir_lib.write_text(path, "".join(filter(is_kept, lines)))
