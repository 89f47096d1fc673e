"""99 % in half an epoch: 590 steps on batches of 50, 29,500 images.

python train.py --config=configs/fast.py
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
  """AdamW in one cycle, on digits that are shifted by up to a pixel."""
  config = default.get_config()
  config.batch_size = 50
  config.num_steps = 590
  config.optimizer = "adamw"
  config.learning_rate = 0.004
  config.schedule = "one_cycle"
  config.warmup_steps = 59
  config.dropout_rate = 0.2
  config.augment_shift = 1.0
  return config
