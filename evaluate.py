"""Scores a run on any split and shows its mistakes.

    python evaluate.py --workdir=runs/default --split=test

Writes metrics.json, predictions.csv and pictures to `evaluation/test` in the
run directory; another split, checkpoint or data set gets its own folder there.
The last line on stdout is the result as JSON. Several runs are scored as an
ensemble, by the mean of their probabilities:

    python evaluate.py --workdir=runs/a --workdir=runs/b
"""

from collections.abc import Sequence
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import calibration
import input_pipeline
from machine import compiling
from machine import console
from machine import errors
from report import evaluation
from report import figures
from rundir import experiment
from rundir import files
from rundir import runs
import steps


def evaluate(
  workdirs: Sequence[str | os.PathLike],
  split: str | None = None,
  dataset: str | None = None,
  checkpoint: str = "last",
  output: str | os.PathLike | None = None,
  data_dir: str | os.PathLike | None = None,
  manual_dir: str | os.PathLike | None = None,
) -> tuple[dict[str, Any], str]:
  """Scores a run, or several as an ensemble.

  Args:
    workdirs: the run directories.
    split: in TFDS syntax; by default the first run's test split.
    dataset: a data set; by default the first run's.
    checkpoint: "last", "best" or a step.
    output: where to write; by default a folder in `evaluation/` in the first
      run directory, named after the other arguments.
    data_dir: the folder of prepared data sets; by default the first run's.
    manual_dir: the folder of your own images; by default the first run's.

  Returns:
    The mean metrics with global_step and n, and a report to print. For several
    runs, global_step is a list.

  Raises:
    errors.UserError: if an argument or a run directory is invalid.
  """
  paths = [files.local_path(workdir) for workdir in workdirs]
  folder = output and files.local_path(output)
  opened = runs.open_ensemble(paths, checkpoint)
  own = opened[0].config
  options = {
    "test_split": split,
    "dataset": dataset,
    "data_dir": data_dir,
    "manual_dir": manual_dir,
  }
  given = {key: value for key, value in options.items() if value is not None}
  other = {}
  if dataset not in (None, own.dataset):
    other["manual_dir"] = ""  # The run's holds another data set.
  try:
    config = experiment.changed(own, **{**other, **given})
    data = runs.load_test(config, paths, opened)
  except errors.UserError as error:
    message = str(error)
    for key in given:
      option = f"--{key.removeprefix('test_')}="
      message = message.replace(f"config.{key}=", option)
    if "_dir" in message and not (data_dir or manual_dir):
      message += "; if the data have moved, use --data_dir or --manual_dir"
    raise errors.UserError(message) from error
  means, probabilities = _score(opened, data.test, config.eval_batch_size)

  result = {
    **means,
    "global_step": _one_or_all([run.step for run in opened]),
    "n": len(probabilities),
  }
  scored = {
    "run": _one_or_all([str(path) for path in paths]),
    "dataset": config.dataset,
    "split": config.test_split,
    "checkpoint": checkpoint,
    "temperature": _one_or_all([run.temperature for run in opened]),
  }
  evaluated = evaluation.measure(
    jax.device_get(data.test), probabilities, data.class_names
  )
  folder = folder or _folder(paths, checkpoint, config, own)
  try:
    _write(folder, evaluated, {**result, **scored})
  except errors.UserError as error:
    raise errors.UserError(f"{error}; name another --output") from error
  return result, "\n\n".join(
    [
      _title(paths, opened, config, len(probabilities)),
      "  ".join(f"{name} {mean:.4f}" for name, mean in means.items()),
      evaluation.to_text(evaluated),
      "The temperature of the probabilities is "
      + ", ".join(f"{run.temperature:.3f}" for run in opened),
      console.printable(f"More in {folder}"),
    ]
  )


def _write(
  folder: pathlib.Path,
  evaluated: evaluation.Evaluation,
  result: dict[str, Any],
) -> None:
  """Writes metrics.json (the details and the result), a table and pictures."""
  details = evaluation.details(evaluated)
  files.write_json(folder / "metrics.json", {**details, **result})
  files.write_text(folder / "predictions.csv", evaluation.to_csv(evaluated))
  for name, drawing in evaluation.drawings(evaluated).items():
    figures.save(drawing(), folder / f"{name}.png")


def _one_or_all(values: list[Any]) -> Any:
  return values if len(values) > 1 else values[0]


def _score(
  opened: Sequence[runs.Run],
  examples: input_pipeline.Examples,
  batch_size: int,
) -> tuple[dict[str, float], np.ndarray]:
  """Returns the mean metrics and the probabilities, [n, classes]."""
  evaluator = steps.evaluator(examples, batch_size)
  calibrated = []
  for run in opened:
    means, raw = evaluator(run.state)
    calibrated.append(calibration.apply(np.asarray(raw), run.temperature))
  probabilities = np.mean(calibrated, axis=0)
  if len(opened) > 1:
    smallest = np.finfo(probabilities.dtype).tiny
    logits = jnp.log(np.maximum(probabilities, smallest))
    means = jax.device_get(steps.Metrics.of(logits, examples.labels)).means()
  return means, probabilities


def _folder(
  workdirs: Sequence[pathlib.Path],
  checkpoint: str,
  config: ml_collections.ConfigDict,
  own: ml_collections.ConfigDict,
) -> pathlib.Path:
  """Returns the folder for these options, in the first run directory."""
  parts = [config.test_split]
  if checkpoint != "last":
    parts.append(f"checkpoint={checkpoint}")
  for key in ("dataset", "data_dir", "manual_dir"):
    if config[key] != own[key]:
      parts.append(f"{key}={config[key]}")
  for workdir in workdirs[1:]:
    parts.append(f"with={os.path.relpath(workdir, workdirs[0].parent)}")
  return workdirs[0] / "evaluation" / files.folder_name(",".join(parts))


def _title(
  workdirs: Sequence[pathlib.Path],
  opened: Sequence[runs.Run],
  config: ml_collections.ConfigDict,
  size: int,
) -> str:
  """Returns a line that says what was scored."""
  steps_taken = []
  for workdir, run in zip(workdirs, opened, strict=True):
    num_steps = run.config.num_steps
    state = "complete" if run.step == num_steps else "not complete"
    steps_taken.append(f"{workdir} at step {run.step} of {num_steps} ({state})")
  return console.printable(
    f"{', '.join(steps_taken)} on {config.test_split} of {config.dataset}:"
    f" {size} examples"
  )


def main() -> None:
  parser = console.Parser(__doc__)
  parser.add_argument(
    "--workdir",
    required=True,
    action="append",
    dest="workdirs",
    metavar="DIR",
    help="a run directory; give several for an ensemble",
  )
  parser.add_argument(
    "--split", help="in TFDS syntax; by default the run's test split"
  )
  parser.add_argument(
    "--dataset",
    help="another data set with images of the same shape and the same classes",
  )
  parser.add_argument(
    "--checkpoint", default="last", help="last (the default), best or a step"
  )
  parser.add_argument(
    "--data_dir", help="the folder of prepared data sets; by default the run's"
  )
  parser.add_argument(
    "--manual_dir", help="the folder of your own images; by default the run's"
  )
  parser.add_argument(
    "--output",
    help="where to write; by default a folder in the run's evaluation/",
  )
  with console.program():
    args = parser.parse_args()
    compiling.keep_freed_memory()
    result, report = evaluate(**vars(args))
    print(report)
    print(json.dumps(result, sort_keys=True))


if __name__ == "__main__":
  main()
