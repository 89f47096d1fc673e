import io

from matplotlib import image
import numpy as np

import pictures


def pixels(figure):
  """The [height, width, 4] pixels of a figure as a PNG file has them."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png")
  buffer.seek(0)
  return image.imread(buffer)


def test_learning_curves_draw_what_was_logged():
  records = [
    {"step": 1, "train_loss": 2.0, "train_accuracy": 0.1},
    {"step": 2, "train_loss": 1.0, "train_accuracy": 0.4},
    {"step": 2, "validation_loss": 0.9, "validation_accuracy": 0.6},
    {"step": 2, "test_loss": 0.8, "test_accuracy": 0.75},
  ]
  figure = pictures.learning_curves(records)
  loss, accuracy = figure.axes
  lines = {line.get_label(): line.get_xydata() for line in accuracy.lines}
  np.testing.assert_array_equal(
    lines["training, dropout on"], [[1, 0.1], [2, 0.4]]
  )
  np.testing.assert_array_equal(lines["validation"], [[2, 0.6]])
  np.testing.assert_array_equal(lines["test: 0.7500"], [[2, 0.75]])
  assert [len(line.get_xydata()) for line in loss.lines] == [2, 1, 1]
  assert loss.get_yscale() == "log"
  assert pixels(figure).std() > 0.05  # Not blank.
