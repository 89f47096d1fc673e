"""The tutorial's recipe: plain SGD, 20,000 steps on batches of 100.

python train.py --config=configs/default.py
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Every key there is; other configs import this and change a few."""
  config = ml_collections.ConfigDict()

  # Data: a TFDS name, and splits in TFDS's syntax.
  config.dataset = "mnist"  # Or fashion_mnist, kmnist, idx, image_folder, ...
  config.train_split = "train[5000:]"
  config.validation_split = "train[:5000]"
  config.test_split = "test"
  config.data_dir = ""  # What is prepared; "": TFDS's ~/tensorflow_datasets.
  config.manual_dir = ""  # Your own images; "" is data/ beside train.py.

  # Training.
  config.batch_size = 100
  config.num_steps = 20000
  config.learning_rate = 0.001  # The peak, if the schedule varies it.
  config.schedule = "constant"  # Or one_cycle or cosine, to the last step.
  config.warmup_steps = 0  # Until the peak.
  config.optimizer = "sgd"  # Or adam, adamw, or nadamw, Nesterov's variant.
  config.momentum = 0.0  # Nesterov's, of sgd.
  config.adam_b2 = 0.999  # How slowly Adam forgets the squared gradients.
  config.weight_decay = 0.0  # Of the kernels, by adamw and nadamw.
  config.label_smoothing = (
    0.0  # 0.1 spreads a tenth of a label over all classes.
  )
  config.ema_decay = 0.0  # Above 0, an average of the parameters is evaluated.
  config.dropout_rate = 0.4
  config.dtype = "float32"  # Or bfloat16, for the layers on an accelerator.
  config.seed = 0  # Initial parameters, order and dropout all follow from it.

  # Random deformations of the training images; 0 is none.
  config.augment_rotation = 0.0  # Degrees, at most, to either side.
  config.augment_scale = 0.0  # 0.1: up to 1.1 times as large or small.
  config.augment_shear = 0.0  # Pixels sideways a row.
  config.augment_shift = 0.0  # Pixels.
  config.augment_elastic = 0.0  # Pixels, before smoothing; 8 is visible.
  config.clean_steps = 0  # The last ones, which see images as they are.

  # Evaluation, logs and checkpoints.
  config.eval_batch_size = 1000
  config.log_every_steps = 100
  config.log_probabilities_every_steps = 0  # 0: off. The tutorial used 50.
  config.eval_every_steps = 1000
  config.checkpoint_every_steps = 1000  # The best is kept of those evaluated.

  config.lock()
  return config
