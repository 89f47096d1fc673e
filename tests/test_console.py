import errno
import json
import logging
import os
import re
import subprocess
import sys
from unittest import mock

from conftest import PROJECT
from conftest import run_program
import pytest

from machine import console


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


@pytest.mark.parametrize(
  ("message", "shown"),
  [
    ("a\n  b\r\nc\td", "a b c d"),
    ("a\x1b[2J\x07\x00", r"a\x1b[2J\x07\x00"),
    ("a\x9b2J\u202e\u2028b", r"a\x9b2J\u202e b"),
    ("caf\xe9 \u6570", "caf\xe9 \u6570"),
  ],
)
def test_an_error_is_one_line_without_escape_sequences(
  message, shown, monkeypatch, capsys
):
  monkeypatch.setattr(sys, "argv", ["/some/where/train.py"])
  with pytest.raises(SystemExit) as ended:
    console.exit_with(message, 3)
  assert ended.value.code == 3
  assert capsys.readouterr() == ("", f"train.py: {shown}\n")


def test_a_lost_terminal_loses_only_the_output(monkeypatch):
  """After an ssh connection drops, writing to the terminal fails."""
  handler = console._AboveProgressBar()
  record = logging.makeLogRecord({"msg": "a"})
  terminal = mock.Mock(write=mock.Mock(side_effect=OSError(errno.EIO, "lost")))
  monkeypatch.setattr(sys, "stderr", terminal)
  handler.emit(record)
  with pytest.raises(SystemExit) as ended:
    console.exit_with("a", 129)
  assert ended.value.code == 129
  assert terminal.write.called


def test_help_and_names_are_printed_in_an_ascii_locale(tmp_path):
  name = "caf\xe9"
  (tmp_path / "config.json").write_text(json.dumps({"seed": 1}))
  (tmp_path / name).mkdir()
  (tmp_path / name / "config.json").write_text(json.dumps({"dataset": name}))
  programs = ("train", "evaluate", "predict", "export", "compare")
  commands = [[f"{program}.py", "--help"] for program in programs]
  commands.append(["compare.py", str(tmp_path)])
  script = f"""
import runpy, sys
for sys.argv in {commands}:
  try:
    runpy.run_path(sys.argv[0], run_name="__main__")
  except SystemExit as ended:
    assert not ended.code, sys.argv
"""
  environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
  done = subprocess.run(
    [sys.executable, "-c", script],
    capture_output=True,
    cwd=PROJECT,
    env={**os.environ, **environment},
  )
  assert done.returncode == 0, done.stderr.decode()
  for program in programs:
    assert f"usage: {program}.py" in done.stdout.decode("ascii")
  # The locale shows the bytes of a path, but the config is always UTF-8.
  assert r"\udcc3\udca9" in done.stdout.decode()
  assert r"caf\xe9" in done.stdout.decode()
