"""Writes a network as an ONNX model, with only the `onnx` package."""

from collections.abc import Mapping
from collections.abc import Sequence
import math
from typing import Any
from typing import NamedTuple

import jax
import numpy as np
import onnx
from onnx import helper
from onnx import numpy_helper

from exporting import trace

OPSET, _IR_VERSION = 18, 8  # From 2022; all current runtimes read them.

_SAME = {  # Primitives with an equivalent operator.
  "abs": "Abs",
  "add": "Add",
  "and": "And",
  "div": "Div",
  "eq": "Equal",
  "erf": "Erf",
  "exp": "Exp",
  "ge": "GreaterOrEqual",
  "gt": "Greater",
  "le": "LessOrEqual",
  "log": "Log",
  "logistic": "Sigmoid",
  "lt": "Less",
  "max": "Max",
  "min": "Min",
  "mul": "Mul",
  "neg": "Neg",
  "not": "Not",
  "or": "Or",
  "pow": "Pow",
  "sqrt": "Sqrt",
  "sub": "Sub",
  "tanh": "Tanh",
}
_REDUCTIONS = {
  "reduce_max": "ReduceMax",
  "reduce_min": "ReduceMin",
  "reduce_sum": "ReduceSum",
}


def build(
  network: trace.Network,
  images: jax.ShapeDtypeStruct,
  metadata: Mapping[str, str],
) -> onnx.ModelProto:
  """Builds a model from `images` to `logits`, for any batch size.

  Args:
    network: the network, traced with these images.
    images: their shape and dtype, with a symbolic batch size.
    metadata: strings to store in the model, by name.

  Raises:
    errors.UserError: if ONNX cannot express a layer.
  """
  graph = _Graph(network.params)
  for op in network.ops:
    graph.values[op.output] = graph.convert(op)
  graph.add("Identity", graph.values[network.output], output="logits")
  inputs, outputs = (
    helper.make_tensor_value_info(
      name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), ("batch", *shape)
    )
    for name, dtype, shape in (
      ("images", images.dtype, images.shape[1:]),
      ("logits", np.float32, network.ops[-1].shape[1:]),
    )
  )
  model = helper.make_model(
    helper.make_graph(
      graph.nodes, "network", [inputs], [outputs], graph.initializers()
    ),
    opset_imports=[helper.make_opsetid("", OPSET)],
    ir_version=_IR_VERSION,
  )
  helper.set_model_props(model, dict(metadata))
  return model


class _Constant(NamedTuple):
  """A known array and the name to store it under."""

  name: str
  array: np.ndarray


def _is_same(a: np.ndarray, b: np.ndarray) -> bool:
  return a.dtype == b.dtype and np.array_equal(a, b)


class _Graph:
  """An ONNX graph under construction; `values` are named as in the trace."""

  def __init__(self, params: Mapping[str, np.ndarray]):
    self.nodes: list[onnx.NodeProto] = []
    self.values: dict[str, str | _Constant] = {
      name: _Constant(name, x) for name, x in params.items()
    }
    self.values["images"] = "images"
    self._arrays: dict[str, np.ndarray] = {}
    self._layer = ""

  def initializers(self) -> list[onnx.TensorProto]:
    return [numpy_helper.from_array(x, n) for n, x in self._arrays.items()]

  def name(self, value: Any) -> str:
    """Returns the name of a value in the graph; stores constants there."""
    if isinstance(value, str):
      return value
    if not isinstance(value, _Constant):
      value = _Constant("constant", np.asarray(value))
    name, count = value.name, 1
    while not _is_same(self._arrays.setdefault(name, value.array), value.array):
      name, count = f"{value.name}_{count}", count + 1
    return name

  def add(self, operator: str, *inputs: Any, output="", **attributes) -> str:
    """Appends a node and returns the name of its output."""
    layer = f"{self._layer}/".lstrip("/")
    output = output or f"{layer}{operator}_{len(self.nodes)}"
    self.nodes.append(
      helper.make_node(
        *(operator, [*map(self.name, inputs)], [output], output), **attributes
      )
    )
    return output

  def transpose(self, x: str | _Constant, axes: Sequence[int]):
    if isinstance(x, _Constant):
      return x._replace(array=x.array.transpose(axes))
    return self.add("Transpose", x, perm=axes)

  def reshape(self, x: str | _Constant, shape: Sequence[Any]):
    # At most one size depends on the batch size; ONNX infers it from -1.
    shape = [n if isinstance(n, int) else -1 for n in shape]
    if isinstance(x, _Constant):
      return x._replace(array=x.array.reshape(shape))
    return self.add("Reshape", x, np.array(shape))

  def convert(self, op: trace.Op) -> str | _Constant:
    """Appends the nodes of a primitive and returns its value."""
    self._layer, params = op.layer, op.params
    inputs = [
      self.values[x] if isinstance(x, str) else _Constant("constant", x)
      for x in op.inputs
    ]
    if not inputs:
      raise op.unsupported()
    x, last = inputs[0], op.inputs[-1]
    match op.primitive:
      case "max" if isinstance(last, np.ndarray) and not last.any():
        return self.add("Relu", x)
      case name if name in _SAME:
        return self.add(_SAME[name], *inputs)
      case name if name in _REDUCTIONS:
        axes = np.array(params["axes"])
        return self.add(_REDUCTIONS[name], x, axes, keepdims=0)
      case "conv_general_dilated":
        return self._conv(op, *inputs)
      case "reduce_window_max" | "reduce_window_sum":
        return self._pool(op, x)
      case "dot_general":
        lhs, rhs = map(len, op.input_shapes)
        if (params["dimension_numbers"], rhs) != (
          (((lhs - 1,), (0,)), ((), ())),
          2,
        ):
          raise op.unsupported()
        return self.add("MatMul", *inputs)
      case "reshape" | "squeeze":
        return self.reshape(x, op.shape)
      case "broadcast_in_dim":
        return self._broadcast(op, x)
      case "transpose":
        return self.transpose(x, params["permutation"])
      case "concatenate":
        return self.add("Concat", *inputs, axis=params["dimension"])
      case "slice":
        return self._slice(op, x)
      case "convert_element_type":
        to = np.dtype(params["new_dtype"])
        return self.add("Cast", x, to=helper.np_dtype_to_tensor_dtype(to))
      case "select_n" if len(inputs) == 3:
        return self.add("Where", x, inputs[2], inputs[1])
      case "square":
        return self.add("Mul", x, x)
      case "rsqrt":
        return self.add("Reciprocal", self.add("Sqrt", x))
      case "expm1":
        return self.add("Sub", self.add("Exp", x), np.float32(1))
      case _:
        raise op.unsupported()

  def _conv(self, op, x, kernel):
    params, numbers = op.params, op.params["dimension_numbers"]
    if max(*params["lhs_dilation"], params["batch_group_count"]) > 1:
      raise op.unsupported()
    before, after = zip(*params["padding"], strict=True)
    y = self.add(
      "Conv",
      self.transpose(x, numbers.lhs_spec),
      self.transpose(kernel, numbers.rhs_spec),
      pads=before + after,
      strides=params["window_strides"],
      dilations=params["rhs_dilation"],
      group=params["feature_group_count"],
    )
    return self.transpose(y, np.argsort(numbers.out_spec).tolist())

  def _pool(self, op, x):
    params, window = op.params, op.params["window_dimensions"]
    dilations = params["base_dilation"] + params["window_dilation"]
    if len(window) != 4 or (window[0], window[3], *dilations) != (1,) * 10:
      raise op.unsupported()
    before, after = zip(*params["padding"][1:3], strict=True)
    is_sum = op.primitive == "reduce_window_sum"
    y = self.add(
      "AveragePool" if is_sum else "MaxPool",
      self.transpose(x, (0, 3, 1, 2)),
      kernel_shape=window[1:3],
      strides=params["window_strides"][1:3],
      pads=before + after,
      **{"count_include_pad": 1} if is_sum else {},
    )
    y = self.transpose(y, (0, 2, 3, 1))
    return self.add("Mul", y, np.float32(math.prod(window))) if is_sum else y

  def _broadcast(self, op, x):
    shape = [1] * len(op.shape)
    for size, axis in zip(
      op.input_shapes[0], op.params["broadcast_dimensions"], strict=True
    ):
      shape[axis] = size
    x = self.reshape(x, shape)
    if tuple(shape) == op.shape:
      return x
    sizes = [
      np.array([size])
      if isinstance(size, int)
      else self.add("Shape", "images", start=0, end=1)
      for size in op.shape
    ]
    return self.add("Expand", x, self.add("Concat", *sizes, axis=0))

  def _slice(self, op, x):
    sizes = op.input_shapes[0]
    axes = [axis for axis, size in enumerate(op.shape) if size != sizes[axis]]
    ones = (1,) * len(sizes)  # JAX may leave out strides of 1.
    starts, limits, strides = (
      [(op.params[key] or ones)[axis] for axis in axes]
      for key in ("start_indices", "limit_indices", "strides")
    )
    inputs = np.array([starts, limits, axes, strides], np.int64)
    return self.add("Slice", x, *inputs)
