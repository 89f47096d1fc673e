import io

from matplotlib import figure as matplotlib_figure
from matplotlib import image
import numpy as np
import pytest

from machine import errors
from report import figures


def pixels(figure):
  """Returns a figure's pixels in a PNG file, [height, width, 4]."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png")
  buffer.seek(0)
  return image.imread(buffer)


def test_a_picture_gets_exactly_the_name_that_was_given(tmp_path):
  folder = tmp_path / "new"
  for name in ("sheet", "sheet.v2.svg"):
    figures.save(matplotlib_figure.Figure(), folder / name)
  assert (folder / "sheet").read_bytes().startswith(b"\x89PNG")
  assert (folder / "sheet.v2.svg").read_bytes().startswith(b"<?xml")
  assert len([*folder.iterdir()]) == 2


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_only_drawn_pictures_are_replaced(suffix, tmp_path):
  path = tmp_path / f"1.{suffix}"
  path.write_bytes(b"a photograph")
  with pytest.raises(errors.UserError) as error:
    figures.save(matplotlib_figure.Figure(), path)
  assert str(error.value) == (
    f"{path}: exists and was not drawn by Matplotlib; name another file"
  )
  assert path.read_bytes() == b"a photograph"
  path.write_bytes(b"")  # As mktemp leaves it.
  figures.save(matplotlib_figure.Figure((1, 1)), path)
  size = path.stat().st_size
  figures.save(matplotlib_figure.Figure((2, 2)), path)
  assert path.stat().st_size > size


def test_learning_curves_show_what_was_logged():
  records = [
    {"step": 1, "train_loss": 2.0, "train_accuracy": 0.1},
    {"step": 2, "train_loss": 1.0, "train_accuracy": 0.4},
    {"step": 2, "validation_loss": 0.9, "validation_accuracy": 0.6},
    {"step": 1, "test_loss": 0.9, "test_accuracy": 0.5},  # Extended later.
    {"step": 2, "test_loss": 0.8, "test_accuracy": 0.75},
  ]
  figure = figures.learning_curves(records, has_dropout=True)
  loss, error = figure.axes
  lines = {line.get_label(): line.get_xydata() for line in error.lines}
  assert error.get_title() == "error rate"
  np.testing.assert_allclose(
    lines["training, with dropout"], [[1, 0.9], [2, 0.6]]
  )
  np.testing.assert_allclose(lines["validation"], [[2, 0.4]])
  np.testing.assert_allclose(
    lines["test: accuracy 0.7500"], [[1, 0.5], [2, 0.25]]
  )
  assert [len(line.get_xydata()) for line in loss.lines] == [2, 1, 2]
  for axes in (loss, error):
    assert axes.get_yscale() == "log"
  assert pixels(figure).std() > 0.05  # Not blank.
  perfect = figures.learning_curves([{"step": 1, "test_accuracy": 1.0}])
  assert perfect.axes[-1].get_yscale() == "linear"
  (loss,) = figures.learning_curves([{"step": 1, "train_loss": 2.0}]).axes
  assert loss.lines[0].get_label() == "training"


def test_confusion_matrix_shows_the_counts():
  matrix = np.array([[8, 2], [0, 10]])
  figure = figures.confusion_matrix(matrix, ("cat", "dog"))
  (axes,) = figure.axes
  counts = {text.get_position()[::-1]: text.get_text() for text in axes.texts}
  assert counts == {(0, 0): "8", (0, 1): "2", (1, 1): "10"}
  # Equal counts have equal colors.
  np.testing.assert_array_equal(axes.images[0].get_array(), matrix)
  assert (axes.get_ylabel(), axes.get_xlabel()) == (
    "true class",
    "predicted class",
  )
  assert [label.get_text() for label in axes.get_yticklabels()] == [
    "cat",
    "dog",
  ]
  assert axes.get_title() == "accuracy 0.9000 on 20 examples"
  assert pixels(figure).std() > 0.05


def test_mistakes_are_the_most_confident_ones():
  images = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 1), np.uint8)
  labels = np.array([0, 1, 1, 0])
  probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.2, 0.8]])
  figure = figures.mistakes(images, labels, probabilities, ("a", "b"), count=2)
  assert [axes.get_title() for axes in figure.axes] == [
    "#2: b\nread as a\n80% sure",
    "#3: a\nread as b\n80% sure",
  ]
  assert figure.get_suptitle() == "3 of 4 wrong; most confident first"
  np.testing.assert_array_equal(
    figure.axes[0].images[0].get_array(), images[2, ..., 0]
  )
  assert pixels(figure).std() > 0.05
  none = figures.mistakes(images, labels, np.eye(2)[labels], ("a", "b"))
  assert none.get_suptitle() == "0 of 4 wrong"
  assert not none.axes


def test_deformations_are_below_their_originals():
  images = np.linspace(0, 1, 23).reshape(23, 1, 1, 1) * np.ones((28, 28, 3))
  figure = figures.deformations(images, 1 - images)
  shown = [int(axes.images[0].get_array()[0, 0, 0]) for axes in figure.axes]
  expected = np.uint8(255 * images[:20, 0, 0, 0]).astype(int)
  below = np.uint8(255 * (1 - images[:20, 0, 0, 0])).astype(int)
  assert shown == [*expected[:10], *below[:10], *expected[10:], *below[10:]]
  assert len(figures.deformations(images[:3], images[:3]).axes) == 6


@pytest.mark.parametrize("losses", [(2.3, 2.302), (2.3, 0.3), (2.3, 0.01)])
def test_the_axes_of_a_short_run_have_distinct_labels(losses):
  records = [
    {"step": step, "train_loss": loss}
    for step, loss in zip((19, 21), losses, strict=True)
  ]
  figure = figures.learning_curves(records)
  pixels(figure)  # Draws the labels.
  (axes,) = figure.axes
  for axis, (low, high) in (
    (axes.xaxis, axes.get_xlim()),
    (axes.yaxis, axes.get_ylim()),
  ):
    labels = [
      label.get_text()
      for label, at in zip(
        axis.get_ticklabels(), axis.get_ticklocs(), strict=True
      )
      if low <= at <= high
    ]
    assert len(labels) == len(set(labels)) >= 3, labels


def test_calibration_shows_the_accuracy_of_each_bin():
  counts, accuracies = np.array([0, 12, 6]), np.array([0, 0.5, 1])
  upper, lower = figures.calibration(counts, accuracies, 0.1).axes
  empty, sure, unsure = upper.patches  # With many examples and with few.
  assert (sure.get_center()[0], sure.get_height()) == (0.5, 0.5)
  assert (empty.get_height(), unsure.get_height()) == (0, 1)
  assert sure.get_facecolor() != unsure.get_facecolor()
  assert [bar.get_height() for bar in lower.patches] == [*counts]
  assert upper.get_title() == (
    "expected calibration error 0.1000\n"
    "dashed: calibrated; pale: fewer than 10 examples"
  )
  assert pixels(upper.figure).std() > 0.05


def test_names_are_shown_verbatim():
  name = "$_$.png"  # Not TeX.
  image = np.zeros((2, 2), np.uint8)
  probabilities = np.full((1, 2), 0.5)
  figure = figures.predictions(
    [image], image[None], probabilities, [name], ("a", "b"), [None], [""]
  )
  assert pixels(figure).std() > 0.05
  runs = [[{"step": 2, "validation_accuracy": 0.5}]]
  figure = figures.compare_curves([runs, runs], ["", "run", "_a", name])
  texts = [text.get_text() for text in figure.legends[0].texts]
  assert texts == ["run", "_a", name]
  assert pixels(figure).std() > 0.05


def test_filters_and_activations_show_every_feature():
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(5, 5, 1, 32))
  figure = figures.filters(kernel, "conv1/kernel")
  axes, colorbar = figure.axes
  assert axes.get_title() == "conv1/kernel, 32 filters"
  limit = abs(kernel).max()
  assert colorbar.get_ylim() == (-limit, limit)
  drawn = axes.images[0].get_array()
  np.testing.assert_array_equal(drawn[:5, :5], kernel[:, :, 0, 0])
  np.testing.assert_array_equal(drawn[6:11, 12:17], kernel[:, :, 0, 8])
  np.testing.assert_allclose(drawn.compressed().sum(), kernel.sum())
  layers = {"conv": rng.normal(size=(3, 3, 5)), "dense": rng.normal(size=7)}
  figure = figures.activations(
    np.zeros((28, 28, 1), np.uint8), 1, layers, np.full(2, 0.5), ("a", "b")
  )
  assert figure.axes[0].get_title() == "image: b"
  assert figure.axes[2].get_title() == (
    "dense [7], before activation\nblue: positive, red: negative"
  )
  _, conv, dense, _ = (axes.images for axes in figure.axes)
  for (drawn,), output in ((conv, layers["conv"]), (dense, layers["dense"])):
    values = drawn.get_array().compressed()
    np.testing.assert_allclose(
      np.sort(values)[::-1][:5], np.sort(output.ravel())[::-1][:5]
    )
    assert values.size == output.size
  assert pixels(figure).std() > 0.05


def test_predictions_are_drawn():
  rng = np.random.default_rng(0)
  given = [np.zeros((9, 5), np.uint8), np.zeros((4, 4, 3), np.uint8)]
  seen = rng.integers(0, 256, (2, 28, 28, 1), np.uint8)
  probabilities = np.array([[0.25, 0.75], [0.9, 0.1]])
  names = "x.png", "y.png"
  figure = figures.predictions(
    given, seen, probabilities, names, ("a", "b"), [None] * 2, [""] * 2
  )
  assert [axes.get_title() for axes in figure.axes] == [
    *("x.png", "what the network sees", "b: 75.0%"),
    *("y.png", "", "a: 90.0%"),
  ]
  shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
  for actual, expected in zip(
    shown, (given[0], seen[0, ..., 0], given[1], seen[1, ..., 0]), strict=True
  ):
    np.testing.assert_array_equal(actual, expected)
  heights = [bar.get_height() for bar in figure.axes[2].patches]
  np.testing.assert_allclose(heights, probabilities[0])
  assert pixels(figure).std() > 0.05


def test_the_seeds_of_an_experiment_are_one_line_with_a_band():
  first = [
    {"step": 1, "train_accuracy": 0.25},
    {"step": 2, "train_accuracy": 0.5, "validation_accuracy": 0.75},
    {"step": 4, "validation_accuracy": 0.875},
    {"step": 5, "validation_accuracy": 0.875},
  ]
  # This seed was evaluated at other steps, and has not come as far.
  second = [
    {"step": step, "validation_accuracy": accuracy}
    for step, accuracy in ((2, 0.5), (3, 0.625), (4, 0.625))
  ]
  figure = figures.compare_curves(
    [[first, second], [[]]], ["", "seed", "a", "b"]
  )
  (axes,) = figure.axes
  lines = [line.get_xydata() for line in axes.lines if len(line.get_xdata())]
  np.testing.assert_array_equal(lines[0], [[1, 0.75], [2, 0.5]])
  mean = [[2, 0.375], [3, 0.28125], [4, 0.25], [5, np.nan]]
  np.testing.assert_array_equal(lines[1], mean)
  assert len(lines) == 2
  (band,) = axes.collections[0].get_paths()
  assert {(x, y) for x, y in band.vertices} == {
    *((2, 0.25), (3, 0.1875), (4, 0.125)),
    *((2, 0.5), (3, 0.375), (4, 0.375)),
  }
  assert axes.get_title() == (
    "error rate: validation (dots) and training (pale)\n"
    "mean of the seeds, in a band from the lowest to the highest"
  )


@pytest.mark.parametrize("width", [10, 120])
@pytest.mark.parametrize("count", [1, 7, 10, 40, 120])
def test_any_number_of_runs_can_be_told_apart(count, width):
  rng = np.random.default_rng(0)
  runs = [
    [
      [
        {"step": step, f"{split}_accuracy": 1 - rng.uniform(0.5, 1) / step}
        for step in range(1, 20)
        for split in ("train", "validation")
      ]
    ]
    for _ in range(count)
  ]
  labels = [f"{'x' * width} {n}" for n in range(count)]
  figure = figures.compare_curves(runs, ["", "run", *labels])
  drawn = pixels(figure)
  (axes,), (legend,) = figure.axes, figure.legends
  shown = min(count, 50)
  assert [text.get_text() for text in legend.texts[1:]] == labels[:shown]
  styles = {
    (line.get_linestyle(), str(line.get_color()))
    for line in axes.lines
    if line.get_marker() == "o"
  }
  assert len(styles) == shown
  assert ("the best 50 of 120" in axes.get_title()) == (count == 120)
  # Nothing is cut off, and most of the picture is the plot.
  area = figure.bbox
  for artist in (legend, axes.title):
    box = artist.get_window_extent()
    assert box.x0 >= 0 and box.y0 >= 0
    assert box.x1 <= area.x1 and box.y1 <= area.y1
  inner = axes.get_window_extent()
  assert inner.width * inner.height > 0.25 * area.width * area.height
  assert drawn.std() > 0.05


def test_a_sheet_of_many_images_has_boxes_and_doubts():
  image = np.zeros((40, 30), np.uint8)
  figure = figures.predictions(
    *([image] * 50, np.zeros((50, 28, 28, 1), np.uint8)),
    *(np.full((50, 2), 0.5), ["a"] * 50, ("a", "b")),
    boxes=[(5, 10, 15, 30)] + [None] * 49,
    doubts=["ink touches the edge"] + [""] * 49,
  )
  width, height = figure.get_size_inches()
  assert 0.5 < width / height < 2
  (box,) = figure.axes[0].patches
  assert box.get_bbox().bounds == (4.5, 9.5, 10, 20)
  assert not figure.axes[3].patches
  assert figure.axes[2].get_title().endswith("\nunsure: ink touches the edge")
