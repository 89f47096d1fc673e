"""Arrays to matplotlib figures."""

from collections.abc import Mapping
from collections.abc import Sequence
import os
from typing import Any

from absl import app
from matplotlib import colors
from matplotlib import figure
from matplotlib import patches
from matplotlib import ticker
import numpy as np


def learning_curves(records: Sequence[dict[str, Any]]) -> figure.Figure:
  """Draws the loss and all other metrics against the step.

  Args:
    records: the lines of a metrics.jsonl.
  """
  keys = (key.partition("_") for record in records for key in record)
  splits = ("train", "validation", "test")
  metrics = dict.fromkeys(name for split, _, name in keys if split in splits)
  metrics = metrics or ["loss"]  # Nothing was logged yet.
  columns = len(metrics)
  picture = figure.Figure(figsize=(5 * columns, 3.6), layout="constrained")
  grid = picture.subplots(1, columns, squeeze=False)[0]
  for axes, metric in zip(grid, metrics, strict=True):
    for split, style in (
      (
        "train",
        dict(color="tab:gray", linewidth=1, label="training, dropout on"),
      ),
      ("validation", dict(color="tab:blue", marker="o", markersize=3)),
      ("test", dict(color="tab:red", marker="*", markersize=12, linestyle="")),
    ):
      key = f"{split}_{metric}"
      points = [(r["step"], r[key]) for r in records if key in r]
      if not points:
        continue
      style = {"label": split, **style}
      if split == "test":
        style["label"] = f"test: {points[-1][1]:.4f}"
      axes.plot(*zip(*points, strict=True), **style)
    axes.set_xlabel("step")
    axes.set_title(metric)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    axes.legend()
    if metric == "loss":
      axes.set_yscale("log")
      axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
      axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
      axes.yaxis.set_minor_formatter(ticker.NullFormatter())
  return picture


def compare_curves(runs: Mapping[str, Sequence[dict[str, Any]]]):
  """Draws the validation accuracy of several runs on one axis.

  Args:
    runs: the lines of each one's metrics.jsonl, by its name.
  """
  picture = figure.Figure(figsize=(8, 4.5), layout="constrained")
  axes = picture.subplots()
  for name, records in runs.items():
    key = "validation_accuracy"
    points = [(r["step"], r[key]) for r in records if key in r]
    if points:
      axes.plot(*zip(*points, strict=True), marker="o", ms=3, label=name)
  axes.set_xlabel("step")
  axes.set_title("validation accuracy")
  axes.grid(alpha=0.3)
  # Given here, as names that begin with _ are left out otherwise.
  names = [line.get_label() for line in axes.lines]
  axes.legend(axes.lines, names, fontsize="small")
  return picture


def confusion_matrix(
  matrix: np.ndarray, class_names: Sequence[str]
) -> figure.Figure:
  """Draws how often each class was taken for each.

  Args:
    matrix: int [classes, classes], rows are the true classes.
    class_names: of the rows and columns.
  """
  size = len(class_names)
  side = min(max(5.0, 0.55 * size), 20.0)
  picture = figure.Figure(figsize=(side + 0.6, side), layout="constrained")
  axes = picture.subplots()
  share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
  # Mistakes are rare: without this norm they would all look white.
  axes.imshow(share, cmap="Blues", norm=colors.PowerNorm(0.4, 0, 1))
  if size <= 30:
    for row, column in np.argwhere(matrix):
      color = "white" if share[row, column] > 0.3 else "black"
      text = str(matrix[row, column])
      axes.text(
        column, row, text, ha="center", va="center", color=color, fontsize=8
      )
    rotation = 90 if max(map(len, class_names)) > 2 else 0
    axes.set_xticks(range(size), class_names, rotation=rotation)
    axes.set_yticks(range(size), class_names)
  axes.set_xlabel("predicted class")
  axes.set_ylabel("true class")
  accuracy = np.trace(matrix) / max(matrix.sum(), 1)
  axes.set_title(f"accuracy {accuracy:.4f} of {matrix.sum():,}")
  return picture


def mistakes(
  images: np.ndarray,
  labels: np.ndarray,
  probabilities: np.ndarray,
  class_names: Sequence[str],
  count: int = 25,
) -> figure.Figure:
  """Draws the mistakes that the network was surest of.

  Args:
    images: uint8 [n, height, width, 1 or 3].
    labels: int [n].
    probabilities: [n, classes].
    class_names: of the labels.
    count: how many to draw at most.
  """
  confidences = probabilities.max(axis=1)
  predicted = probabilities.argmax(axis=1)
  wrong = np.flatnonzero(predicted != labels)
  worst = wrong[np.argsort(-confidences[wrong], kind="stable")][:count]
  columns = 5
  rows = max(1, -(-len(worst) // columns))
  picture = figure.Figure(figsize=(7.5, 0.5 + 1.75 * rows))
  picture.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.7 / (0.5 + 1.75 * rows))
  picture.suptitle(
    f"{len(wrong):,} of {len(labels):,} are wrong; the surest:", fontsize=11
  )
  for axes in (grid := picture.subplots(rows, columns).ravel()):
    axes.axis("off")
  for axes, index in zip(grid, worst, strict=False):
    _show(axes, images[index])
    axes.set_title(
      f"{index}: {class_names[labels[index]]}, taken for"
      f" {class_names[predicted[index]]}\n({confidences[index]:.0%} sure)",
      fontsize=8,
    )
  picture.set_layout_engine("constrained")
  return picture


def calibration(
  counts: np.ndarray, accuracies: np.ndarray, error: float
) -> figure.Figure:
  """Draws a reliability diagram: how often it is right when it is how sure.

  Args:
    counts: of examples, in bins of equal width of the predicted probability.
    accuracies: of each bin.
    error: the expected calibration error, to print.
  """
  picture = figure.Figure(figsize=(5, 5.5), layout="constrained")
  upper, lower = picture.subplots(2, 1, sharex=True, height_ratios=(3, 1))
  width = 1 / len(counts)
  centers = (np.arange(len(counts)) + 0.5) * width
  upper.bar(centers, accuracies, width, edgecolor="white")
  upper.plot([0, 1], [0, 1], "--", color="gray", label="as sure as right")
  upper.set_ylabel("accuracy")
  upper.set_title(f"expected calibration error {error:.4f}")
  upper.legend()
  lower.bar(centers, counts, width, edgecolor="white")
  lower.set_yscale("log")
  lower.set_ylabel("examples")
  lower.set_xlabel("probability of the predicted class")
  return picture


def filters(kernel: np.ndarray) -> figure.Figure:
  """Draws the filters of a first layer, [height, width, 1 or 3, features]."""
  channels = np.moveaxis(kernel, 2, 0)
  tiles = np.stack([_tile(channel) for channel in channels], axis=-1)
  height = 6 * tiles.shape[0] / tiles.shape[1] + 0.4  # With the title.
  picture = figure.Figure(figsize=(6, height), layout="constrained")
  axes = picture.subplots()
  axes.axis("off")
  limit = np.abs(kernel).max()
  if tiles.shape[-1] == 1:
    axes.imshow(tiles[..., 0], cmap="RdBu", vmin=-limit, vmax=limit)
    axes.set_title(f"blue adds, red subtracts; up to {limit:.2f}")
  else:
    axes.imshow(np.nan_to_num(tiles / (2 * limit) + 0.5, nan=1))
  return picture


def activations(
  image: np.ndarray,
  layers: Mapping[str, np.ndarray],
  probabilities: np.ndarray,
  class_names: Sequence[str],
) -> figure.Figure:
  """Draws an image and what each layer makes of it.

  Args:
    image: uint8 [height, width, 1 or 3].
    layers: outputs by name, [height, width, features] or [features].
    probabilities: [classes].
    class_names: of the classes.
  """
  columns = len(layers) + 2
  picture = figure.Figure(figsize=(3 * columns, 3.2), layout="constrained")
  first, *middle, last = picture.subplots(1, columns)
  _show(first, image)
  first.set_title("image")
  for axes, (name, output) in zip(middle, layers.items(), strict=True):
    axes.imshow(_tile(output), cmap="viridis")
    axes.set_title(f"{name} {list(output.shape)}")
  for axes in (first, *middle):
    axes.axis("off")
  _bars(last, probabilities, class_names)
  last.set_title("probabilities")
  return picture


def deformations(images: np.ndarray, deformed: np.ndarray) -> figure.Figure:
  """Draws images, and below each what augmentation made of it.

  Args:
    images: in [0, 1], [n, height, width, 1 or 3].
    deformed: of the same shape.
  """
  columns = min(len(images), 10)
  rows = len(images) // columns
  picture = figure.Figure(figsize=(columns, 2.2 * rows), layout="constrained")
  grid = picture.subplots(2 * rows, columns, squeeze=False)
  pairs = np.stack([images, deformed])[:, : rows * columns]
  pairs = pairs.reshape(2, rows, columns, *images.shape[1:]).swapaxes(0, 1)
  for axes, image in zip(
    grid.ravel(), pairs.reshape(-1, *images.shape[1:]), strict=True
  ):
    _show(axes, np.uint8(255 * image))
    axes.axis("off")
  return picture


def predictions(
  given: Sequence[np.ndarray],
  seen: np.ndarray,
  probabilities: np.ndarray,
  names: Sequence[str],
  class_names: Sequence[str],
  boxes: Sequence[tuple[int, int, int, int] | None] | None = None,
  doubts: Sequence[str] | None = None,
) -> figure.Figure:
  """Draws images as given, as the network sees them, and its probabilities.

  Args:
    given: n images, uint8 [height, width] or [height, width, 3].
    seen: uint8 [n, height, width, 1 or 3].
    probabilities: [n, classes].
    names: n names.
    class_names: of the classes.
    boxes: where in the image the digit is: left, top, right, bottom.
    doubts: why a prediction is unsure, or an empty text.
  """
  count = len(given)
  columns = max(1, int((count / 4) ** 0.5))  # About as many pixels each way.
  rows = -(-count // columns)
  picture = figure.Figure(
    figsize=(7 * columns, 1.7 * rows), layout="constrained"
  )
  grid = picture.subplots(
    rows, 3 * columns, squeeze=False, width_ratios=(1, 1, 2.2) * columns
  ).reshape(rows * columns, 3)
  for axes in grid[count:].ravel():
    axes.remove()
  boxes, doubts = boxes or [None] * count, doubts or [""] * count
  for axes, image, network, row, name, box, doubt in zip(
    grid[:count],
    given,
    seen,
    probabilities,
    names,
    boxes,
    doubts,
    strict=True,
  ):
    _show(axes[0], image)
    _show(axes[1], network)
    axes[0].axis("off")
    axes[1].axis("off")
    if box:
      left, top, right, bottom = box
      axes[0].add_patch(
        patches.Rectangle(
          *((left - 0.5, top - 0.5), right - left, bottom - top),
          **dict(fill=False, color="tab:orange"),
        )
      )
    short = name if len(name) <= 26 else f"…{name[-25:]}"
    axes[0].set_title(short, fontsize=8, parse_math=False)
    _bars(axes[2], row, class_names)
    best = row.argmax()
    unsure = f"\nunsure: {doubt}" if doubt else ""
    axes[2].set_title(
      f"{class_names[best]}: {row[best]:.1%}{unsure}", fontsize=9
    )
  return picture


def save(picture: figure.Figure, path: str | os.PathLike) -> None:
  """Writes a picture; app.UsageError names a path where that fails."""
  try:
    picture.savefig(path, dpi=120)
  except (OSError, ValueError) as error:
    reason = getattr(error, "strerror", None) or error
    raise app.UsageError(f"{path}: {reason}") from error


def _show(axes, image: np.ndarray) -> None:
  if image.ndim == 3 and image.shape[-1] == 1:
    image = image[..., 0]
  axes.imshow(image, cmap="gray", vmin=0, vmax=255)


def _bars(axes, probabilities: np.ndarray, class_names: Sequence[str]) -> None:
  positions = range(len(class_names))
  best = probabilities.argmax()
  axes.bar(
    positions,
    probabilities,
    color=["tab:orange" if i == best else "tab:gray" for i in positions],
  )
  rotation = 90 if max(map(len, class_names)) > 2 else 0
  axes.set_xticks(positions, class_names, rotation=rotation, fontsize=8)
  axes.set_ylim(0, 1)
  axes.spines[["top", "right"]].set_visible(False)


def _tile(output: np.ndarray) -> np.ndarray:
  """Lays [height, width, features] or [features] out, as square as it fills."""
  if output.ndim == 1:
    output = output[None, None]
  height, width, count = output.shape
  columns = int(np.ceil(np.sqrt(count)))
  while count % columns:
    columns += 1
  rows = count // columns
  gap = 1 if height > 1 else 0
  tiles = np.full((rows * (height + gap), columns * (width + gap)), np.nan)
  for index in range(count):
    top, left = divmod(index, columns)
    top, left = top * (height + gap), left * (width + gap)
    tiles[top : top + height, left : left + width] = output[..., index]
  return tiles
