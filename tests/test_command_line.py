"""The options, help and error messages of train.py."""

import gzip
import json
import os
import pathlib
import re
import runpy
import sys
from unittest import mock

from conftest import PROJECT
from conftest import run_program
import jax
import pytest

from configs import default
from machine import compiling
from machine import errors
from machine import profiling
from rundir import command_line
import steps
import train


def parse(*arguments):
  return command_line.parse(["train.py", *arguments], "Trains.")


def complaint(*arguments):
  with pytest.raises(errors.UserError) as error:
    parse(*arguments)
  return str(error.value)


@pytest.fixture
def in_project(monkeypatch):
  monkeypatch.chdir(PROJECT)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_option_key_and_preset(flag):
  done = run_program("train.py", flag, cwd=PROJECT)
  assert (done.returncode, done.stderr) == (0, "")
  lines = [line.strip() for line in done.stdout.splitlines()]
  assert any("python train.py --config=" in line for line in lines)
  for option in ("--workdir DIR", "--profile", "--process_id N"):
    assert any(line.startswith(option) for line in lines)
  for key, value in default.get_config().items():
    assert any(line.split("  ")[0] == f"{key}={value}" for line in lines), key
  assert "Training." in lines  # A heading of configs/default.py.
  (momentum,) = (line for line in lines if line.startswith("momentum="))
  assert (
    momentum.split("  ")[-1].strip()
    in (PROJECT / "configs/default.py")
    .read_text()
    .partition("config.momentum = ")[2]
    .partition("\n")[0]
  )
  for preset in (PROJECT / "configs").glob("*.py"):
    first_words = preset.read_text().split('"""')[1][:20]
    assert any(preset.name in line and first_words in line for line in lines), (
      preset
    )
  assert max(map(len, lines)) < 80


def test_help_from_another_folder_keeps_the_columns_apart(tmp_path):
  done = run_program("train.py", "--help", cwd=tmp_path)
  path = os.path.relpath(PROJECT / "configs/accurate.py", tmp_path)
  begin = done.stdout.index(f"  {path}\n")
  assert done.stdout[begin:].split()[:3] == [path, "The", "tutorial's"]


@pytest.mark.usefixtures("in_project")
def test_the_default_is_the_tutorials_experiment():
  args = parse()
  assert args.config.to_dict() == default.get_config().to_dict()
  assert args.config.is_locked
  assert args.workdir == pathlib.Path("runs/default")
  assert args.profile is False


@pytest.mark.usefixtures("in_project")
@pytest.mark.parametrize("config_comes", ["first", "last"])
def test_overrides_name_the_run(config_comes):
  arguments = ["--config=configs/fast.py", "--config.seed=3"]
  arguments += ["--config.learning_rate", "0.01"]
  arguments += ["--config.init_from=runs/other/"]
  if config_comes == "last":
    arguments = arguments[1:] + arguments[:1]
  args = parse(*arguments)
  assert (args.config.seed, args.config.learning_rate) == (3, 0.01)
  assert args.config.optimizer == "nadamw"
  assert args.workdir.name == "fast,init_from=other,learning_rate=0.01,seed=3"
  assert parse(*arguments, "--workdir=a").workdir == "a"


def test_a_flagfile_can_hold_any_option(tmp_path):
  path = tmp_path / "flags"
  path.write_text(
    f"--config={PROJECT}/configs/fast.py\n# A comment\n--config.seed=3\n"
    "--profile\n"
  )
  args = parse(f"--flagfile={path}", "--config.batch_size=32")
  config = args.config
  assert (config.optimizer, config.seed, config.batch_size) == ("nadamw", 3, 32)
  assert args.workdir.name == "fast,batch_size=32,seed=3"
  assert args.profile is True


@pytest.mark.usefixtures("in_project")
@pytest.mark.parametrize(
  ("arguments", "expected"),
  {
    "--config=fast": "no such file; did you mean --config=configs/fast.py?",
    "--config=configs/fats.py": "did you mean --config=configs/fast.py?",
    "--config=configs": "the presets are configs/accurate.py, configs/default",
    "--batch_size 64": "did you mean --config.batch_size?",
    "--learningrate=1": "did you mean --config.learning_rate=1?",
    "--cofnig.seed=1": "did you mean --config.seed=1?",
    "-process_id=1": "did you mean --process_id=1?",
    "--init_from=a": "did you mean --config.init_from=a?",
    "--config.seed": "Missing value for flag --config.seed",
    "xyz": "unknown argument xyz; the options are --config, --workdir",
  }.items(),
)
def test_a_mistake_gets_a_suggestion(arguments, expected):
  assert expected in complaint(*arguments.split())


GET_CONFIG = """from configs import default
def get_config():
  config = default.get_config()
"""


@pytest.mark.parametrize(
  ("content", "expected"),
  {
    "def get_config(: pass": "SyntaxError: invalid syntax (",
    "x = 1": "has no function get_config",
    "def get_config(): return {'a': 1}": "get_config returns {'a': 1}; it must",
    "def get_config(): pass": "get_config returns None; it must",
    "import nosuch": "line 1: ModuleNotFoundError: No module named 'nosuch'",
    f"{GET_CONFIG}  return conf": "line 4: NameError: name 'conf' is not",
    f"{GET_CONFIG}  config.nosuch = 1": "line 4: AttributeError: 'Key \"nosuch",
    f"{GET_CONFIG}  with config.unlocked(): del config.batch_size\n"
    "  return config": "the config has no batch_size; it must have all keys of",
    f"{GET_CONFIG}  config = type(config)({{**config, 'seed': None}})\n"
    "  return config": "config.seed=None: must be of type int, as in",
    f"{GET_CONFIG}  config = type(config)({{**config, 'own': None}})\n"
    "  return config": "config.own is None; it must have a value",
  }.items(),
)
def test_a_bad_config_file_is_named(content, expected, tmp_path):
  path = tmp_path / "config.py"
  path.write_text(content)
  message = complaint(f"--config={path}", "--config.batch_size=7")
  assert message.startswith(f"--config={path}: {expected}")
  assert len(message) < 400


def test_too_many_warmup_steps_are_refused(tmp_path):
  done = run_program(
    *("train.py", f"--config={PROJECT}/configs/fast.py"),
    "--config.num_steps=20",
    cwd=tmp_path,
  )
  assert done.returncode == 1
  assert done.stderr == (
    "train.py: lower config.warmup_steps=40 to at most 10, half of"
    " config.num_steps\n"
  )


def test_train_can_run_twice_in_a_process(monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["train.py", "--config.num_steps=0"])
  for _ in range(2):
    with pytest.raises(SystemExit):
      runpy.run_path(str(PROJECT / "train.py"), run_name="__main__")
    assert "config.num_steps=0: must be" in capsys.readouterr().err


def test_main_passes_its_options_on(monkeypatch, capsys):
  monkeypatch.setattr(
    sys,
    "argv",
    ["train.py", "--config.seed=3", "--config.init_from=a", "--profile"],
  )
  monkeypatch.setattr(compiling, "keep_freed_memory", lambda: None)
  trained = mock.Mock(return_value={"accuracy": 1.0})
  monkeypatch.setattr(train, "train_and_evaluate", trained)
  train.main()
  config, workdir, profile = trained.call_args.args
  assert (config.seed, config.init_from, profile) == (3, "a", True)
  assert str(workdir) == "runs/default,init_from=a,seed=3"
  assert json.loads(capsys.readouterr().out) == {"accuracy": 1.0}


@pytest.fixture
def no_pictures(monkeypatch):
  monkeypatch.setattr(train, "_draw", lambda *args: None)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_trace_covers_the_steps_between_two_logs(
  platform, tiny_config, tmp_path, monkeypatch
):
  """On accelerators, one dispatch runs several steps."""
  tiny_config.update(num_steps=12, eval_every_steps=12)
  tiny_config.update(checkpoint_every_steps=12)
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  events = []
  jit_loop = compiling.jit_loop

  def recorded(step, options=None):
    run = jit_loop(step, options)

    def recording_run(carry, num_steps, *args):
      if isinstance(carry, steps.Training):
        events.append(num_steps)
      return run(carry, num_steps, *args)

    return recording_run

  monkeypatch.setattr(compiling, "jit_loop", recorded)
  monkeypatch.setattr(
    jax.profiler, "start_trace", lambda *_, **__: events.append("begin")
  )
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("end"))
  train.train_and_evaluate(tiny_config, tmp_path, profile=True)
  if platform == "gpu":  # There is a log every 5 steps.
    assert events == [5, "begin", 5, "end", 2]
  else:
    assert events == [*[1] * 5, "begin", *[1] * 5, "end", 1, 1]


@pytest.mark.usefixtures("no_pictures")
def test_tensorboard_and_perfetto_find_the_trace(tiny_config, tmp_path, caplog):
  tiny_config.num_steps = 7  # The trace ends with the run.
  with caplog.at_level("INFO"):
    train.train_and_evaluate(tiny_config, tmp_path, profile=True)
  (folder,) = (tmp_path / "plugins/profile").iterdir()
  assert f"The trace is in {folder}" in caplog.messages
  assert [*folder.glob("*.xplane.pb")]
  trace = json.loads(
    gzip.decompress((folder / "perfetto_trace.json.gz").read_bytes())
  )
  names = [event.get("name", "") for event in trace["traceEvents"]]
  assert any("train_on_next_batch" in name for name in names)


def test_a_trace_that_fails_or_never_starts_does_not_stop_the_run(
  tmp_path, monkeypatch, caplog
):
  profiling.Tracer(tmp_path, is_wanted=False).close()
  assert not caplog.messages
  profiling.Tracer(tmp_path, is_wanted=True).close()
  assert caplog.messages == ["No steps were traced: training ended too early"]
  start = mock.Mock(side_effect=RuntimeError("already started"))
  monkeypatch.setattr(jax.profiler, "start_trace", start)
  tracer = profiling.Tracer(tmp_path, is_wanted=True)
  for _ in range(3):
    tracer.at_log()
  tracer.close()
  start.assert_called_once()
  assert caplog.messages[1:] == ["The steps cannot be traced: already started"]


@pytest.mark.parametrize("stream", [None, "stderr", "stdout"])
def test_each_message_is_shown_once(stream, tmp_path):
  """The user may have configured logging."""
  configure = f"""logging.basicConfig(
    stream=sys.{stream}, format="user %(message)s", level="INFO", force=True)"""
  script = tmp_path / "script.py"
  script.write_text(f"""
import logging, sys
from absl import logging as absl_logging
from machine import console
{configure if stream else ""}
for number in (1, 2):
  console.setup()  # As train_and_evaluate does.
  say = compile("absl_logging.info(number)", {str(PROJECT / "x.py")!r}, "exec")
  exec(say)
  absl_logging.info("a library's")
  absl_logging.warning("a warning")
  logging.getLogger("own").info("the user's")
""")
  done = run_program(str(script), cwd=tmp_path)
  if stream is None:
    shown = re.sub(r"(?m)^[\d:]{8} ", "", done.stderr).splitlines()
    assert shown == ["1", "a warning", "2", "a warning"]
    assert len(re.findall(r"(?m)^[\d:]{8} ", done.stderr)) == 4
  else:
    lines = ["user a warning", "user the user's"]
    shown = getattr(done, stream).splitlines()
    assert shown == ["user 1", *lines, "user 2", *lines]
    assert done.stdout + done.stderr == getattr(done, stream)
