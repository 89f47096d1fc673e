"""The command line of train.py: options, help and error messages."""

import argparse
from collections.abc import Iterable
import difflib
import inspect
import os
import pathlib
import re
import runpy
import sys
import textwrap
import traceback
from typing import Any

from absl import flags
from flax import traverse_util
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
    metavar="FILE[:ARGUMENT]",
    default=str(_CONFIGS / "default.py"),
    help="the experiment (default: configs/default.py); an argument is passed"
    " to get_config",
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
  """Parses the program's name and arguments; prints the help if asked for it.

  Returns:
    The options. `config` is the config with its overrides; `workdir` is named
    after the experiment, unless it was given.

  Raises:
    errors.UserError: if an argument is wrong; the message says what it must be.
  """
  parser = console.Parser(
    description,
    usage="%(prog)s [--config=FILE] [--config.KEY=VALUE ...]"
    " [--OPTION=VALUE ...]",
    epilog=f"{_describe_keys()}\n{_describe_presets()}",
    allow_abbrev=False,
  )
  for name, option in _OPTIONS.items():
    parser.add_argument(f"--{name}", **option)
  args, arguments = parser.parse_known_args(argv[1:])
  path, _, argument = args.config.partition(":")
  name = ",".join(filter(None, (pathlib.Path(path).stem, argument)))
  args.config = load_config(args.config)
  overrides = _override(args.config, arguments)
  if args.workdir is None:
    args.workdir = pathlib.Path("runs", experiment.name(name, overrides))
  return args


def load_config(path: str) -> ml_collections.ConfigDict:
  """Loads a config file; what follows a colon is passed to its get_config.

  The file can import this project's modules and those beside it.

  Raises:
    errors.UserError: if the file is wrong; the message names it and says why.
  """
  file, *argument = str(files.local_path(path)).split(":", 1)
  if not os.path.isfile(file):
    raise errors.UserError(
      f"--config={path}: no such file; the presets are"
      f" {', '.join(map(os.path.relpath, _presets()))}"
    )
  if (folder := os.path.dirname(os.path.abspath(file))) not in sys.path:
    sys.path.append(folder)
  try:
    get_config = runpy.run_path(file).get("get_config")
    if not callable(get_config):
      raise errors.UserError("has no function get_config")
    config = get_config(*argument)
    if not isinstance(config, ml_collections.ConfigDict):
      raise errors.UserError(
        f"get_config returns {config!r:.40}; it must return a ConfigDict"
      )
    experiment.check_values(config)
  except errors.UserError as error:
    raise errors.UserError(f"--config={path}: {error}") from error
  except (Exception, SystemExit) as error:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    where = f"line {lines[-1]}: " if lines else ""
    # A ConfigDict's errors list all of its keys.
    what = textwrap.shorten(str(error), 200)
    raise errors.UserError(
      f"--config={path}: {where}{type(error).__name__}: {what}"
    ) from error
  return config


def _override(
  config: ml_collections.ConfigDict, arguments: list[str]
) -> dict[str, Any]:
  """Applies --config.KEY=VALUE to a config; returns the values that differ.

  Keys that refer to an overridden one follow it.
  """
  # The keys of the config, and those of dicts in it.
  nested = traverse_util.flatten_dict(config.to_dict())
  paths = (".".join(map(str, path)) for path in nested)
  keys = dict.fromkeys([*config, *paths])
  for argument in arguments:
    match = re.match(r"--?(?:no)?config\.([\w.]*)", argument)
    if match and match[1] not in keys:
      raise errors.UserError(_explain(argument, keys))
  values = flags.FlagValues()
  try:
    config_flags.DEFINE_config_dict(
      "config", config, flag_values=values, sys_argv=arguments
    )
    unexpected = values(["", *arguments])[1:]
  except flags.UnrecognizedFlagError as error:
    unexpected = [error.flagvalue]
  except (flags.Error, AttributeError, LookupError) as error:
    message = str(error).removeprefix("flag ").replace("\n", " ")
    message = re.sub(": invalid literal.*", ": must be an integer", message)
    message = re.sub(r": \('Non-bool.*", ": must be true or false", message)
    message = re.sub(": could not convert.*", ": must be a number", message)
    raise errors.UserError(message) from error
  if unexpected:
    raise errors.UserError(_explain(unexpected[0], keys))
  overrides = config_flags.get_override_values(values["config"])
  return {
    key: value
    for key, value in overrides.items()
    if value != values[f"config.{key}"].default
  }


def _explain(argument: str, keys: Iterable[str]) -> str:
  """Says what an unknown argument may have meant."""
  name, equals, value = argument.partition("=")
  what = "option" if name.startswith("-") else "argument"
  hint = f"the keys are {', '.join(keys)}"
  meant = {key: f"config.{key}" for key in keys}
  word = name.partition("config.")[2]
  if not word:
    hint = f"the options are --{', --'.join(_OPTIONS)} and --config.KEY"
    meant |= {name: name for name in (*meant.values(), *_OPTIONS, "help")}
    word = name.lstrip("-")
  if closest := difflib.get_close_matches(word, meant, n=1):
    hint = f"did you mean --{meant[closest[0]]}{equals}{value}?"
  if name.endswith(".py"):
    hint = f"did you mean --config={name.lstrip('-')}?"
  return f"unknown {what} {name}; {hint}"


def _describe_keys() -> str:
  """Returns the keys, defaults and comments as configs/default.py has them."""
  source = inspect.getsource(default.get_config)
  keys = source.partition("ConfigDict()\n")[2].partition("  config.lock")[0]
  keys = re.sub(r"(?m)^  # ", "", keys)  # A heading.
  keys = re.sub(r'(?m)^  config\.(\w+) = "?(.*?)"?(?=  #|$)', r"  \1=\2", keys)
  return f"--config.KEY=VALUE overrides a key. Keys and defaults:\n{keys}"


def _describe_presets() -> str:
  """Lists the files in configs/ with the first line of each docstring."""
  result = ["Available configs:"]
  for path in _presets():
    text = path.read_text("utf-8")
    first_line = text.split('"""')[1].partition("\n")[0]
    result += [f"  {os.path.relpath(path)}", f"      {first_line}"]
  return "\n".join(result)


def _presets() -> list[pathlib.Path]:
  return sorted(_CONFIGS.glob("*.py"))
