"""Runs the programs in processes that have already imported their libraries.

Reads JSON objects, one per line. For each, forks, runs a program and prints its
exit status. Starting Python each time would take minutes for a hundred tests.
"""

import json
import os
import pathlib
import runpy
import sys
import traceback

PROJECT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

from ml_collections import config_flags  # noqa: E402, F401

import compare  # noqa: E402, F401
import evaluate  # noqa: E402, F401
import export  # noqa: E402, F401
import predict  # noqa: E402, F401
import train  # noqa: E402, F401


def run(
  argv: list[str],
  cwd: str,
  environment: dict[str, str],
  stdin: str,
  stdout: str,
  stderr: str,
) -> int:
  """Runs a program as `python PROGRAM ARGUMENTS` would.

  Args:
    argv: the program, relative to the project, and its arguments.
    cwd: the working directory.
    environment: variables to set.
    stdin: the file to use as standard input.
    stdout: the file to use as standard output; "" is a pipe without a reader.
    stderr: the same for standard error.

  Returns:
    The exit status.
  """
  for number, path in enumerate((stdin, stdout, stderr)):
    if path:
      os.dup2(os.open(path, os.O_RDWR), number)
    else:
      reader, writer = os.pipe()
      os.close(reader)
      os.dup2(writer, number)
  os.environ.update(environment)
  os.chdir(cwd)
  sys.argv = [str(PROJECT / argv[0]), *argv[1:]]
  try:
    runpy.run_path(sys.argv[0], run_name="__main__")
  except SystemExit as error:
    if isinstance(error.code, str):
      print(error.code, file=sys.stderr)
    return error.code if isinstance(error.code, int) else int(bool(error.code))
  except BaseException:
    traceback.print_exc()
    return 1
  return 0


def main() -> None:
  for line in sys.stdin:
    if pid := os.fork():
      _, status = os.waitpid(pid, 0)
      print(os.waitstatus_to_exitcode(status), flush=True)
    else:
      status = 1
      try:
        status = run(**json.loads(line))
      finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
  main()
