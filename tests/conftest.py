"""What the tests share: real MNIST, prepared once, and one short run."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from configs import default
import input_pipeline
import ops

PROJECT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
  """Lets the tests and their subprocesses compile each program once."""
  os.environ["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("jax"))
