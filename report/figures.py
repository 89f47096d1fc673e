"""Draws arrays as matplotlib figures."""

from collections.abc import Mapping
from collections.abc import Sequence
import io
import pathlib
from typing import Any

import jax
import matplotlib
from matplotlib import colors
from matplotlib import figure
from matplotlib import patches
from matplotlib import rcsetup
from matplotlib import ticker
import numpy as np

from machine import errors
from rundir import files

# Okabe and Ito's colors, which color-blind people can tell apart:
# https://jfly.uni-koeln.de/color/.
_BLUE, _ORANGE, _RED = "#0072b2", "#e69f00", "#d55e00"
_CYCLE = (_BLUE, _ORANGE, "#009e73", _RED, "#cc79a7", "#56b4e9", "black")
_DASHES = ("-", "--", "-.", ":")
_GRAY = "#808080"
# Decorates functions that draw, so that all figures look alike.
styled = matplotlib.rc_context(
  {
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": rcsetup.cycler(color=_CYCLE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "grid.alpha": 0.3,
    "legend.edgecolor": "none",
  }
)
Array = np.ndarray | jax.Array  # On the host, or on a device.
_FEW = 10  # With fewer examples, the accuracy of a bin says little.


@styled
def learning_curves(
  records: Sequence[dict[str, Any]], has_dropout: bool = False
) -> figure.Figure:
  """Draws the loss, the error rate and all other metrics against the step.

  Args:
    records: the lines of a metrics.jsonl.
    has_dropout: whether training metrics are measured with dropout.
  """
  keys = (key.partition("_") for record in records for key in record)
  splits = ("train", "validation", "test")
  logged = dict.fromkeys(name for split, _, name in keys if split in splits)
  metrics = list(logged) or ["loss"]  # If nothing was logged.
  columns = len(metrics)
  picture = figure.Figure(figsize=(5 * columns, 3.6))
  grid = picture.subplots(1, columns, squeeze=False)[0]
  training = "training, with dropout" if has_dropout else "training"
  styles = {
    "train": dict(color=_GRAY, linewidth=1, label=training),
    "validation": dict(color=_BLUE, marker="o", markersize=3),
    "test": dict(  # Hollow, so that it hides nothing.
      color=_RED, marker="*", markersize=14, fillstyle="none", linestyle=""
    ),
  }
  for axes, metric in zip(grid, metrics, strict=True):
    for split, style in styles.items():
      points = _points(records, f"{split}_{metric}")
      if len(points):
        style = {"label": split, **style}
        if len(points) == 1:
          style.setdefault("marker", "o")
        if split == "test":
          style["label"] = f"test: {metric} {points[-1, 1]:.4f}"
        at, values = points.T
        axes.plot(at, 1 - values if metric == "accuracy" else values, **style)
    _finish(axes, metric)
    axes.legend()
  return picture


@styled
def compare_curves(
  groups: Sequence[Sequence[Sequence[dict[str, Any]]]], legend: Sequence[str]
) -> figure.Figure:
  """Draws the error rates of experiments, at most 50, in one plot.

  Args:
    groups: the lines of metrics.jsonl of each run of each experiment. The runs
      of one differ only in the seed; the best experiment comes first.
    legend: two lines of a header, then one for each experiment.
  """
  count = min(len(groups), 50)
  width, height = 0.6 + 0.075 * max(map(len, legend)), 0.6 + 0.17 * count
  size = 6.4 + width, max(4.5, 0.4 + height)
  if is_wide := width > 4.5:  # Then the legend is below the plot.
    size = max(8, width), 4.5 + height
  picture = figure.Figure(figsize=size)
  axes = picture.subplots()
  title, palette = "error rate: validation (dots)", list(_CYCLE)
  if is_crowded := count > len(
    palette
  ):  # From dark to light, as in the legend.
    palette = list(matplotlib.colormaps["viridis"](np.linspace(0, 0.93, count)))
  else:
    title += " and training (pale)"
  handles = axes.plot([], [], " ")  # Aligns the header with the labels.
  for color, dashes, runs in zip(
    palette, _DASHES * count, groups, strict=False
  ):
    style: Any = dict(color=color, ls=dashes if is_crowded else "-")
    if not is_crowded:
      steps, rates = _error_rates(runs, "train")
      axes.plot(steps, rates.mean(axis=0), lw=1, alpha=0.3, **style)
    steps, rates = _error_rates(runs, "validation")
    handles += axes.plot(steps, rates.mean(axis=0), marker="o", ms=3, **style)
    low, high = rates.min(axis=0), rates.max(axis=0)
    axes.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
  _finish(axes, "accuracy")
  if any(len(runs) > 1 for runs in groups):
    title += "\nmean of the seeds, in a band from the lowest to the highest"
  if count < len(groups):
    title += f"\nthe best {count} of {len(groups)}"
  axes.set_title(title)
  box = picture.legend(
    *(handles, ["\n".join(filter(None, legend[:2])), *legend[2:]][: count + 1]),
    loc="outside lower center" if is_wide else "outside right upper",
    handlelength=3,
    prop={"family": "monospace", "size": 8},
  )
  for text in box.texts:
    text.set_parse_math(False)
  return picture


def _error_rates(runs, split: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns steps, [n], and the error rates of runs, [runs, n].

  A rate between two steps of a run is interpolated; beyond them it is NaN.
  """
  curves = [_points(records, f"{split}_accuracy").T for records in runs]
  curves = [curve for curve in curves if curve.size]
  if not curves:
    return np.empty(0), np.empty((1, 0))
  steps = np.unique(np.concatenate([at for at, _ in curves]))
  rates = [np.interp(steps, at, 1 - x, np.nan, np.nan) for at, x in curves]
  return steps, np.array(rates)


def _points(records: Sequence[dict[str, Any]], key: str) -> np.ndarray:
  """Returns the steps and values of a metric, [n, 2]."""
  points = [
    (record["step"], record[key]) for record in records if key in record
  ]
  return np.array(points, float).reshape(-1, 2)


def _finish(axes, metric: str) -> None:
  """Labels and scales the axes of a metric."""
  axes.set_xlabel("step")
  axes.xaxis.set_major_locator(
    ticker.MaxNLocator(5, steps=(1, 2, 5, 10), integer=True)
  )
  axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
  axes.set_title("error rate" if metric == "accuracy" else metric)
  has_positive = axes.dataLim.minposy < np.inf  # All errors may be 0.
  if metric in ("loss", "accuracy") and has_positive:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1, 2, 5) if high > 30 * low else (1, 2, 3, 5, 7)
    axes.yaxis.set_major_locator(
      # A narrow range may contain none of the round numbers.
      ticker.LogLocator(subs=subs) if high > 3 * low else ticker.MaxNLocator(5)
    )
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    percent = ticker.FuncFormatter(lambda y, _: f"{100 * y:.6g}%")
    plain = ticker.StrMethodFormatter("{x:.6g}")
    axes.yaxis.set_major_formatter(percent if metric == "accuracy" else plain)


@styled
def confusion_matrix(
  matrix: np.ndarray, class_names: Sequence[str]
) -> figure.Figure:
  """Draws how often each class was predicted for each true class.

  Args:
    matrix: int [classes, classes]; rows are the true classes.
    class_names: the names of the rows and columns.
  """
  size = len(class_names)
  side = min(max(5.0, 0.55 * size), 20.0)
  picture = figure.Figure(figsize=(side, side + 0.2))
  axes = picture.subplots()
  axes.grid(False)
  axes.spines[:].set_visible(False)
  # Mistakes are rare; without this norm, they would all look white.
  shown = axes.imshow(matrix, cmap="Blues", norm=colors.PowerNorm(0.4, 0))
  if size > 30:
    picture.colorbar(shown, label="examples", shrink=0.8)
  else:
    style: Any = dict(ha="center", va="center", fontsize=8)
    for row, column in np.argwhere(matrix):
      count = matrix[row, column]
      color = "white" if count > 0.3 * matrix.max() else "black"
      axes.text(column, row, count, color=color, **style)
    rotation = 90 if max(map(len, class_names)) > 2 else 0
    axes.set_xticks(range(size), class_names, rotation=rotation)
    axes.set_yticks(range(size), class_names)
  axes.set_xlabel("predicted class")
  axes.set_ylabel("true class")
  accuracy = np.trace(matrix) / max(matrix.sum(), 1)
  axes.set_title(f"accuracy {accuracy:.4f} on {matrix.sum():,} examples")
  return picture


@styled
def mistakes(
  images: Array,
  labels: Array,
  probabilities: np.ndarray,
  class_names: Sequence[str],
  count: int = 25,
) -> figure.Figure:
  """Draws the most confident mistakes.

  Args:
    images: uint8 [n, height, width, 1 or 3].
    labels: int [n].
    probabilities: [n, classes].
    class_names: the names of the labels.
    count: the maximum number to draw.
  """
  confidences = probabilities.max(axis=1)
  predicted = probabilities.argmax(axis=1)
  wrong = np.flatnonzero(predicted != labels)
  worst = wrong[np.argsort(-confidences[wrong], kind="stable")][:count]
  rows = -(-len(worst) // 5)
  picture = figure.Figure(figsize=(8.5, 0.6 + 1.9 * rows))
  order = "; most confident first" if rows else ""
  picture.suptitle(f"{len(wrong):,} of {len(labels):,} wrong{order}")
  for position, index in enumerate(worst, 1):
    axes = picture.add_subplot(rows, 5, position)
    _show(axes, images[index])
    classes = int(labels[index]), predicted[index]
    true, taken = (_short(class_names[y]) for y in classes)
    axes.set_title(
      f"#{index}: {true}\nread as {taken}\n{confidences[index]:.0%} sure",
      fontsize=8,
      parse_math=False,
    )
  return picture


@styled
def calibration(
  counts: np.ndarray, accuracies: np.ndarray, error: float
) -> figure.Figure:
  """Draws a reliability diagram: accuracy against confidence.

  Args:
    counts: the number of examples in each bin of the predicted probability; all
      bins are equally wide.
    accuracies: the accuracy in each bin.
    error: the expected calibration error.
  """
  picture = figure.Figure(figsize=(5, 5.5))
  upper, lower = picture.subplots(2, 1, sharex=True, height_ratios=(3, 1))
  width = 1 / len(counts)
  centers = (np.arange(len(counts)) + 0.5) * width
  shades = np.where(counts < _FEW, "#b3d4e6", _BLUE)
  upper.bar(centers, accuracies, width, color=shades, ec="white")
  upper.plot([0, 1], [0, 1], "--", color=_GRAY)
  upper.set_ylabel("accuracy")
  upper.set_title(
    f"expected calibration error {error:.4f}\n"
    f"dashed: calibrated; pale: fewer than {_FEW} examples"
  )
  lower.bar(centers, counts, width, ec="white")
  lower.set_yscale("log")
  lower.set_ylabel("examples")
  lower.set_xlabel("probability of the predicted class")
  return picture


@styled
def filters(kernel: np.ndarray, name: str) -> figure.Figure:
  """Draws the filters of the first layer.

  Args:
    kernel: [height, width, 1 or 3, features].
    name: the name of the kernel.
  """
  tiles = np.stack([_tile(x) for x in np.moveaxis(kernel, 2, 0)], axis=-1)
  height = 6 * tiles.shape[0] / tiles.shape[1] + 0.4  # With the title.
  picture = figure.Figure(figsize=(6.8, height))
  axes = picture.subplots()
  axes.axis("off")
  axes.set_title(f"{name}, {kernel.shape[-1]} filters")
  if tiles.shape[-1] == 1:
    picture.colorbar(_show_signed(axes, tiles[..., 0]), shrink=0.8)
  else:
    limit = np.abs(kernel).max()
    axes.imshow(np.nan_to_num(tiles / (2 * limit) + 0.5, nan=1))
  return picture


@styled
def activations(
  image: Array,
  label: int | Array,
  layers: Mapping[str, Array],
  probabilities: Array,
  class_names: Sequence[str],
) -> figure.Figure:
  """Draws an image and the output of each layer.

  Args:
    image: uint8 [height, width, 1 or 3].
    label: its class.
    layers: outputs by name, [height, width, features] or [features].
    probabilities: [classes].
    class_names: the names of the classes.
  """
  columns = len(layers) + 2
  picture = figure.Figure(figsize=(3 * columns, 3.5))
  first, *middle, last = picture.subplots(1, columns)
  _show(first, image)
  first.set_title(f"image: {class_names[int(label)]}")
  for axes, (name, output) in zip(middle, layers.items(), strict=True):
    tiles, title = _tile(output), f"{name} {list(output.shape)}"
    if np.nanmin(tiles) < 0:
      title += ", before activation\nblue: positive, red: negative"
      _show_signed(axes, tiles)
    else:
      axes.imshow(tiles, cmap="viridis")
    axes.set_title(title)
    axes.axis("off")
  _bars(last, probabilities, class_names)
  last.set_box_aspect(1)  # As large as the others.
  last.set_ylabel("probability")
  last.set_title(f"prediction: {class_names[int(probabilities.argmax())]}")
  return picture


@styled
def deformations(images: Array, deformed: Array) -> figure.Figure:
  """Draws images, with the augmented version of each below it.

  Args:
    images: float [n, height, width, 1 or 3], in [0, 1].
    deformed: the same images, augmented.
  """
  columns = min(len(images), 10)
  rows = len(images) // columns
  picture = figure.Figure(figsize=(columns, 2.3 * rows))
  grid = picture.subplots(2 * rows, columns, squeeze=False)
  for row, line in enumerate(grid):
    name, shown = (("original", images), ("augmented", deformed))[row % 2]
    line[0].set_ylabel(name)
    start = row // 2 * columns
    for axes, image in zip(line, shown[start : start + columns], strict=True):
      _show(axes, (255 * image).astype(np.uint8))
  return picture


@styled
def predictions(
  given: Sequence[np.ndarray],
  seen: np.ndarray,
  probabilities: np.ndarray,
  names: Sequence[str],
  class_names: Sequence[str],
  boxes: Sequence[tuple[int, int, int, int] | None],
  doubts: Sequence[str],
) -> figure.Figure:
  """Draws images as given, as the network sees them, and the probabilities.

  Args:
    given: n images, uint8 [height, width] or [height, width, 3].
    seen: uint8 [n, height, width, 1 or 3].
    probabilities: [n, classes].
    names: a title for each image.
    class_names: the names of the classes.
    boxes: the digit's left, top, right and bottom in each image, or None.
    doubts: why each prediction is unsure, or an empty string.
  """
  count = len(given)
  columns = max(1, int((count / 4) ** 0.5))  # A nearly square figure.
  rows = -(-count // columns)
  picture = figure.Figure(figsize=(7 * columns, 1.7 * rows))
  grid = picture.subplots(
    rows, 3 * columns, squeeze=False, width_ratios=(1, 1, 2.2) * columns
  ).reshape(rows * columns, 3)
  for axes in grid[count:].ravel():
    axes.remove()
  for axes in grid[:columns, 1]:
    axes.set_title("what the network sees", fontsize=8)
  for axes, image, network, row, name, box, doubt in zip(
    *(grid[:count], given, seen, probabilities, names, boxes, doubts),
    strict=True,
  ):
    _show(axes[0], image)
    _show(axes[1], network)
    if box:
      left, top, right, bottom = np.array(box) - 0.5
      shape = (left, top), right - left, bottom - top
      frame = patches.Rectangle(*shape, fill=False, color=_ORANGE, lw=1.5)
      axes[0].add_patch(frame)
    short = name if len(name) <= 26 else f"…{name[-25:]}"
    axes[0].set_title(short, fontsize=8, parse_math=False)
    _bars(axes[2], row, class_names)
    best = row.argmax()
    unsure = "\nunsure: " + doubt.replace("; ", "\n") if doubt else ""
    axes[2].set_title(
      f"{class_names[best]}: {row[best]:.1%}{unsure}", fontsize=9
    )
  return picture


def save(picture: figure.Figure, path: pathlib.Path) -> None:
  """Writes a picture to a file, in the format of its suffix or else as PNG.

  It replaces only pictures that Matplotlib has drawn, which names itself in
  them: `--sheet *.png` would otherwise cost a photograph.

  Raises:
    errors.UserError: if the format is unknown or the file cannot be written.
  """
  old = path.read_bytes() if path.is_file() else b""
  if old and b"Matplotlib" not in old:
    raise errors.UserError(
      f"{path}: exists and was not drawn by Matplotlib; name another file"
    )
  content = io.BytesIO()
  try:
    # The resolution suits modern screens.
    picture.savefig(content, format=path.suffix[1:] or "png", dpi=200)
  except ValueError as error:
    raise errors.UserError(f"{path}: {error}") from error
  files.write_bytes(path, content.getvalue())


def _show(axes, image: Array) -> None:
  if image.ndim == 3 and image.shape[-1] == 1:
    image = image[..., 0]
  axes.imshow(image, cmap="gray", vmin=0, vmax=255)
  axes.set(xticks=[], yticks=[])
  axes.spines[:].set_visible(False)


def _show_signed(axes, values: np.ndarray):
  """Shows positive values in blue and negative ones in red; NaN is blank."""
  return axes.imshow(values, cmap="RdBu", norm=colors.CenteredNorm())


def _bars(axes, probabilities: Array, class_names: Sequence[str]) -> None:
  positions = range(len(class_names))
  best = probabilities.argmax()
  axes.bar(
    positions,
    probabilities,
    color=[_ORANGE if i == best else _GRAY for i in positions],
  )
  rotation = 90 if max(map(len, class_names)) > 2 else 0
  axes.set_xticks(positions, class_names, rotation=rotation, fontsize=8)
  axes.set_ylim(0, 1)


def _tile(output: Array) -> np.ndarray:
  """Lays out [height, width, features] or [features] in a near-square grid."""
  if output.ndim == 1:
    output = output[None, None]
  height, width, count = output.shape
  columns = int(np.ceil(np.sqrt(count)))
  rows = -(-count // columns)
  gap = 1 if height > 1 else 0
  tiles = np.full((rows * (height + gap), columns * (width + gap)), np.nan)
  for index in range(count):
    top, left = divmod(index, columns)
    top, left = top * (height + gap), left * (width + gap)
    tiles[top : top + height, left : left + width] = output[..., index]
  return tiles


def _short(name: str) -> str:
  return name if len(name) <= 20 else f"{name[:19]}…"
