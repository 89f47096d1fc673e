"""Writes a trained network for use without this project.

    python export.py --workdir=runs/default --format=onnx --output=mnist.onnx

onnx: a model from images to logits. stablehlo: the same, as a function that
`jax.export.deserialize` reads. safetensors: the parameters by name. html: a
page that reads a digit as you draw it, offline. The last line on stdout is the
result as JSON; its accuracy is that of the exported weights on the run's test
split.
"""

import importlib
import json
import os
import pathlib
from typing import Any

from absl import logging
import jax
import jax.export
import numpy as np

from exporting import page
from exporting import trace
from machine import console
from machine import errors
from rundir import files
from rundir import runs
from rundir import trees
import steps

# Packages that a format needs besides the project's own requirements.
_NEEDS = {
  "onnx": "onnx",
  "stablehlo": "flatbuffers",
  "safetensors": "safetensors",
}


def export(
  workdir: str | os.PathLike,
  format: str,
  output: str | os.PathLike,
  checkpoint: str = "last",
  dtype: str | None = None,
) -> dict[str, Any]:
  """Exports a trained network, with the parameters that evaluation uses.

  Args:
    workdir: the run directory.
    format: "onnx", "stablehlo", "safetensors" or "html".
    output: the file to write.
    checkpoint: "last", "best" or a step.
    dtype: the type of the images that onnx and stablehlo take: "uint8", 0 to
      255 (the default), or "float32", 0 to 1.

  Returns:
    The accuracy on the run's test split, the size of the file in bytes and
    global_step. Without the data, the accuracy is that in result.json, or None.

  Raises:
    errors.UserError: if an argument or the run directory is invalid, or the
      network cannot be exported.
  """
  workdir, output = files.local_path(workdir), files.local_path(output)
  _check(format, output, dtype)
  run = runs.open_run(workdir, checkpoint)
  if format == "html":
    variables = page.round_weights(run.state.eval_variables)
    run = run._replace(state=run.state.starting_from(variables))
  accuracy = _accuracy(workdir, run)
  metadata = {
    "run": workdir.resolve().name,
    "dataset": run.config.dataset,
    "class_names": json.dumps(run.class_names),
    "test_split": run.config.test_split,
    "accuracy": str(accuracy),
    "temperature": str(run.temperature),
    "global_step": str(run.step),
  }
  match format:
    case "onnx":
      content = _to_onnx(run, dtype or "uint8", metadata)
    case "stablehlo":
      content = _to_stablehlo(run, dtype or "uint8")
    case "safetensors":
      content = _to_safetensors(run, metadata)
    case "html":
      content = page.build(run, metadata["run"], accuracy).encode()
  files.write_bytes(output, content)
  return {
    "accuracy": accuracy,
    "bytes": len(content),
    "global_step": run.step,
  }


def _accuracy(workdir: pathlib.Path, run: runs.Run) -> float | None:
  """Returns the accuracy of a run's network, or what is known without data."""
  try:
    data = runs.load_test(run.config, [workdir], [run])
  except errors.UserError as error:
    path, accuracy = workdir / "result.json", None
    if path.exists():
      result = files.read_json(path)
      if result.get("global_step") == run.step:
        accuracy = result.get("accuracy")
    what = "its accuracy is unknown"
    if accuracy is not None:
      what = f"its accuracy, {accuracy}, is that in {path}"
    logging.warning(
      "The exported network was not scored, so %s: %s", what, error
    )
    return accuracy
  evaluate = steps.evaluator(data.test, run.config.eval_batch_size)
  return evaluate(run.state)[0]["accuracy"]


def _check(format: str, output: pathlib.Path, dtype: str | None) -> None:
  if dtype and format not in ("onnx", "stablehlo"):
    raise errors.UserError(
      f"--dtype={dtype} has no effect with --format={format}"
    )
  if package := _NEEDS.get(format):
    try:
      importlib.import_module(package)
    except Exception as error:  # It may be damaged.
      raise errors.UserError(
        f"--format={format}: {package} cannot be imported ({error}); run"
        " `pip install -r requirements-export.txt`"
      ) from error


def _images(run: runs.Run, dtype: str) -> jax.ShapeDtypeStruct:
  """Returns the shape and dtype of the images, with a symbolic batch size."""
  (batch,) = jax.export.symbolic_shape("batch")
  images = jax.ShapeDtypeStruct((batch, *run.image_shape), np.dtype(dtype))
  try:
    jax.eval_shape(steps.eval_step, run.state, images)
  except Exception as error:  # JAX has no public type for these errors.
    raise errors.UserError(
      "model.py: must accept any batch size to be exported:"
      f" {str(error).splitlines()[0]}"
    ) from error
  return images


def _to_onnx(run: runs.Run, dtype: str, metadata: dict[str, str]) -> bytes:
  from exporting import onnx_model

  images = _images(run, dtype)
  scale = {"uint8": "0 to 255", "float32": "0 to 1"}[dtype]
  metadata["images"] = f"{dtype} {list(images.shape)}, {scale}"
  network = trace.trace(run.state, images)
  return onnx_model.build(network, images, metadata).SerializeToString()


def _to_stablehlo(run: runs.Run, dtype: str) -> bytes:
  # If the state is on several devices, the exported function requires as many.
  state = jax.device_get(run.state)
  logits = jax.jit(lambda images: steps.eval_step(state, images))
  exported = jax.export.export(logits, platforms=("cpu", "cuda", "tpu"))
  return bytes(exported(_images(run, dtype)).serialize())


def _to_safetensors(run: runs.Run, metadata: dict[str, str]) -> bytes:
  from safetensors import numpy

  variables = jax.device_get(run.state.eval_variables)
  return numpy.save(dict(trees.of_variables(variables)), metadata)


def main() -> None:
  parser = console.Parser(__doc__)
  parser.add_argument("--workdir", required=True, help="the run directory")
  parser.add_argument("--format", required=True, choices=(*_NEEDS, "html"))
  parser.add_argument("--output", required=True, help="the file to write")
  parser.add_argument(
    "--checkpoint", default="last", help="last (the default), best or a step"
  )
  parser.add_argument(
    "--dtype",
    choices=("uint8", "float32"),
    help="the type of the images for onnx and stablehlo: uint8, 0 to 255 (the"
    " default), or float32, 0 to 1",
  )
  with console.program():
    args = parser.parse_args()
    print(json.dumps(export(**vars(args)), sort_keys=True))


if __name__ == "__main__":
  main()
