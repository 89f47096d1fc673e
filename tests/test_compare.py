"""compare.py, on run directories written by the tests."""

import io
import json
import sys
from unittest import mock

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


def rows_of(folder):
  """Compares the runs in a folder; their names are relative to it."""
  rows = compare.compare(compare.find_runs([folder]))
  return [row._replace(run=row.run.removeprefix(f"{folder}/")) for row in rows]


def table(rows, capsys):
  compare.print_table(compare.group_seeds(rows))
  return capsys.readouterr().out.splitlines()


def test_the_best_run_comes_first_with_only_the_keys_that_differ(runs):
  rows = compare.compare(compare.find_runs([runs]))
  results = {
    "steps_done": 20,
    "steps_left": 0,
    "validation_accuracy": 0.9,
    "test_accuracy": 0.9,
    "test_loss": pytest.approx(0.1),
    "steps_per_second": 5.0,
  }
  assert rows[0] == (
    str(runs / "b"),
    {"learning_rate": 0.1, "seed": 1},
    results,
  )
  assert [row.run[-1] for row in rows] == ["b", "a", "c"]
  assert rows[2].results["test_accuracy"] is None


def test_a_broken_run_is_named_and_the_others_are_compared(runs, tmp_path):
  (runs / "a/config.json").write_text("{")
  (runs / "b/config.json").write_text("[]")
  completed = run_program("compare.py", runs.name, cwd=runs.parent)
  assert completed.returncode == 1
  first, second = completed.stderr.splitlines()
  assert first.startswith("compare.py: runs/a/config.json: is not JSON: ")
  assert second == "compare.py: runs/b/config.json: holds [], not a JSON object"
  *_, row = completed.stdout.splitlines()
  assert row.split() == ["20", "0.5000", "5.0", "runs/c"]

  (runs / "c/config.json").write_text("[]")
  completed = run_program("compare.py", runs, cwd=tmp_path)
  assert (completed.returncode, completed.stdout) == (1, "")
  assert len(completed.stderr.splitlines()) == 3


def test_the_command_prints_a_table_and_plots(runs, tmp_path):
  completed = run_program(
    *("compare.py", "runs", "--plot=~/plot.png"),
    cwd=tmp_path,
    HOME=str(tmp_path),
  )
  assert completed.returncode == 0, completed.stderr
  assert (
    completed.stdout
    == """\
learning        steps       validation             test             test\
       steps
    rate  seed   done         accuracy         accuracy             loss\
  per_second  runs  run
     0.1  0, 1     20  0.8500 ± 0.0707  0.8500 ± 0.0707  0.1500 ± 0.0707\
   5.0 ± 0.0     2  runs/*
     0.2     0     20           0.5000                -                -\
         5.0     1  runs/c
"""
  )
  assert_not_blank(tmp_path / "plot.png")


def test_seeds_share_a_row_and_unfinished_runs_show_their_steps(
  tmp_path, capsys
):
  for seed, accuracy in ((0, 0.9), (10, 0.8), (12, 0.7)):
    name = f"default,seed={seed}" if seed else "default"
    config = {"seed": seed, "num_steps": 30 if seed > 9 else 20}
    write_run(tmp_path / name, config, accuracy)
  rows = rows_of(tmp_path)
  assert [row.results["steps_left"] for row in rows] == [0, 10, 10]
  lines = table(rows, capsys)
  assert [line.split()[:3] for line in lines[2:]] == [
    ["20", "0", "20"],
    ["30", "10,", "12"],
  ]
  assert " 20 of 30  0.7500 ± 0.0707 " in lines[3]


def test_long_names_and_values_keep_the_table_narrow(tmp_path, capsys):
  same = "default," + ",".join(f"augment_{i}=0.125" for i in range(8))
  for seed in (0, 1):
    for value in ("x" * 9, "y" * 200):
      name = f"{same},own={value[0]},seed={seed},train_split=train_500_"
      config = {"seed": seed, "own_key": value}
      write_run(tmp_path / name, config, validation=0.5 + 0.25 * (value < "y"))
  lines = table(rows_of(tmp_path), capsys)
  assert [line.rpartition("  ") for line in lines[2:]] == [
    (mock.ANY, "  ", f"{same},own={x},train_split=train_500_") for x in "xy"
  ]
  assert [len(line.rpartition("  ")[0]) for line in lines[2:]] == [83, 83]
  assert "y" * 16 + "..." + "y" * 16 in lines[3]


def test_dicts_and_lists_of_ones_own_are_compared_by_their_parts(
  tmp_path, capsys
):
  model = {"width": 32, "depth": [1, 2], "same": {"a": None}}
  write_run(tmp_path / "a", {"model": model, "sizes": [1]}, validation=0.9)
  other = {"model": {**model, "width": 64}, "sizes": [1, 2]}
  write_run(tmp_path / "b", other, validation=0.8)
  write_run(tmp_path / "c", {}, validation=0.7)
  rows = rows_of(tmp_path)
  assert [row.settings for row in rows] == [
    {"model.depth": [1, 2], "model.width": 32, "sizes": [1]},
    {"model.depth": [1, 2], "model.width": 64, "sizes": [1, 2]},
    {"model.depth": None, "model.width": None, "sizes": None},
  ]
  lines = table(rows, capsys)
  assert lines[1].split()[:3] == ["model.depth", "model.width", "sizes"]
  assert [line.split()[:4] for line in lines[2:4]] == [
    ["[1,", "2]", "32", "[1]"],
    ["[1,", "2]", "64", "[1,"],
  ]


def test_linked_runs_are_found_and_each_run_once(tmp_path):
  """Clusters link to scratch; links may be to a folder above."""
  write_run(tmp_path / "scratch/linked", {}, validation=0.9)
  write_run(tmp_path / "runs/z", {}, validation=0.8)
  runs = tmp_path / "runs"
  (runs / "linked").symlink_to(tmp_path / "scratch/linked")
  (runs / "best").symlink_to("z")
  (runs / "up").symlink_to(tmp_path)
  (runs / "gone").symlink_to(tmp_path / "gone")
  # This link is refused later, and not followed.
  (runs / "z/out").symlink_to(tmp_path / "scratch")
  found = compare.find_runs([runs, tmp_path, tmp_path / "scratch"])
  assert found == [runs / "z", runs / "linked"]


def test_the_steps_done_are_those_of_the_newest_log_or_checkpoint(tmp_path):
  config = {"num_steps": 4000}
  write_run(tmp_path / "no_log", config, validation=0.5)
  (tmp_path / "no_log/metrics.jsonl").write_text("")
  (tmp_path / "no_log/checkpoints/65").mkdir(parents=True)
  # It was complete at step 20, and then extended.
  for name, steps in (("extended", 23), ("complete", 20)):
    write_run(tmp_path / name, {"num_steps": steps + 3}, validation=0.5)
    with (tmp_path / name / "metrics.jsonl").open("a") as file:
      file.write('{"step": 20, "test_accuracy": 0.75}\n[1]\n{"step": "x"}\n')
    (tmp_path / name / f"checkpoints/{steps}").mkdir(parents=True)
  results = {row.run: row.results for row in rows_of(tmp_path)}
  keys = ("steps_done", "steps_left", "validation_accuracy", "test_accuracy")
  assert {name: [x[key] for key in keys] for name, x in results.items()} == {
    "no_log": [65, 3935, None, None],
    "extended": [23, 3, 0.5, None],
    "complete": [20, 3, 0.5, 0.75],
  }


def test_two_runs_with_one_seed_are_not_two_seeds(tmp_path, capsys):
  for folder, best in (("new", 0.9), ("old", 0.8)):
    for seed in (0, 1, 2):
      write_run(
        tmp_path / folder / f"default,seed={seed}",
        {"seed": seed},
        validation=best - 0.1 * seed,
      )
  lines = table(rows_of(tmp_path), capsys)
  assert [line.split() for line in lines[2:]] == [
    f"0, 1, 2 20 {mean} ± 0.1000 5.0 ± 0.0 3 {name}/default".split()
    for name, mean in (("new", "0.8000"), ("old", "0.7000"))
  ]
  write_run(tmp_path / "copy", {"seed": 0}, validation=0.9)
  write_run(tmp_path / "two/copies", {"seed": 0}, validation=0.8)
  groups = compare.group_seeds(rows_of(tmp_path))
  assert sorted(map(len, groups)) == [1, 1, 3, 3]


def test_seeds_without_a_test_result_do_not_share_a_row(runs):
  for path in (runs / "a", runs / "b"):
    write_run(runs / f"{path.name}2", {"seed": 5}, validation=0.8)
  groups = compare.group_seeds(rows_of(runs))
  assert {tuple(row.run for row in group) for group in groups} >= {("a", "b")}


def test_the_legend_says_what_differs(tmp_path):
  for seed in (0, 1):
    for size in (64, 128):
      name = f"default,batch_size={size},dropout_rate=0.5,seed={seed}"
      config = {"seed": seed, "batch_size": size, "dropout_rate": 0.5}
      write_run(tmp_path / name, config, validation=0.5 + size / 1000)
  legend = compare.legend(compare.group_seeds(rows_of(tmp_path)))
  assert legend == ["batch", " size", "  128", "   64"]
  write_run(tmp_path / "again", config, validation=0.5)
  _, *lines = compare.legend(compare.group_seeds(rows_of(tmp_path)))
  assert [line.split() for line in lines] == [
    ["run", "size"],
    ["default,batch_si...dropout_rate=0.5", "128"],
    ["default,batch_si...dropout_rate=0.5", "64"],
    ["again", "128"],
  ]


@pytest.mark.parametrize(
  ("encoding", "sign"), [("ascii", "+-"), ("latin-1", "±"), ("utf-8", "±")]
)
def test_the_table_suits_the_encoding_of_stdout(
  runs, encoding, sign, monkeypatch
):
  stdout = io.TextIOWrapper(io.BytesIO(), encoding)
  monkeypatch.setattr(sys, "stdout", stdout)
  compare.print_table(compare.group_seeds(rows_of(runs)))
  stdout.seek(0)
  assert f"0.8500 {sign} 0.0707" in stdout.read()
