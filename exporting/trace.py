"""Traces a network to a list of JAX primitives, for the export formats."""

from typing import Any
from typing import NamedTuple

import jax
from jax.extend import core
from jax.interpreters import partial_eval
import jax.numpy as jnp
import numpy as np

from machine import errors
from rundir import trees
import steps

_CALLS = ("jit", "pjit", "custom_jvp_call", "custom_vjp_call")


class Op(NamedTuple):
  """One primitive applied to arrays.

  Attributes:
    primitive: its name in JAX.
    layer: the module that computes it, such as CNN/conv1.
    inputs: names of parameters and of earlier outputs, or constants.
    input_shapes: the shapes of the inputs; the batch size may be symbolic.
    output: the name of the result.
    shape: the shape of the result.
    params: the parameters of the primitive.
  """

  primitive: str
  layer: str
  inputs: list[str | np.ndarray]
  input_shapes: list[tuple[Any, ...]]
  output: str
  shape: tuple[Any, ...]
  params: dict[str, Any]

  def unsupported(self) -> errors.UserError:
    """Returns the error to raise if a format has no equivalent."""
    return errors.UserError(
      f"model.py: {self.layer} computes {self.primitive} in a way that this"
      " format cannot express; --format=stablehlo takes any network"
    )


class Network(NamedTuple):
  """A network from "images" to logits.

  Attributes:
    ops: the operations, in the order of computation.
    params: the arrays that evaluation uses, by name, such as conv1/kernel.
    output: the name of the logits.
  """

  ops: list[Op]
  params: dict[str, np.ndarray]
  output: str


def trace(state: steps.TrainState, images: jax.ShapeDtypeStruct) -> Network:
  """Lists the operations of evaluation, all of them in float32.

  Args:
    state: the state of a run.
    images: [batch, height, width, channels], uint8 or float32; the batch size
      may be symbolic.

  Raises:
    errors.UserError: if a primitive has several results.
  """
  names, arrays = zip(*trees.of_variables(state.eval_variables), strict=True)

  def logits(variables, images):
    plain = state.replace(ema_params=None)
    return steps.eval_step(plain.starting_from(variables), images)

  closed = jax.make_jaxpr(logits)(state.eval_variables, images)
  # Leave out what the logits do not depend on, such as values that are sown.
  jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True], instantiate=True)
  closed = closed.replace(jaxpr=jaxpr)
  ops: list[Op] = []
  (output,) = _inline(closed, [*names, "images"], "", ops)
  assert isinstance(output, str)  # Logits are not a constant.
  params = dict(zip(names, map(np.asarray, arrays), strict=True))
  return Network(ops, params, output)


def _inline(
  closed: core.ClosedJaxpr,
  arguments: list[str | np.ndarray],
  layer: str,
  ops: list[Op],
) -> list[str | np.ndarray]:
  """Appends all primitives to ops, inlining calls; returns the outputs."""
  values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
  values |= zip(closed.jaxpr.invars, arguments, strict=True)

  def read(atom):
    value = atom.val if isinstance(atom, core.Literal) else values[atom]
    if isinstance(value, str):
      return value
    return np.asarray(value, np.float32 if _is_float(atom) else None)

  for eqn in closed.jaxpr.eqns:
    primitive, inputs = eqn.primitive.name, [*map(read, eqn.invars)]
    scope = "/".join(filter(None, (layer, str(eqn.source_info.name_stack))))
    if primitive in _CALLS:
      inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
      outputs = _inline(inner, inputs, scope, ops)
    elif primitive == "convert_element_type" and all(
      map(_is_float, (*eqn.invars, *eqn.outvars))
    ):
      outputs = inputs
    else:
      output = f"{primitive}_{len(ops)}"
      outputs = [output for _ in eqn.outvars]
      shapes = [*map(_shape, eqn.invars)]
      shape = _shape(eqn.outvars[0])
      if primitive == "integer_pow":
        primitive, power = "pow", np.asarray(eqn.params["y"], np.float32)
        inputs, shapes = [*inputs, power], [*shapes, ()]
      op = Op(primitive, scope, inputs, shapes, output, shape, eqn.params)
      if len(outputs) > 1:
        raise op.unsupported()
      ops.append(op)
    values |= zip(eqn.outvars, outputs, strict=True)
  return [*map(read, closed.jaxpr.outvars)]


def _shape(atom) -> tuple[Any, ...]:
  return atom.aval.shape


def _is_float(atom) -> bool:
  return jnp.issubdtype(atom.aval.dtype, jnp.floating)
