"""Kuzushiji-MNIST: cursive Japanese characters, arXiv 1812.01718.

python train.py --config=configs/kmnist.py

Downloads it, or takes its four IDX files from --config.manual_dir=DIR. What it
reaches was not measured.
"""

import ml_collections

from configs import accurate


def get_config() -> ml_collections.ConfigDict:
  """What is good for digits, written by hand as well."""
  config = accurate.get_config()
  config.dataset = "kmnist"
  return config
