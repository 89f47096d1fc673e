"""compare.py on run directories written here."""

import csv
import json

from conftest import assert_not_blank
from conftest import run_program
import pytest

import compare


@pytest.fixture
def runs(tmp_path):
  """Three runs; the last has not been tested yet, and is being written."""
  for name, seed, rate, test in (("a", 0, 0.1, 0.8), ("b", 1, 0.1, 0.9)):
    config = {"seed": seed, "learning_rate": rate}
    write_run(tmp_path / "runs" / name, config, validation=test)
    record = {"step": 20, "test_accuracy": test, "test_loss": 1 - test}
    with (tmp_path / "runs" / name / "metrics.jsonl").open("a") as file:
      file.write(json.dumps(record) + "\n")
  write_run(tmp_path / "runs/c", {"seed": 0, "learning_rate": 0.2}, 0.5)
  with (tmp_path / "runs/c/metrics.jsonl").open("a") as file:
    file.write('{"step": 2')
  return tmp_path / "runs"


def write_run(path, config, validation):
  path.mkdir(parents=True)
  (path / "config.json").write_text(json.dumps({**config, "batch_size": 16}))
  records = [
    {"step": 10, "train_loss": 2.0, "steps_per_second": rate}
    for rate in (1.0, 5.0, 6.0)
  ]
  records.append({"step": 20, "validation_accuracy": validation})
  (path / "metrics.jsonl").write_text(
    "".join(json.dumps(record) + "\n" for record in records)
  )


def test_the_best_is_first_and_only_what_differs_is_shown(runs):
  rows = compare.compare(compare.find_runs([runs]))
  expected = {
    "run": str(runs / "b"),
    "learning_rate": 0.1,
    "seed": 1,
    "steps_done": 20,
    "validation_accuracy": 0.9,
    "test_accuracy": 0.9,
    "test_loss": pytest.approx(0.1),
    "steps_per_second": 5.0,
  }
  assert rows[0] == expected
  assert [row["run"][-1] for row in rows] == ["b", "a", "c"]
  assert rows[2]["test_accuracy"] is None


def test_a_broken_run_is_named_and_the_others_are_printed(runs, tmp_path):
  (runs / "a/config.json").write_text("{")
  (runs / "b/link").symlink_to("/etc/passwd")
  completed = run_program("compare.py", runs, cwd=tmp_path)
  assert completed.returncode == 1
  first, second = completed.stderr.splitlines()
  assert first.startswith(f"compare.py: {runs}/a/config.json: is not JSON: ")
  assert (
    second == f"compare.py: {runs}/b/link: is a link out of the run directory"
  )
  _, row = completed.stdout.splitlines()
  assert row.split() == [str(runs / "c"), "20", "0.5000", "5.0000"]

  (runs / "c/config.json").write_text("[]")
  completed = run_program("compare.py", runs, "--csv", cwd=tmp_path)
  assert (completed.returncode, completed.stdout) == (1, "")
  assert len(completed.stderr.splitlines()) == 3


def test_the_command_prints_a_table_or_csv_and_draws(runs, tmp_path):
  completed = run_program(
    *("compare.py", "~/runs", "--plot=~/plot.png"),
    cwd=runs,
    HOME=str(tmp_path),
  )
  assert completed.returncode == 0, completed.stderr
  header, first, *_ = completed.stdout.splitlines()
  assert header.split()[:4] == ["run", "learning_rate", "seed", "steps_done"]
  assert first.split() == [
    *(str(runs / "b"), "0.1000", "1", "20", "0.9000", "0.9000", "0.1000"),
    "5.0000",
  ]
  assert_not_blank(tmp_path / "plot.png")
  completed = run_program("compare.py", runs / "a", runs, "--csv", cwd=tmp_path)
  rows = list(csv.DictReader(completed.stdout.splitlines()))
  assert [row["run"][-1] for row in rows] == ["b", "a", "c"]
  assert rows[2]["test_accuracy"] == ""
