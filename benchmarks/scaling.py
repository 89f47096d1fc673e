"""Estimates where data parallelism stops paying off for this network.

    python benchmarks/scaling.py --picture=docs/scaling.png

In a step on n devices, each computes its part of the batch, and all add up the
gradients in a ring: each device sends and receives 2 (n - 1) / n times the
bytes of the gradients, which tests/test_devices.py counts in the compiled
program. Nothing is measured here.
"""

import argparse
import pathlib
import sys
from typing import NamedTuple

from matplotlib import figure
from matplotlib import ticker

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from report import figures  # noqa: E402

# Two for each multiplication, in the forward pass and for the gradients of the
# kernel and of the input; conv1 needs no gradient of its input.
# docs/performance.md explains the numbers.
_FLOP_PER_IMAGE = 2 * (2 * 627_200 + 3 * (10_035_200 + 3_211_264 + 10_240))
_GRADIENT_BYTES = 4 * 3_274_634
_BATCHES = (100, 1_000, 10_000)


class Devices(NamedTuple):
  """A kind of device, and the network that connects several.

  Attributes:
    name: the names of both.
    flops: floating-point operations per second of one device.
    bandwidth: bytes per second that a device can send while receiving as many.
  """

  name: str
  flops: float
  bandwidth: float


_DEVICES = (
  # 0.4 of the peak is a guess: small convolutions do not fill such devices.
  # https://cloud.google.com/tpu/docs/v5e
  Devices("TPU v5e (bfloat16), ICI", 0.4 * 197e12, 200e9),
  # https://glennklockwood.com/garden/processors/h100
  Devices("H100 (TF32), NVLink", 0.4 * 495e12, 450e9),
  Devices("H100 (TF32), 400 Gb/s InfiniBand", 0.4 * 495e12, 50e9),
  # Measured: docs/throughput.json.
  Devices("two CPU cores, 10 Gb/s Ethernet", 115e9, 1.25e9),
)


def compute_seconds(devices: Devices, batch: int, count: int) -> float:
  return batch / count * _FLOP_PER_IMAGE / devices.flops


def communication_seconds(devices: Devices, count: int) -> float:
  return 2 * (count - 1) / count * _GRADIENT_BYTES / devices.bandwidth


def speedup(devices: Devices, batch: int, count: int) -> float:
  """Returns how many times faster a step is than on one device."""
  step = compute_seconds(devices, batch, count)
  step += communication_seconds(devices, count)
  return compute_seconds(devices, batch, 1) / step


def break_even(devices: Devices) -> float:
  """Returns the images per device that take as long as the communication."""
  seconds = 2 * _GRADIENT_BYTES / devices.bandwidth  # With many devices.
  return seconds / compute_seconds(devices, 1, 1)


@figures.styled
def draw(counts: list[int]) -> figure.Figure:
  picture = figure.Figure(figsize=(12, 3.6), layout="constrained")
  for axes, devices in zip(
    picture.subplots(1, len(_DEVICES), sharey=True), _DEVICES, strict=True
  ):
    axes.plot(counts, counts, ":", color="gray", label="perfect")
    for batch in _BATCHES:
      values = [speedup(devices, batch, count) for count in counts]
      axes.plot(counts, values, marker="o", ms=3, label=f"batch {batch:,}")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
      axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.set_title(devices.name, fontsize=9)
    axes.set_xlabel("devices")
  picture.axes[0].set_ylabel("speed-up of a step")
  picture.axes[0].legend(fontsize=8)
  picture.suptitle("Estimated, not measured")
  return picture


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--picture", type=pathlib.Path, help="where to draw the speed-ups"
  )
  args = parser.parse_args()
  batches = " | ".join(f"batch {batch:,}" for batch in _BATCHES)
  print(f"| | compute, µs an image | gradients, µs | images | {batches} |")
  print("|---" * (4 + len(_BATCHES)) + "|")
  for devices in _DEVICES:
    values = " | ".join(
      f"{speedup(devices, batch, 8):.2f}" for batch in _BATCHES
    )
    print(
      f"| {devices.name} | {compute_seconds(devices, 1, 1) * 1e6:.3g}"
      f" | {communication_seconds(devices, 8) * 1e6:,.0f}"
      f" | {break_even(devices):,.0f} | {values} |"
    )
  if args.picture:
    counts = [2**i for i in range(8)]
    figures.save(draw(counts), args.picture)


if __name__ == "__main__":
  main()
