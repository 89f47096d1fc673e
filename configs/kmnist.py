"""Kuzushiji-MNIST: cursive Japanese characters, arXiv 1812.01718.

python train.py --config=configs/kmnist.py

This downloads the data, or reads its four IDX files from
--config.manual_dir=DIR. Its accuracy has not been measured.
"""

import ml_collections

from configs import accurate


def get_config() -> ml_collections.ConfigDict:
  """Uses the recipe for digits, because the characters are handwritten too."""
  config = accurate.get_config()
  config.dataset = "kmnist"
  return config
