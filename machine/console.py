"""What a program says on a terminal, and how it ends over a mistake."""

import argparse
from collections.abc import Iterator
import contextlib
import functools
import logging as python_logging
import os
import pathlib
import signal
import sys
import threading
from typing import NoReturn
import warnings

from absl import app
from absl import logging
import jax
import tqdm

_PROJECT = pathlib.Path(__file__).resolve().parent.parent
_PATIENCE = 5  # Seconds that a failed process waits for others to fail too.


@functools.cache  # Once in a process, however often it trains.
def setup() -> None:
  """Shows our own messages and everybody's warnings, with the time alone.

  If the user has configured logging, our messages go where theirs go instead.
  """
  sys.unraisablehook = _log_unraisable
  python_logging.getLogger("jax").setLevel(python_logging.WARNING)
  logging.get_absl_logger().addFilter(_is_shown)  # Orbax logs through it too.
  root = python_logging.getLogger()
  if not _is_configured(root):
    handler = _AboveProgressBar()
    handler.setFormatter(
      python_logging.Formatter("%(asctime)s %(message)s", "%X")
    )
    handler.addFilter(_is_shown)
    root.handlers[:] = [handler]
  logging.set_verbosity(logging.INFO)


class _AboveProgressBar(python_logging.Handler):
  """Prints to stderr, where a progress bar may be on the last line."""

  def emit(self, record: python_logging.LogRecord) -> None:
    with contextlib.suppress(OSError):  # The terminal is gone: go on.
      tqdm.tqdm.write(self.format(record), file=sys.stderr)


def _is_configured(root: python_logging.Logger) -> bool:
  """Returns whether the root logger is the user's, not as imports leave it."""
  return root.level != python_logging.WARNING or any(
    # While Orbax is imported, absl adds such a handler if there is none.
    type(handler) is not python_logging.StreamHandler
    or handler.stream is not sys.stderr
    for handler in root.handlers
  )


def _is_shown(record: python_logging.LogRecord) -> bool:
  path = pathlib.Path(record.pathname).resolve()
  if _is_ours(path):
    return True
  # TFDS warns that a package is missing that would make it faster.
  is_advice = "tensorflow_datasets" in path.parts
  hidden = python_logging.WARNING if is_advice else python_logging.INFO
  # What libraries log with a traceback they raise too.
  return record.levelno > hidden and not record.exc_info


def _is_ours(path: pathlib.Path) -> bool:
  """Returns whether a file is this project's, not of packages in its folder."""
  return _PROJECT in path.parents and "site-packages" not in path.parts


def _log_unraisable(unraisable) -> None:
  """Of threads and coroutines that Orbax leaves behind where a read fails."""
  logging.debug("Ignored: %s", unraisable.exc_value)


def printable(text: str) -> str:
  """Keeps the escape sequences of a stranger's file from the terminal."""
  return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
  """Keeps stdout for the result: what libraries print goes to stderr."""
  sys.stdout.flush()
  stdout = os.dup(1)
  os.dup2(2, 1)
  try:
    yield
  finally:
    sys.stdout.flush()
    os.dup2(stdout, 1)
    os.close(stdout)


def complain(message: str) -> None:
  """Prints one line on stderr, with the program's name."""
  line = f"{pathlib.Path(sys.argv[0]).name}: {' '.join(message.split())}"
  with contextlib.suppress(OSError):  # The terminal may be gone.
    print(printable(line), file=sys.stderr)


def exit_with(message: str, status: int = 1) -> NoReturn:
  """Ends the program with one line on stderr."""
  complain(message)
  warnings.simplefilter("ignore")  # What libraries say while they are ended.
  if jax.distributed.is_initialized():
    # At its exit JAX waits minutes for the others, who may wait for this one.
    end = threading.Timer(_PATIENCE, os._exit, [status])
    end.daemon = True
    end.start()
  sys.exit(status)


class Parser(argparse.ArgumentParser):
  """Ends the program with one line over a mistake in the arguments."""

  def error(self, message: str) -> NoReturn:
    exit_with(message)


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
