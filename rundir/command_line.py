"""The command line of train.py: options, help and error messages."""

import argparse
from collections.abc import Iterable
from collections.abc import Mapping
import difflib
import inspect
import os
import pathlib
import re
import runpy
import textwrap
import traceback
from typing import Any

from absl import flags
import ml_collections
from ml_collections import config_flags

from configs import default
from machine import console
from machine import errors
from rundir import experiment
from rundir import files

_CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
_OPTIONS: dict[str, dict[str, Any]] = {
  "config": dict(
    metavar="FILE",
    default=str(_CONFIGS / "default.py"),
    help="the experiment (default: configs/default.py)",
  ),
  "workdir": dict(
    metavar="DIR",
    help="the run directory (default: runs/ plus the experiment's name)",
  ),
  "profile": dict(
    action="store_true",
    help="trace the steps between the first two logs, for TensorBoard's profile"
    " plugin and ui.perfetto.dev",
  ),
  "flagfile": dict(metavar="FILE", help="a file of options, one per line"),
  "coordinator_address": dict(
    metavar="HOST:PORT",
    help="the address where process 0 listens; see docs/scaling.md",
  ),
  "num_processes": dict(
    metavar="N", type=int, help="the number of processes that train together"
  ),
  "process_id": dict(
    metavar="N", type=int, help="the index of this process, from 0"
  ),
}


def parse(argv: list[str], description: str) -> argparse.Namespace:
  """Parses the command line; given --help, prints the help and exits.

  Args:
    argv: the program and its arguments.
    description: what the program does; the help starts with it.

  Returns:
    The options. `config` is the config with its overrides; `workdir` is named
    after the experiment, unless it was given.

  Raises:
    errors.UserError: if an argument is wrong; the message says what it must be.
  """
  parser = console.Parser(
    usage="%(prog)s [--config=FILE] [--config.KEY=VALUE ...]"
    " [--OPTION=VALUE ...]",
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  for name, option in _OPTIONS.items():
    parser.add_argument(f"--{name}", **option)
  try:
    arguments = flags.FlagValues().read_flags_from_files(argv[1:])
  except flags.Error as error:
    raise errors.UserError(str(error).removeprefix("ERROR:: ")) from error
  if {"-h", "--help"} & {*arguments}:
    parser.epilog = f"{_describe_keys()}\n\n{_describe_presets()}"
  args, overrides = parser.parse_known_args(arguments)
  path, base = args.config, load_config(args.config)
  args.config = _override(base, overrides)
  args.workdir = args.workdir or pathlib.Path("runs") / experiment.name(
    args.config, base, pathlib.Path(path).stem
  )
  return args


def load_config(path: str) -> ml_collections.ConfigDict:
  """Loads a config file.

  Raises:
    errors.UserError: if the file is wrong; the message names it and says why.
  """
  file = str(files.local_path(path))
  if not os.path.isfile(file):
    raise errors.UserError(
      f"--config={path}: no such file; {_preset_like(path)}"
    )
  try:
    get_config = runpy.run_path(file).get("get_config")
    if not callable(get_config):
      raise errors.UserError("has no function get_config")
    config = get_config()
    if not isinstance(config, ml_collections.ConfigDict):
      raise errors.UserError(
        f"get_config returns {config!r:.40}; it must return a ConfigDict"
      )
    experiment.check_keys(config)
  except errors.UserError as error:
    raise errors.UserError(f"--config={path}: {error}") from error
  except Exception as error:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    where = f"line {lines[-1]}: " if lines else ""
    # A ConfigDict's errors list all of its keys.
    what = textwrap.shorten(str(error), 200)
    raise errors.UserError(
      f"--config={path}: {where}{type(error).__name__}: {what}"
    ) from error
  return config


def _preset_like(path: str) -> str:
  """Suggests a preset for the path of a file that does not exist."""
  presets = {preset.stem: os.path.relpath(preset) for preset in _presets()}
  return _hint(
    pathlib.Path(path).stem,
    {stem: f"--config={preset}" for stem, preset in presets.items()},
    f"the presets are {', '.join(presets.values())}",
  )


def _override(
  base: ml_collections.ConfigDict, arguments: list[str]
) -> ml_collections.ConfigDict:
  """Returns a config with the overrides --config.KEY=VALUE applied."""
  config = base.copy_and_resolve_references()
  for argument in arguments:
    match = re.match(r"--?(?:no)?config\.(\w*)", argument)
    if match and match[1] not in config:
      keys = {key: f"config.{key}" for key in config}
      hint = _hint(match[1], keys, f"the keys are {', '.join(keys)}")
      raise errors.UserError(f"unknown key config.{match[1]}; {hint}")
  values = flags.FlagValues()
  try:
    config_flags.DEFINE_config_dict(
      "config", config, flag_values=values, sys_argv=arguments
    )
    unexpected = values(["", *arguments])[1:]
  except flags.UnrecognizedFlagError as error:
    unexpected = [error.flagvalue]
  except flags.Error as error:
    message = str(error).removeprefix("flag ").replace("\n", " ")
    message = re.sub(": invalid literal.*", ": must be an integer", message)
    message = re.sub(": could not convert.*", ": must be a number", message)
    raise errors.UserError(message) from error
  if unexpected:
    raise errors.UserError(_explain(unexpected[0], config))
  return config


def _explain(argument: str, keys: Iterable[str]) -> str:
  """Says what an unknown argument may have meant."""
  name, equals, value = argument.partition("=")
  what = "option" if name.startswith("-") else "argument"
  meant = {option: option for option in (*_OPTIONS, "help")}
  for key in keys:
    meant[key] = meant[f"config.{key}"] = f"config.{key}"
  hint = _hint(
    name.lstrip("-"),
    {name: f"--{option}{equals}{value}" for name, option in meant.items()},
    f"the options are --{', --'.join(_OPTIONS)} and --config.KEY",
  )
  return f"unknown {what} {name}; {hint}"


def _hint(name: str, meant: Mapping[str, str], otherwise: str) -> str:
  """Suggests what a misspelled name meant, or returns `otherwise`."""
  if closest := difflib.get_close_matches(name, meant, n=1):
    return f"did you mean {meant[closest[0]]}?"
  return otherwise


def _describe_keys() -> str:
  """Lists the keys, defaults and comments of configs/default.py in groups."""
  result = ["--config.KEY=VALUE overrides a key. Keys and defaults:"]
  config = default.get_config()
  for line in inspect.getsource(default.get_config).splitlines():
    key = re.match(r"  config\.(\w+) = ", line)
    comment = re.search(r"(?:^|\s)# (.*)", line)
    if key:
      text = f"  {key[1]}={config[key[1]]}"
      result.append(_columns(text, comment[1] if comment else "", width=35))
    elif comment:
      result += ["", comment[1]]
  return "\n".join(result)


def _describe_presets() -> str:
  """Lists the files in configs/ with the first line of each docstring."""
  result = ["Available configs:", ""]
  for path in _presets():
    first_line = re.match(r'\s*"""(.*)', path.read_text("utf-8"))
    text = f"  {os.path.relpath(path)}"
    result.append(_columns(text, first_line[1] if first_line else "", width=28))
  return "\n".join(result)


def _columns(left: str, right: str, width: int) -> str:
  """Puts two texts side by side, the left one in a column of `width`."""
  if len(left) >= width:  # Too long, such as a path to another folder.
    return f"{left}\n{_columns('', right, width)}"
  return textwrap.fill(
    f"{left:{width}}{right}", 79, subsequent_indent=" " * width
  ).rstrip()


def _presets() -> list[pathlib.Path]:
  return sorted(_CONFIGS.glob("*.py"))
