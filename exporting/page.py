"""A network as one HTML page that reads what is drawn on it, offline."""

import base64
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np

from exporting import trace
from rundir import runs
import steps

PATH = pathlib.Path(__file__).with_name("page.html")

# Primitives of one pixel at a time that the page has.
ELEMENTWISE = set(
  "abs add and convert_element_type div eq exp expm1 ge gt integer_pow le log"
  " logistic lt max min mul neg not or pow rsqrt select_n sqrt square sub"
  " tanh".split()
)
_NHWC = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def round_weights(params: steps.Params, dtype: str) -> steps.Params:
  """Rounds parameters to what a page stores.

  Args:
    params: float32.
    dtype: "float16", "float32" or "int8": 255 values for each output of a
      kernel; biases stay float32.

  Returns:
    The rounded parameters, float32.
  """

  def rounded(x):
    values, scales = _encode(np.asarray(x), dtype)
    return np.float32(values) * scales

  return jax.tree.map(rounded, params)


def _encode(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns what is stored, and the factors that restore it."""
  if dtype != "int8":
    return x.astype(dtype), np.ones(1, np.float32)
  if x.ndim < 2:
    return x, np.ones(1, np.float32)
  largest = np.abs(x).max(axis=tuple(range(x.ndim - 1)))
  scales = np.float32(np.maximum(largest, 1e-30) / 127)
  return np.round(x / scales).astype(np.int8), scales


def build(run: runs.Run, dtype: str, metadata: dict[str, str]) -> str:
  """Builds the page.

  Args:
    run: with rounded parameters.
    dtype: how to store them, as for `round_weights`.
    metadata: the run's name, "run", and "accuracy".

  Raises:
    app.UsageError: names a layer that the page cannot compute.
  """
  images = jax.ShapeDtypeStruct((1, *run.image_shape), np.uint8)
  network = trace.trace(run.state, images)
  params, blobs = [], []
  for name, x in network.params.items():
    values, scales = _encode(x, dtype)
    entry = {"name": name, "size": x.size, "dtype": values.dtype.name}
    if values.dtype == np.int8:
      entry["scales"] = scales.size
      blobs.append(scales.tobytes())
    params.append(entry)
    blobs.append(values.tobytes())
  is_drawing = run.config.dataset == "mnist"
  description = {
    "title": "Draw a digit" if is_drawing else "Choose an image",
    "subtitle": (
      f"{metadata['run']} · test accuracy {float(metadata['accuracy']):.2%} ·"
      f" {run.step:,} steps · {dtype} weights"
    ),
    "form": "drawing" if is_drawing else "file",
    "image_shape": run.image_shape,
    "class_names": run.class_names,
    "params": params,
    "ops": [_operation(op) for op in network.ops],
    "output": network.output,
  }
  page = PATH.read_text()
  page = page.replace(
    "$NETWORK", json.dumps(description).replace("<", "\\u003c")
  )
  return page.replace("$WEIGHTS", base64.b64encode(b"".join(blobs)).decode())


def _operation(op: trace.Op) -> dict[str, Any]:
  """Says which function of the page computes this, from what."""
  inputs = []
  for x in op.inputs:
    if not isinstance(x, str):
      if x.ndim or not np.isfinite(x):
        raise op.unsupported()
      x = x.item()
    inputs.append(x)
  params = op.params
  shape = op.input_shapes[0] if op.input_shapes else ()
  match op.primitive:
    case name if name in ELEMENTWISE:
      shapes = op.input_shapes
      if name == "integer_pow":
        inputs, shapes = [*inputs, params["y"]], [*shapes, ()]
      strides = [
        None if s == op.shape else _broadcast_strides(s, op.shape)
        for s in shapes
      ]
      details = {"op": "elementwise", "f": name, "shape": op.shape}
      details["strides"] = strides
    case "conv_general_dilated" if (
      tuple(params["dimension_numbers"]) == _NHWC
      and {*params["lhs_dilation"]} == {1}
      and params["batch_group_count"] == 1
    ):
      kernel = op.input_shapes[1]
      details = {
        "op": "conv",
        "groups": params["feature_group_count"],
        "inputs": shape[3],
        "outputs": kernel[3],
        "window": kernel[:2],
        "strides": params["window_strides"],
        "padding": [before for before, _ in params["padding"]],
        "dilation": params["rhs_dilation"],
      }
    case "reduce_window_max" | "reduce_window_sum" if (
      len(shape) == 4
      and {params["window_dimensions"][i] for i in (0, 3)} == {1}
      and {*params["base_dilation"]} == {1}
    ):
      details = {
        "op": "pool",
        "f": op.primitive[-3:],
        "features": shape[3],
        "window": params["window_dimensions"][1:3],
        "strides": params["window_strides"][1:3],
        "padding": [before for before, _ in params["padding"][1:3]],
        "dilation": params["window_dilation"][1:3],
      }
    case "dot_general" if (
      params["dimension_numbers"] == (*(((len(shape) - 1,), (0,)), ((), ())),)
      and len(op.input_shapes[1]) == 2
    ):
      sizes = [math.prod(shape[:-1]), *op.input_shapes[1]]
      details = {"op": "dot", "sizes": sizes}
    case "reduce_sum" | "reduce_max":
      axes = [axis for axis in range(len(shape)) if axis not in params["axes"]]
      axes += params["axes"]
      strides = _strides(shape)
      details = {
        "op": "reduce",
        "f": op.primitive[-3:],
        "shape": [shape[axis] for axis in axes],
        "strides": [strides[axis] for axis in axes],
        "inner": math.prod(shape[axis] for axis in params["axes"]),
      }
    case "reshape" | "squeeze":
      details = {"op": "same"}
    case "broadcast_in_dim":
      strides = [0] * len(op.shape)
      for axis, stride, size in zip(
        *(params["broadcast_dimensions"], _strides(shape), shape), strict=True
      ):
        strides[axis] = stride if size > 1 else 0
      details = {"op": "view", "shape": op.shape, "strides": strides}
    case "transpose":
      strides = [_strides(shape)[axis] for axis in params["permutation"]]
      details = {"op": "view", "shape": op.shape, "strides": strides}
    case "slice":
      strides = _strides(shape)
      starts = params["start_indices"]
      offset = sum(map(math.prod, zip(starts, strides, strict=True)))
      steps_ = params["strides"] or (1,) * len(shape)
      strides = [*map(math.prod, zip(steps_, strides, strict=True))]
      details = {"op": "view", "shape": op.shape, "strides": strides}
      details["offset"] = offset
    case "concatenate":
      axis = params["dimension"]
      chunks = [math.prod(s[axis:]) for s in op.input_shapes]
      details = {"op": "concatenate", "chunks": chunks}
      details["size"] = math.prod(op.shape)
    case _:
      raise op.unsupported()
  if details["op"] in ("conv", "pool"):
    details |= {"input": shape[1:3], "output": op.shape[1:3]}
  return {**details, "from": inputs, "to": op.output}


def _strides(shape: tuple[int, ...]) -> list[int]:
  return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _broadcast_strides(
  shape: tuple[int, ...], target: tuple[int, ...]
) -> list[int]:
  strides = [0] * (len(target) - len(shape))
  return strides + [
    stride if size > 1 else 0
    for stride, size in zip(_strides(shape), shape, strict=True)
  ]
