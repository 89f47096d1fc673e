"""The tutorial's network, trained as well as possible in 37 epochs.

python train.py --config=configs/accurate.py

Test accuracy: 99.68 ± 0.01% (mean and standard deviation of seeds 0 to 2)
after 44,000 steps, which take 18 minutes on two CPU cores. The ensemble of the
three runs reaches 99.70%.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
  """Uses AdamW, a cosine schedule, deformed digits and averaged parameters."""
  config = default.get_config()
  # The values below were chosen with 15,000 images held out. To watch a run,
  # 1,000 are enough.
  config.train_split = "train[1000:]"
  config.validation_split = "train[:1000]"
  config.batch_size = 50
  config.num_steps = 44000
  config.optimizer = "adamw"
  config.learning_rate = 0.0014
  config.schedule = "cosine"
  config.warmup_steps = config.get_oneway_ref("num_steps") // 22
  config.weight_decay = 0.05
  config.ema_decay = 0.9995
  config.dropout_rate = 0.5
  config.augment_rotation = 12.0
  config.augment_scale = 0.12
  config.augment_shear = 0.12
  config.augment_shift = 2.0
  config.augment_elastic = 20.0
  config.clean_steps = config.get_oneway_ref("num_steps") // 10
  return config
