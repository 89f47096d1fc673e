"""What a program prints, and how it ends after an error."""

import argparse
from collections.abc import Iterator
import contextlib
import functools
import io
import logging as python_logging
import os
import pathlib
import signal
import sys
import threading
from typing import NoReturn
import warnings

from absl import logging
import jax
import tqdm

from machine import compiling
from machine import errors

_PROJECT = pathlib.Path(__file__).resolve().parent.parent
_PATIENCE = 5  # Seconds that a failed process waits for the others to end.


@functools.cache  # Once per process, however often it trains.
def setup() -> None:
  """Shows our own messages and libraries' warnings, with only a timestamp.

  If the user has configured the level of logging, our messages go where theirs
  go.
  """
  # Threads that Orbax leaves behind after a failed read raise errors.
  sys.unraisablehook = lambda error: logging.debug("%s", error.exc_value)
  python_logging.getLogger("jax").setLevel(python_logging.WARNING)
  logging.get_absl_logger().addFilter(_is_shown)  # Orbax logs through it too.
  if (
    python_logging.getLogger().level == python_logging.WARNING
  ):  # As Python sets it.
    handler = _AboveProgressBar()
    handler.addFilter(_is_shown)
    python_logging.basicConfig(
      format="%(asctime)s %(message)s",
      datefmt="%X",
      handlers=[handler],
      force=True,  # Importing Orbax makes absl add a plain handler.
    )
  logging.set_verbosity(logging.INFO)


class _AboveProgressBar(python_logging.Handler):
  """Prints to stderr, above the progress bar if there is one."""

  def emit(self, record: python_logging.LogRecord) -> None:
    with contextlib.suppress(OSError):  # The terminal may be gone.
      tqdm.tqdm.write(self.format(record), file=sys.stderr)


def _is_shown(record: python_logging.LogRecord) -> bool:
  path = pathlib.Path(record.pathname).resolve()
  if _PROJECT in path.parents and "site-packages" not in path.parts:
    return True
  # TFDS warns about a missing package that would make it faster.
  is_advice = "tensorflow_datasets" in path.parts
  hidden = python_logging.WARNING if is_advice else python_logging.INFO
  # A library that logs a traceback raises the exception too.
  return record.levelno > hidden and not record.exc_info


def printable(text: str) -> str:
  """Escapes control characters: text may come from an untrusted file."""
  return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def complain(message: str) -> None:
  """Prints one line to stderr, starting with the program's name."""
  line = f"{pathlib.Path(sys.argv[0]).name}: {' '.join(message.split())}"
  with contextlib.suppress(OSError):  # The terminal may be gone.
    print(printable(line), file=sys.stderr)


def exit_with(message: str, status: int = 1) -> NoReturn:
  """Prints one line to stderr and exits."""
  complain(message)
  warnings.simplefilter("ignore")  # Libraries may warn at exit.
  if jax.distributed.is_initialized():
    # At exit, JAX waits minutes for processes that may wait for this one.
    end = threading.Timer(_PATIENCE, os._exit, [status])
    end.daemon = True
    end.start()
  sys.exit(status)


class Parser(argparse.ArgumentParser):
  """Prints a description as it is, and one line if the arguments are wrong."""

  def __init__(self, description: str | None, **kwargs):
    raw = argparse.RawDescriptionHelpFormatter
    super().__init__(description=description, formatter_class=raw, **kwargs)

  def error(self, message: str) -> NoReturn:
    exit_with(message)


@contextlib.contextmanager
def program() -> Iterator[None]:
  """Runs the body as a program: with our logs, cache and one-line errors."""
  setup()
  # Names may have characters that the terminal cannot encode.
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")
  compiling.cache_compilations()
  try:
    yield
    sys.stdout.flush()
  except BrokenPipeError:  # The reader, such as `head`, is gone.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)
  except (errors.UserError, OSError) as error:
    exit_with(str(error))
  except KeyboardInterrupt:
    exit_with("interrupted", 128 + signal.SIGINT)
  except jax.errors.JaxRuntimeError as error:
    if not jax.distributed.is_initialized():
      raise
    exit_with(
      "a device or another process has failed; the checkpoints are kept, and"
      f" the same command resumes the run: {error}"
    )
