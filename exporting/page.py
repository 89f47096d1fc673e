"""Writes a network as one HTML page that reads drawings or images offline."""

import base64
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
  # Elements have one byte, so that NumPy's strides count elements.
  inputs = [np.empty(s, np.int8) for s in op.input_shapes]
  x: np.ndarray = inputs[0] if inputs else np.empty((), np.int8)
  params, shape = op.params, x.shape
  match op.primitive:
    case "convert_element_type" if np.issubdtype(
      params["new_dtype"], np.integer
    ):
      raise op.unsupported()  # The page has no integers.
    case name if name in ELEMENTWISE:
      views = [
        None if a.shape == op.shape else np.broadcast_to(a, op.shape).strides
        for a in inputs
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
        "shape": x.transpose(axes).shape,
        "strides": x.transpose(axes).strides,
        "inner": math.prod(shape[axis] for axis in params["axes"]),
      }
    case "reshape" | "squeeze":
      return {"op": "same"}
    case "broadcast_in_dim":
      new = {*range(len(op.shape))} - {*params["broadcast_dimensions"]}
      expanded = np.expand_dims(x, tuple(new))
      return _view(op, np.broadcast_to(expanded, op.shape).strides)
    case "transpose":
      return _view(op, x.transpose(params["permutation"]).strides)
    case "slice":
      strides = np.multiply(x.strides, params["strides"] or 1)
      offset = np.dot(x.strides, params["start_indices"])
      return _view(op, strides.tolist(), offset)
    case "concatenate":
      chunks = [math.prod(s[params["dimension"] :]) for s in op.input_shapes]
      size = math.prod(op.shape)
      return {"op": "concatenate", "chunks": chunks, "size": size}
    case _:
      raise op.unsupported()


def _view(op: trace.Op, strides, offset: int = 0) -> dict[str, Any]:
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
