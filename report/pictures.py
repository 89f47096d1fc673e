"""Draws what a run has learned."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import pathlib

from absl import logging
import jax
from matplotlib import figure
import ml_collections
import numpy as np

import augmentation
import calibration
import input_pipeline
from machine import compiling
from report import evaluation
from report import figures
from rundir import files
from rundir import logs
from rundir import runs
from rundir import trees
import steps

_NUM_DEFORMED = 20  # Images shown before and after augmentation.


def draw(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  data: input_pipeline.Data,
  state: steps.TrainState,
  probabilities: np.ndarray | jax.Array,
) -> None:
  """Draws a complete run, in its directory and in TensorBoard.

  Warns if a single picture cannot be drawn.

  Args:
    workdir: the run directory.
    config: its config.
    data: its data.
    state: the state after the last step.
    probabilities: predicted for the test split, [n, classes]; shown calibrated.
  """
  # Only one process draws, and it cannot compute on the others' devices.
  state, probabilities, train, test = jax.device_get(
    (state, probabilities, data.train, data.test)
  )
  temperature = runs.read_temperature(workdir, int(state.step))
  probabilities = calibration.apply(np.asarray(probabilities), temperature)
  evaluated = evaluation.measure(test, probabilities, data.class_names)
  drawings: dict[str, Callable[[], figure.Figure]] = {
    "learning_curve": lambda: figures.learning_curves(
      files.read_metrics(workdir), config.dropout_rate > 0
    ),
    **evaluation.drawings(evaluated),
    "activations": lambda: _activations(
      state, temperature, test, data.class_names
    ),
  }
  for name, kernel in trees.of_variables(state.eval_variables):
    if kernel.ndim == 4 and kernel.shape[2] == train.image_shape[-1]:
      drawings["filters"] = functools.partial(figures.filters, kernel, name)
      break  # The first layer that sees the image.
  if limits := augmentation.from_config(config):
    drawings["augmentation"] = lambda: _deformations(config, train, limits)
  # Event files of one second would have one name.
  with logs.open_tensorboard(workdir, filename_suffix=".pictures") as writer:
    for name, drawing in drawings.items():
      try:
        picture = drawing()
        figures.save(picture, workdir / f"{name}.png")
        writer.add_figure(name, picture, int(state.step), close=False)
      except Exception as error:
        logging.warning("The picture %s cannot be drawn: %s", name, error)


def activations(
  state: steps.TrainState, image: figures.Array
) -> tuple[dict[str, jax.Array], jax.Array]:
  """Returns what the layers compute for an image, and its probabilities.

  Args:
    state: the state that evaluation uses.
    image: float32 [height, width, channels] in [0, 1].

  Returns:
    The outputs of the submodules that have parameters, in order and by name,
    except the one that computes the logits: [height, width, features] or
    [features]. And the probabilities, [classes].
  """

  names: list[str] = []

  @compiling.jit
  def apply(variables, image):
    logits, captured = state.apply_fn(
      variables,
      image[None],
      capture_intermediates=True,
      mutable=["intermediates"],
    )
    # A module that shares its scope, as ConvPool does, comes last.
    outputs = {
      name: found["__call__"][-1]
      for name, found in captured["intermediates"].items()
      if name in state.params and "__call__" in found
    }
    outputs = {name: x[0] for name, x in outputs.items() if x is not logits}
    names[:] = outputs  # JAX would return a dict in alphabetical order.
    return list(outputs.values()), jax.nn.softmax(logits[0])

  layers, probabilities = apply(state.eval_variables, image)
  return dict(zip(names, layers, strict=True)), probabilities


def _activations(state, temperature, examples, class_names: Sequence[str]):
  image = examples.unflatten(examples.images)[0]
  layers, raw = activations(state, image.astype(np.float32) / 255)
  return figures.activations(
    *(image, examples.labels[0], layers),
    *(calibration.apply(np.asarray(raw), temperature), class_names),
  )


def _deformations(config, examples, limits):
  images = examples.unflatten(examples.images[:_NUM_DEFORMED])
  images = images.astype(np.float32) / 255
  augment = compiling.jit(functools.partial(steps.augment, limits=limits))
  rng = steps.rngs(config.seed).dropout
  return figures.deformations(images, augment(rng, 0, images))
