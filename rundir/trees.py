"""Names the arrays in a tree, such as parameters, and compares two trees."""

from collections.abc import Iterator
import os
from typing import Any

import jax
import numpy as np

from machine import errors


class OtherNetworkError(errors.UserError):
  """Raised if a run's network or optimizer is not that of the code."""


def named(tree: Any) -> Iterator[tuple[str, Any]]:
  """Yields the arrays of a tree with their names, such as conv1/kernel."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def of_variables(variables: Any) -> Iterator[tuple[str, Any]]:
  """Yields a network's arrays, with "params/" left out of their names."""
  for name, array in named(variables):
    yield name.removeprefix("params/"), array


def num_bytes(tree: Any) -> int:
  """Returns the size of a tree's arrays, or of those that its shapes are of."""
  return sum(x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def shapes(tree: Any) -> dict[str, str]:
  """Maps the name of each array to its dtype and shape."""
  return {
    name: f"{np.dtype(x.dtype).name} {list(x.shape)}" for name, x in named(tree)
  }


def check_same_network(path: str | os.PathLike, state: Any, found: Any) -> None:
  """Checks that two trees have the same names, shapes and dtypes.

  Args:
    path: where `found` comes from, for the message.
    state: the expected tree.
    found: the actual tree.

  Raises:
    OtherNetworkError: if an array differs; the message names the first.
  """
  ours, theirs = shapes(state), shapes(found)
  for name in sorted(ours.keys() | theirs.keys()):
    if ours.get(name) != theirs.get(name):
      raise OtherNetworkError(
        f"{path} is from another network or optimizer: {name} is"
        f" {theirs.get(name, 'missing')} there and"
        f" {ours.get(name, 'missing')} here"
      )
