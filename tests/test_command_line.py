"""The options, help and error messages of train.py."""

import itertools
import json
import pathlib
import runpy
import sys
from unittest import mock

from conftest import PROJECT
from conftest import run_program
import pytest

from configs import default
from machine import compiling
from machine import errors
from rundir import command_line
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
    assert any(
      preset.name in line and first_words in after
      for line, after in itertools.pairwise(lines)
    ), preset
  assert max(map(len, lines)) < 80


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


@pytest.mark.usefixtures("in_project")
@pytest.mark.parametrize(
  ("arguments", "expected"),
  {
    "--config=configs": "the presets are configs/accurate.py, configs/default",
    "--batch_size 64": "did you mean --config.batch_size?",
    "--learningrate=1": "did you mean --config.learning_rate=1?",
    "--cofnig.seed=1": "did you mean --config.seed=1?",
    "-process_id=1": "did you mean --process_id=1?",
    "--init_from=a": "did you mean --config.init_from=a?",
    "--config.seed": "Missing value for flag --config.seed",
    "configs/fast.py": "did you mean --config=configs/fast.py?",
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
    "import sys; sys.exit()": "line 1: SystemExit",
    f"{GET_CONFIG}  return conf": "line 4: NameError: name 'conf' is not",
    f"{GET_CONFIG}  config.nosuch = 1": "line 4: AttributeError: 'Key \"nosuch",
    f"{GET_CONFIG}  with config.unlocked(): del config.batch_size\n"
    "  return config": "the config has no batch_size; it must have all keys of",
    f"{GET_CONFIG}  config = type(config)({{**config, 'seed': None}})\n"
    "  return config": "config.seed=None: must be of type int, as in",
  }.items(),
)
def test_a_bad_config_file_is_named(content, expected, tmp_path):
  path = tmp_path / "config.py"
  path.write_text(content)
  message = complaint(f"--config={path}", "--config.batch_size=7")
  assert message.startswith(f"--config={path}: {expected}")
  assert len(message) < 400


REFERENCES = """from configs import default
import neighbour_of_a_config
def get_config(name="none"):
  config = default.get_config()
  with config.unlocked():
    config.epochs = 2
    config.model = type(config)({"name": name, "sizes": (1, 2)})
    config.scale = 0.5
    config.size = neighbour_of_a_config.SIZE
  config.num_steps = config.get_ref("epochs") * 30
  return config
"""


@pytest.mark.parametrize(
  ("argument", "flags", "run_name", "expected"),
  [
    ("", {}, "refs", {}),
    ("", {"epochs": 4}, "refs,epochs=4", {"epochs": 4, "num_steps": 120}),
    # As in ml_collections, a value of its own ends the reference.
    ("", {"num_steps": 9, "epochs": 3}, "refs,epochs=3,num_steps=9", None),
    ("", {"batch_size": 100}, "refs", {}),  # The default is not an override.
    ("", {"scale": 0.25}, "refs,scale=0.25", {"scale": 0.25}),
    (":wide", {"seed": 1}, "refs,wide,seed=1", {"seed": 1}),
    (":a/b", {}, "refs,a_b", {}),
    ("", {"model.name": "x"}, "refs,model.name=x", None),
  ],
)
def test_a_config_with_references_and_an_argument(
  argument, flags, run_name, expected, tmp_path, monkeypatch
):
  monkeypatch.setattr(sys, "path", [*sys.path])
  (tmp_path / "neighbour_of_a_config.py").write_text("SIZE = 7")
  (tmp_path / "refs.py").write_text(REFERENCES)
  args = parse(
    f"--config={tmp_path}/refs.py{argument}",
    *(f"--config.{key}={value}" for key, value in flags.items()),
  )
  assert args.workdir == pathlib.Path("runs", run_name)
  config = args.config
  if expected is None:
    expected = {key: flags[key] for key in flags if key in config}
  assert {**config, "model": None} == {
    **default.get_config(),
    **{"epochs": 2, "num_steps": 60, "scale": 0.5, "size": 7, "model": None},
    **expected,
  }
  name = flags.get("model.name", argument[1:] or "none")
  assert config.model.to_dict() == {"name": name, "sizes": (1, 2)}


@pytest.mark.parametrize(
  ("flag", "expected"),
  {
    "--config.model.widht=1": "did you mean --config.model.width=1?",
    "--config.seed.x=1": "unknown option --config.seed.x; did you mean",
    "--config.none=1": "config.none is not supported",
  }.items(),
)
def test_a_key_that_cannot_be_overridden_is_named(flag, expected, tmp_path):
  path = tmp_path / "config.py"
  path.write_text(
    f"{GET_CONFIG}  with config.unlocked():\n"
    "    config.update(model={'width': 3}, none=None)\n  return config"
  )
  assert expected in complaint(f"--config={path}", flag)


def test_too_many_warmup_steps_are_refused(tmp_path):
  done = run_program(
    *("train.py", f"--config={PROJECT}/configs/fast.py"),
    *("--config.num_steps=20", "--config.warmup_steps=40"),
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
