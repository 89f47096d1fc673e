"""Arrays to matplotlib figures."""

from collections.abc import Sequence
from typing import Any

from matplotlib import figure
from matplotlib import ticker


def learning_curves(records: Sequence[dict[str, Any]]) -> figure.Figure:
  """Draws loss and accuracy against the step.

  Args:
    records: the lines of a metrics.jsonl.
  """
  picture = figure.Figure(figsize=(10, 3.6), layout="constrained")
  metrics = ("loss", "accuracy")
  for axes, metric in zip(picture.subplots(1, 2), metrics, strict=True):
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
