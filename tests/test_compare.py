"""compare.py, on run directories written by the tests."""

import csv
import json

from conftest import assert_not_blank
from conftest import run_program
import pytest

import compare


@pytest.fixture
def runs(tmp_path):
  """Three runs; the last has no test result and an unfinished last line."""
  for name, seed, rate, test in (("a", 0, 0.1, 0.8), ("b", 1, 0.1, 0.9)):
    config = {"seed": seed, "learning_rate": rate, "log_every_steps": seed + 1}
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
  (path / "config.json").write_text(json.dumps({"num_steps": 20, **config}))
  records = [
    {"step": 10, "train_loss": 2.0, "steps_per_second": rate}
    for rate in (1.0, 5.0, 6.0)
  ]
  records.append({"step": 20, "validation_accuracy": validation})
  (path / "metrics.jsonl").write_text(
    "".join(json.dumps(record) + "\n" for record in records)
  )


def test_the_best_run_comes_first_with_only_the_keys_that_differ(runs):
  rows = compare.compare(compare.find_runs([runs]))
  expected = {
    "run": str(runs / "b"),
    "learning_rate": 0.1,
    "seed": 1,
    "steps_done": 20,
    "steps_left": 0,
    "validation_accuracy": 0.9,
    "test_accuracy": 0.9,
    "test_loss": pytest.approx(0.1),
    "steps_per_second": 5.0,
  }
  assert rows[0] == expected
  assert [row["run"][-1] for row in rows] == ["b", "a", "c"]
  assert rows[2]["test_accuracy"] is None


def test_a_broken_run_is_named_and_the_others_are_compared(runs, tmp_path):
  (runs / "a/config.json").write_text("{")
  (runs / "b/config.json").write_text("[]")
  completed = run_program("compare.py", runs, cwd=tmp_path)
  assert completed.returncode == 1
  first, second = completed.stderr.splitlines()
  assert first.startswith(f"compare.py: {runs}/a/config.json: is not JSON: ")
  assert second == (
    f"compare.py: {runs}/b/config.json: holds [], not a JSON object"
  )
  *_, row = completed.stdout.splitlines()
  assert row.split() == [str(runs / "c"), "20", "0.5000", "5.0"]

  (runs / "c/config.json").write_text("[]")
  completed = run_program("compare.py", runs, "--csv", cwd=tmp_path)
  assert (completed.returncode, completed.stdout) == (1, "")
  assert len(completed.stderr.splitlines()) == 3


def test_the_command_prints_a_table_or_csv_and_plots(runs, tmp_path):
  completed = run_program(
    *("compare.py", "runs", "--plot=~/plot.png"),
    cwd=tmp_path,
    HOME=str(tmp_path),
  )
  assert completed.returncode == 0, completed.stderr
  assert (
    completed.stdout
    == """\
        learning        steps       validation             test\
             test       steps
run         rate  seed   done         accuracy         accuracy\
             loss  per_second  runs
runs/…       0.1  1, 0     20  0.8500 ± 0.0707  0.8500 ± 0.0707\
  0.1500 ± 0.0707   5.0 ± 0.0     2
runs/c       0.2     0     20           0.5000                -\
                -         5.0     1
"""
  )
  assert_not_blank(tmp_path / "plot.png")
  completed = run_program(
    *("compare.py", "~/runs/a", "runs", "--csv"),
    cwd=tmp_path,
    HOME=str(tmp_path),
  )
  rows = list(csv.DictReader(completed.stdout.splitlines()))
  assert [row["run"].rpartition("/")[2] for row in rows] == ["b", "a", "a", "c"]
  assert rows[3]["test_accuracy"] == ""


def test_seeds_share_a_row_and_unfinished_runs_show_their_steps(
  tmp_path, capsys
):
  for seed, accuracy in ((0, 0.9), (10, 0.8), (12, 0.7)):
    name = f"default,seed={seed}" if seed else "default"
    config = {"seed": seed, "num_steps": 30 if seed > 9 else 20}
    write_run(tmp_path / name, config, accuracy)
  rows = compare.compare(compare.find_runs([tmp_path]))
  assert [row["steps_left"] for row in rows] == [0, 10, 10]
  for row in rows:
    row["run"] = row["run"].removeprefix(str(tmp_path))
  compare.print_table(rows)
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[:3] for line in lines[2:]] == [
    ["/default", "20", "0"],
    ["/default", "30", "10,"],
  ]
  assert " 20 of 30  0.7500 ± 0.0707 " in lines[3]


def test_a_table_that_is_too_wide_is_split(tmp_path, capsys):
  rows = [{"run": "a", **{f"test_{i}_split": "x" * 9 for i in range(9)}}]
  rows[0] |= {"steps_done": 20, "test_loss": 0.5}
  compare.print_table(rows)
  settings, results = capsys.readouterr().out.split("\n\n")
  assert settings.splitlines()[-1].split() == ["a", *(["x" * 9] * 9)]
  assert results.splitlines()[-1].split() == ["a", "20", "0.5000"]
