"""Writes a network as one HTML page that reads drawings or images offline."""

import base64
from collections.abc import Sequence
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np

import calibration
from exporting import trace
from rundir import runs
import steps

PATH = pathlib.Path(__file__).with_name("page.html")

# The elementwise primitives that the page implements.
ELEMENTWISE = set(
  "abs add and convert_element_type div eq exp expm1 ge gt le log"
  " logistic lt max min mul neg not or pow rsqrt select_n sqrt square sub"
  " tanh".split()
)
_NHWC = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def round_weights(variables: steps.Variables) -> steps.Variables:
  """Rounds a network's variables to what a page stores: float16."""
  return jax.tree.map(
    lambda x: np.float32(np.asarray(x, np.float16)), variables
  )


def build(run: runs.Run, name: str, accuracy: float | None) -> str:
  """Builds the page.

  Args:
    run: a run with rounded parameters.
    name: its name.
    accuracy: its accuracy on the test split, if that is known.

  Raises:
    errors.UserError: if the page cannot compute a layer.
  """
  images = jax.ShapeDtypeStruct((1, *run.image_shape), np.uint8)
  network = trace.trace(run.state, images)
  weights = [x.astype("<f2").tobytes() for x in network.params.values()]
  is_drawing = run.config.dataset == "mnist"
  scored = "not scored"
  if accuracy is not None:
    scored = f"test accuracy {accuracy:.2%}"
  description = {
    "title": "Draw a digit" if is_drawing else "Choose an image",
    "subtitle": f"{name} · {scored} · {run.step:,} steps",
    "form": "drawing" if is_drawing else "file",
    "image_shape": run.image_shape,
    "class_names": run.class_names,
    "params": [(name, x.size) for name, x in network.params.items()],
    "ops": [_operation(op) for op in network.ops],
    "output": network.output,
    "temperature": run.temperature,
    "sure": calibration.SURE,
  }
  # Some parameters are NumPy integers, which json cannot serialize.
  text = json.dumps(description, default=int).replace("<", "\\u003c")
  page = PATH.read_text().replace("$NETWORK", text)
  return page.replace("$WEIGHTS", base64.b64encode(b"".join(weights)).decode())


def _operation(op: trace.Op) -> dict[str, Any]:
  """Describes an operation as a call to one of the page's functions."""
  for x in op.inputs:
    if isinstance(x, np.ndarray) and (x.ndim or not np.isfinite(x)):
      raise op.unsupported()
  inputs = [x if isinstance(x, str) else x.item() for x in op.inputs]
  return {**_function(op), "from": inputs, "to": op.output}


def _function(op: trace.Op) -> dict[str, Any]:
  """Returns the name of the page's function and the sizes that it needs."""
  params, shape = op.params, op.input_shapes[0] if op.inputs else ()
  match op.primitive:
    case "convert_element_type" if np.issubdtype(
      params["new_dtype"], np.integer
    ):
      raise op.unsupported()  # The page has no integers.
    case name if name in ELEMENTWISE:
      views = [
        None if shape == op.shape else _strides(shape, op.shape)
        for shape in op.input_shapes
      ]
      return {**_view(op, views), "op": "elementwise", "f": name}
    case "conv_general_dilated" if (
      tuple(params["dimension_numbers"]) == _NHWC
      and max(*params["lhs_dilation"], params["batch_group_count"]) == 1
    ):
      *size, _, outputs = op.input_shapes[1]
      strides, dilation = params["window_strides"], params["rhs_dilation"]
      return {
        "op": "conv",
        "groups": params["feature_group_count"],
        "inputs": shape[3],
        "outputs": outputs,
        **_window(op, size, strides, params["padding"], dilation),
      }
    case "reduce_window_max" | "reduce_window_sum" if (
      len(shape) == 4
      and {params["window_dimensions"][axis] for axis in (0, 3)} == {1}
      and {*params["base_dilation"]} == {1}
    ):
      keys = "window_dimensions", "window_strides", "padding", "window_dilation"
      return {
        "op": "pool",
        "f": op.primitive[-3:],
        "features": shape[3],
        **_window(op, *(params[key][1:3] for key in keys)),
      }
    case "dot_general" if (
      params["dimension_numbers"] == (((len(shape) - 1,), (0,)), ((), ()))
      and len(op.input_shapes[1]) == 2
    ):
      rows = math.prod(shape[:-1])
      return {"op": "dot", "sizes": [rows, *op.input_shapes[1]]}
    case "reduce_sum" | "reduce_max":
      axes = sorted(range(len(shape)), key=lambda axis: axis in params["axes"])
      return {
        "op": "reduce",
        "f": op.primitive[-3:],
        "shape": [shape[axis] for axis in axes],
        "strides": [_strides(shape)[axis] for axis in axes],
        "inner": math.prod(shape[axis] for axis in params["axes"]),
      }
    case "reshape" | "squeeze":
      return {"op": "same"}
    case "broadcast_in_dim":
      axes = params["broadcast_dimensions"]
      return _view(op, _strides(shape, op.shape, axes))
    case "transpose":
      strides = _strides(shape)
      return _view(op, [strides[axis] for axis in params["permutation"]])
    case "slice":
      strides = _strides(shape)
      steps_ = params["strides"] or [1] * len(shape)
      offset = np.dot(params["start_indices"], strides)
      return _view(op, np.multiply(steps_, strides).tolist(), offset)
    case "concatenate":
      chunks = [math.prod(s[params["dimension"] :]) for s in op.input_shapes]
      size = math.prod(op.shape)
      return {"op": "concatenate", "chunks": chunks, "size": size}
    case _:
      raise op.unsupported()


def _view(op: trace.Op, strides: list, offset: int = 0) -> dict[str, Any]:
  return {"op": "view", "shape": op.shape, "strides": strides, "offset": offset}


def _window(op: trace.Op, size, strides, padding, dilation) -> dict[str, Any]:
  return {
    "input": op.input_shapes[0][1:3],
    "output": op.shape[1:3],
    "window": size,
    "strides": strides,
    "padding": [before for before, _ in padding],
    "dilation": dilation,
  }


def _strides(
  shape: Sequence[int],
  target: Sequence[int] | None = None,
  axes: Sequence[int] | None = None,
) -> list[int]:
  """Returns the strides of an array along each axis, in elements.

  Args:
    shape: the shape of the array.
    target: the shape to broadcast it to; by default its own.
    axes: the axes of the target that the array has; by default the last ones.
  """
  target = shape if target is None else target
  if axes is None:
    axes = range(len(target) - len(shape), len(target))
  strides = [0] * len(target)
  for axis, (k, size) in zip(axes, enumerate(shape), strict=True):
    strides[axis] = math.prod(shape[k + 1 :]) if size > 1 else 0
  return strides
