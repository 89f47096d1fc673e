"""Where images come from: TFDS, IDX files, image folders and photographs."""

import os

# Colab's CPU and GPU images combine protobuf 5 with a tensorflow-metadata made
# for 6. It works with both, but without this, TFDS cannot be imported there:
# https://github.com/tensorflow/metadata/issues/68
os.environ.setdefault("TEMPORARILY_DISABLE_PROTOBUF_VERSION_CHECK", "true")
