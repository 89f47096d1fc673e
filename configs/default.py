"""The tutorial's recipe: plain SGD, 20,000 steps on batches of 100.

python train.py --config=configs/default.py
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Every key there is; other configs import this and change a few."""
  config = ml_collections.ConfigDict()

  # Data: a TFDS name, and splits in TFDS's syntax.
  config.dataset = "mnist"  # fashion_mnist, kmnist, or any prepared data set.
  config.train_split = "train[5000:]"
  config.validation_split = "train[:5000]"
  config.test_split = "test"
  config.data_dir = (
    ""  # Prepared data sets; "" is TFDS's ~/tensorflow_datasets.
  )
  config.manual_dir = ""  # IDX files of your own; "" is data/ beside train.py.

  # Training.
  config.batch_size = 100
  config.num_steps = 20000
  config.learning_rate = 0.001
  config.dropout_rate = 0.4
  config.dtype = "float32"  # Or bfloat16, of the layers; for accelerators.
  config.seed = 0  # Initial parameters, order and dropout all follow from it.

  # Evaluation, logs and checkpoints.
  config.eval_batch_size = 1000
  config.log_every_steps = 100
  config.log_probabilities_every_steps = 0  # 0: off. The tutorial used 50.
  config.eval_every_steps = 1000
  config.checkpoint_every_steps = 1000  # The best is kept of those evaluated.

  config.lock()
  return config
