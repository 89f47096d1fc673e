"""Fashion-MNIST: articles of clothing, arXiv 1708.07747, in 10 epochs.

python train.py --config=configs/fashion_mnist.py

This downloads the data, or reads its four IDX files from
--config.manual_dir=DIR; Debian's package dataset-fashion-mnist has them in
/usr/share/datasets/fashion-mnist.

Test accuracy: 91.85 ± 0.26% (mean and standard deviation of seeds 0 to 2)
after 5,500 steps, which take 17 minutes on one CPU core.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
  """Uses SGD with momentum, a cosine schedule and shifted, scaled images."""
  config = default.get_config()
  config.dataset = "fashion_mnist"
  config.num_steps = 5500
  config.learning_rate = 0.05
  config.momentum = 0.9
  config.schedule = "cosine"
  config.warmup_steps = config.get_oneway_ref("num_steps") // 20
  config.ema_decay = 0.999
  config.augment_scale = 0.1
  config.augment_shift = 2.0
  return config
