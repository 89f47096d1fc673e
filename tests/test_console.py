import errno
import logging
import re
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
