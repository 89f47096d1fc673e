import functools
import re

from conftest import jit
from conftest import pixels
import jax
import jax.numpy as jnp
import numpy as np

import augmentation
import input_pipeline
import steps

NONE = augmentation.Limits(0, 0, 0, 0, 0)


augment = functools.cache(
  lambda limits: jit(functools.partial(augmentation.augment, limits=limits))
)


def augmented(images, seed=0, **limits):
  deform = augment(NONE._replace(**limits))
  return np.asarray(deform(jax.random.key(seed), images))


def bars(count):
  """Returns images of one upright bar each, 4 pixels wide and 20 high."""
  images = np.zeros((count, 28, 28, 1), np.float32)
  images[:, 4:24, 12:16] = 1
  return images


def moments(images):
  """Returns the centers (row, column), the angles in degrees and the sizes.

  An image's angle is that of its long axis; its sizes are the standard
  deviations of its rows and columns.
  """
  rows, columns = np.indices(images.shape[1:3])
  weights = images[..., 0] / images.sum(axis=(1, 2, 3))[:, None, None]

  def mean(values):
    return (weights * values).sum(axis=(1, 2))

  row, column = mean(rows), mean(columns)
  rows = rows - row[:, None, None]
  columns = columns - column[:, None, None]
  angle = np.arctan2(2 * mean(rows * columns), mean(rows**2) - mean(columns**2))
  sizes = np.sqrt([mean(rows**2), mean(columns**2)])
  return np.stack([row, column]), np.degrees(angle) / 2, sizes


def test_no_deformation_changes_nothing(mnist):
  images = input_pipeline.to_float(pixels(mnist.train)[:5])
  np.testing.assert_allclose(augmented(images), images, atol=1e-5)


def test_images_are_shifted_within_the_limit():
  centers, angles, sizes = moments(augmented(bars(300), shift=2))
  offsets = centers - 13.5
  assert 1.9 < offsets.max() < 2.001
  assert -2.001 < offsets.min() < -1.9
  assert abs(np.corrcoef(offsets)[0, 1]) < 0.2
  np.testing.assert_allclose(angles, 0, atol=0.1)


def test_images_are_rotated_within_the_limit():
  centers, angles, _ = moments(augmented(bars(300), rotation=12))
  assert 11 < angles.max() < 12.5
  assert -12.5 < angles.min() < -11
  np.testing.assert_allclose(centers, 13.5, atol=0.05)


def test_images_are_scaled_within_the_limit():
  square = np.zeros((1, 28, 28, 1), np.float32)
  square[:, 6:22, 6:22] = 1
  _, _, before = moments(square)
  _, _, sizes = moments(augmented(np.tile(square, (300, 1, 1, 1)), scale=0.1))
  factors = sizes / before  # Interpolation adds about 0.005.
  assert ((factors > 1 / 1.11) & (factors < 1.11)).all()
  assert (factors.max(axis=1) > 1.09).all()
  assert (factors.min(axis=1) < 0.93).all()
  # Height and width are scaled independently.
  assert abs(np.corrcoef(factors)[0, 1]) < 0.2


def test_images_are_sheared_within_the_limit():
  """The rows move sideways, by up to the limit per row."""
  result = augmented(bars(300), shear=0.2)[..., 0]
  columns = (result * np.arange(28)).sum(axis=2) / result.sum(axis=2).clip(1e-9)
  slopes, _ = np.polyfit(np.arange(5, 23), columns[:, 5:23].T, 1)
  assert 0.18 < abs(slopes).max() < 0.201
  assert slopes.max() > 0.15 and slopes.min() < -0.15


def test_an_elastic_deformation_bends_a_bar():
  images = bars(50)
  result = augmented(images, elastic=8)
  assert result.shape == images.shape
  assert (abs(result - images).max(axis=(1, 2, 3)) > 0.1).all()
  # Neighbors move together, so the inside of the bar stays in one piece.
  np.testing.assert_array_equal(result[:, 10:18, 13:15] > 0.9, True)
  centers, _, _ = moments(result)
  assert abs(centers - 13.5).max() < 2


def test_deformed_images_stay_sharp(mnist):
  images = np.asarray(input_pipeline.to_float(pixels(mnist.train)[:300]))

  def contrast(images):
    return (np.diff(images[..., 0], axis=2) ** 2).mean()

  # Interpolating linearly in the original images would leave 0.67 and 0.70.
  assert contrast(augmented(images, shift=2)) > 0.8 * contrast(images)
  assert contrast(augmented(images, rotation=12)) > 0.8 * contrast(images)


def test_a_tpu_interpolates_to_the_same_values():
  rng = np.random.default_rng(0)
  image = np.float32(rng.random((12, 9, 3)))
  sources = np.float32(rng.uniform(-3, 14, (2, 20, 10)))  # Some are outside.
  sources[:, 0, :9] = np.arange(9)  # These are exactly on pixels.
  by_products = augmentation._interpolate_by_products(image, sources)
  np.testing.assert_allclose(by_products[0, :9], image.diagonal().T[:9])
  np.testing.assert_allclose(
    by_products,
    augmentation._interpolate_by_gathers(image, sources),
    atol=1e-5,
  )


def test_only_a_tpu_interpolates_by_products():
  images = jnp.zeros((2, 28, 28, 1))
  limits = NONE._replace(shift=2)
  lowered = jax.jit(functools.partial(augmentation.augment, limits=limits))
  traced = lowered.trace(jax.random.key(0), images)

  def count(operation, platform):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return len(re.findall(rf"= \"?stablehlo\.{operation}", text))

  gathers = [count("gather", name) for name in ("cpu", "cuda", "tpu")]
  assert gathers == [4, 4, 0]
  assert count("dot_general", "tpu") == count("dot_general", "cpu") + 1


def test_deformations_depend_only_on_the_key(mnist):
  images = input_pipeline.to_float(pixels(mnist.train)[:5])
  limits = dict(rotation=10, scale=0.1, shear=0.1, shift=2, elastic=8)
  first = augmented(images, **limits)
  np.testing.assert_array_equal(first, augmented(images, **limits))
  assert (
    (first != augmented(images, seed=1, **limits)).any(axis=(1, 2, 3)).all()
  )
  assert first.min() >= 0 and first.max() <= 1
  # All channels of an image are deformed alike; different images are not.
  same = np.tile(images[:1], (5, 1, 1, 3))
  result = augmented(same, **limits)
  np.testing.assert_allclose(result[..., 0], result[..., 2], atol=1e-6)
  assert (result[0] != result[1]).any()


def test_augmentation_is_off_if_all_limits_are_0(default_config):
  config = default_config.copy_and_resolve_references()
  assert augmentation.from_config(config) is None
  config.augment_shear = 0.5
  assert augmentation.from_config(config) == NONE._replace(shear=0.5)
  config.clean_steps = 1000
  assert augmentation.from_config(config).num_steps == 19000


def test_the_last_steps_are_not_augmented():
  images = jnp.arange(96.0).reshape(16, 2, 3, 1)
  limits = NONE._replace(flip=True, num_steps=2)
  augment = jit(functools.partial(steps.augment, limits=limits))
  is_same = [
    (augment(jax.random.key(0), step, images) == images).all()
    for step in range(4)
  ]
  assert is_same == [False, False, True, True]


def test_half_of_the_images_are_flipped_exactly():
  rng = np.random.default_rng(0)
  images = np.float32(rng.random((1000, 6, 5, 3)))
  result = augmented(images, flip=True)
  is_same = (result == images).all(axis=(1, 2, 3))
  is_flipped = (result == images[:, :, ::-1]).all(axis=(1, 2, 3))
  assert (is_same ^ is_flipped).all()
  assert 430 < is_flipped.sum() < 570
  assert (augmented(images, seed=1, flip=True) != result).any()
  # Flips come first, and leave the deformations as they are.
  shifted = augmented(images, shift=2)
  both = augmented(images, shift=2, flip=True)
  np.testing.assert_array_equal(both[is_same], shifted[is_same])
  assert (both[is_flipped] != shifted[is_flipped]).any()


def test_augment_flip_is_a_limit(default_config):
  config = default_config.copy_and_resolve_references()
  config.augment_flip = True
  assert augmentation.from_config(config) == NONE._replace(flip=True)
