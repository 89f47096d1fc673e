"""The tutorial's network, trained as well as possible in 35 epochs.

python train.py --config=configs/accurate.py

99.63 ± 0.03 % of the test set (mean and standard deviation of seeds 0 to 2)
after 19,250 steps, in 58 minutes on one CPU core; the three together 99.69 %.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
  """AdamW under a cosine, deformed digits, and an average of the parameters."""
  config = default.get_config()
  config.num_steps = 19250
  config.optimizer = "adamw"
  config.learning_rate = 0.002
  config.schedule = "cosine"
  config.warmup_steps = 1000
  config.weight_decay = 0.05
  config.ema_decay = 0.9995
  config.dropout_rate = 0.5
  config.augment_rotation = 12.0
  config.augment_scale = 0.12
  config.augment_shear = 0.12
  config.augment_shift = 2.0
  config.augment_elastic = 20.0
  return config
