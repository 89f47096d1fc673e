"""Random deformations of a batch of images."""

import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import ml_collections
import numpy as np
from scipy import ndimage

_ELASTIC_SIGMA = 4.0  # Pixels; a Gaussian this wide smooths displacements.
_FINENESS = 4  # Images are upscaled by this factor before sampling.


class Limits(NamedTuple):
  """How far images may be deformed, and for how many steps.

  Attributes:
    rotation: the largest angle, in degrees, either way.
    scale: 0.1 scales height and width by a factor of up to 1.1, up or down.
    shear: the largest sideways shift, in pixels per row from the center.
    shift: the largest shift along each axis, in pixels.
    elastic: the largest random displacement before smoothing, in pixels.
    flip: whether to flip half of the images, left to right.
    num_steps: how many training steps see deformed images; None for all.
  """

  rotation: float
  scale: float
  shear: float
  shift: float
  elastic: float
  flip: bool = False
  num_steps: int | None = None


def from_config(config: ml_collections.ConfigDict) -> Limits | None:
  """Returns the limits set by `augment_*`, or None if all are 0."""
  result = Limits(
    rotation=config.augment_rotation,
    scale=config.augment_scale,
    shear=config.augment_shear,
    shift=config.augment_shift,
    elastic=config.augment_elastic,
    flip=config.augment_flip,
  )
  if not any(result):
    return None
  if not config.clean_steps:
    return result
  return result._replace(num_steps=config.num_steps - config.clean_steps)


def augment(rng: jax.Array, images: jax.Array, limits: Limits) -> jax.Array:
  """Applies a different random deformation to each image.

  The elastic deformation is that of Simard, Steinkraus and Platt, "Best
  Practices for Convolutional Neural Networks Applied to Visual Document
  Analysis", 2003.

  Args:
    rng: this batch's key.
    images: float32 [B, height, width, channels] in [0, 1].
    limits: how far to deform them.

  Returns:
    Images of the same shape; pixels taken from outside an image are 0.
  """
  if limits.flip:
    flip_rng = jax.random.fold_in(rng, 5)
    is_flipped = jax.random.bernoulli(flip_rng, shape=(len(images), 1, 1, 1))
    images = jnp.where(is_flipped, images[:, :, ::-1], images)
  if not any(limits[:5]):
    return images
  rngs = jax.random.split(rng, 5)
  sources = _affine_sources(rngs, images.shape, limits)
  if limits.elastic:
    sources += _elastic_displacements(rngs[4], images.shape, limits.elastic)
  return _resample(images, sources)


def _uniform(rng, shape, limit):
  return jax.random.uniform(rng, shape, minval=-limit, maxval=limit)


def _affine_sources(
  rngs: jax.Array, shape: tuple[int, ...], limits: Limits
) -> jax.Array:
  """Draws a rotation, scale, shear and shift for each image.

  Returns:
    [B, 2, height, width], the (row, column) from which each pixel takes its
    value.
  """
  batch, height, width, _ = shape
  angle = _uniform(rngs[0], (batch,), math.radians(limits.rotation))
  scale = jnp.exp(_uniform(rngs[1], (batch, 2), math.log1p(limits.scale)))
  shear = _uniform(rngs[2], (batch,), limits.shear)
  shift = _uniform(rngs[3], (batch, 2), limits.shift)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  matrix = scale[:, :, None] * jnp.stack(
    [
      jnp.stack([cos - sin * shear, -sin], axis=-1),
      jnp.stack([sin + cos * shear, cos], axis=-1),
    ],
    axis=1,
  )
  center = np.array([height - 1, width - 1], np.float32)[:, None, None] / 2
  grid = np.indices((height, width), np.float32) - center
  sources = center + shift[:, :, None, None]
  return sources + jnp.einsum(
    "bij,jhw->bihw", matrix, grid, precision="highest"
  )


def _elastic_displacements(
  rng: jax.Array, shape: tuple[int, ...], limit: float
) -> jax.Array:
  """Draws a smooth field of displacements for each image.

  Returns:
    [B, 2, height, width], in pixels.
  """
  batch, height, width, _ = shape
  # A TPU draws random numbers four times as fast in long rows.
  field = _uniform(rng, (batch, 2 * height * width), limit)
  field = lax.optimization_barrier(field).reshape(batch, 2, height, width)
  rows, columns = (
    ndimage.gaussian_filter1d(np.eye(size), _ELASTIC_SIGMA, mode="constant")
    for size in (height, width)
  )
  return jnp.einsum("ij,bcjw,vw->bciv", rows, field, columns)


def _resample(images: jax.Array, sources: jax.Array) -> jax.Array:
  """Samples each pixel at its source, or 0 outside the image.

  Linear interpolation alone would blur the images, but evaluation sees sharp
  ones. After a 4x Lanczos upscale, it hardly blurs them.
  """
  batch, height, width, channels = images.shape
  fine = jax.image.scale_and_translate(
    images,
    (batch, _FINENESS * height, _FINENESS * width, channels),
    spatial_dims=(1, 2),
    scale=jnp.full(2, float(_FINENESS)),
    # Align the grids, so that every original pixel is in the upscaled image.
    translation=jnp.full(2, (1 - _FINENESS) / 2),
    method="lanczos3",
    precision="high",  # A TPU's default, bfloat16, is visibly coarser.
  )
  return _interpolate(jnp.clip(fine, 0, 1), _FINENESS * sources)


def _interpolate(images: jax.Array, sources: jax.Array) -> jax.Array:
  """Interpolates linearly, with 0 outside the image.

  A TPU gathers one number at a time, so it computes the same sums by matrix
  products instead; on a CPU, these would be slower.

  Args:
    images: [B, height, width, channels].
    sources: [B, 2, rows, columns], the (row, column) to sample.

  Returns:
    [B, rows, columns, channels].
  """
  return lax.platform_dependent(
    images,
    sources,
    tpu=jax.vmap(_interpolate_by_products),
    default=jax.vmap(_interpolate_by_gathers),
  )


def _interpolate_by_gathers(image, sources):
  def resample(channel):
    return jax.scipy.ndimage.map_coordinates(channel, [*sources], order=1)

  return jax.vmap(resample, in_axes=-1, out_axes=-1)(image)


def _interpolate_by_products(image, sources):
  """Sums all pixels, with weights that fall from 1 to 0 within one pixel."""

  def weights(positions, size):  # [size, values]
    distances = positions.ravel() - jnp.arange(size)[:, None]
    return jnp.maximum(1 - jnp.abs(distances), 0)

  height, width, _ = image.shape
  lines = jnp.einsum(
    "hwc,wv->chv", image, weights(sources[1], width), precision="high"
  )
  values = (lines * weights(sources[0], height)).sum(axis=1)
  return values.T.reshape(*sources.shape[1:], -1)
