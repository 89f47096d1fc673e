"""The tutorial's recipe: plain SGD, 20,000 steps with batches of 100.

python train.py --config=configs/default.py
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns every key with its default; presets change a few."""
  config = ml_collections.ConfigDict()

  # Data: a name, and splits in the syntax of TFDS.
  config.dataset = "mnist"  # Or fashion_mnist, image_folder, idx, arrays, ...
  config.train_split = "train[5000:]"
  config.validation_split = "train[:5000]"
  config.test_split = "test"
  config.data_dir = ""  # Prepared data; "" is TFDS's ~/tensorflow_datasets.
  config.manual_dir = ""  # Your own images; "" is data/ beside train.py.
  config.image_size = 0  # Scale and crop the images of image_folder to this.

  # Training.
  config.batch_size = 100
  config.num_steps = 20000
  config.learning_rate = 0.001  # The peak, if the schedule varies it.
  config.schedule = "constant"  # Or one_cycle, cosine.
  config.warmup_steps = 0  # Steps until the peak.
  config.optimizer = "sgd"  # Or adam, adamw, nadamw.
  config.momentum = 0.0  # Nesterov momentum, for sgd.
  config.adam_b2 = 0.999  # Adam's second-moment decay rate.
  config.weight_decay = 0.0  # For the kernels, with adamw and nadamw.
  config.clip_norm = 0.0  # Above 0, gradients of a larger norm are scaled down.
  config.label_smoothing = 0.0  # 0.1 spreads a tenth evenly over all classes.
  config.ema_decay = 0.0  # Above 0, averaged parameters are evaluated.
  config.dropout_rate = 0.4
  config.dtype = "float32"  # Or bfloat16, for accelerators.
  config.seed = 0  # Determines everything that is random.
  config.init_from = ""  # Or a run directory: start from its last parameters.

  # Augmentation: the largest random deformations; 0 is off.
  config.augment_flip = False  # Half of the images, left to right.
  config.augment_rotation = 0.0  # Degrees, either way.
  config.augment_scale = 0.0  # 0.1: by a factor of up to 1.1, up or down.
  config.augment_shear = 0.0  # Pixels sideways per row.
  config.augment_shift = 0.0  # Pixels.
  config.augment_elastic = 0.0  # Pixels, before smoothing; 8 is visible.
  config.clean_steps = 0  # Final steps without augmentation.

  # Evaluation, logs and checkpoints.
  config.eval_batch_size = 1000
  config.log_every_steps = 100
  config.log_probabilities_every_steps = 0  # Off; the tutorial used 50.
  config.eval_every_steps = 1000
  config.checkpoint_every_steps = 1000

  config.lock()
  return config
