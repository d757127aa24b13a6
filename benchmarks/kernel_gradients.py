"""The kernel's gradient of a convolution on a CPU: kdjax's beside XLA's.

    python benchmarks/kernel_gradients.py

Both run in turn, A B A B, in one process; GFLOP/s are of all cores' seconds,
the padding's zeros counted; faster is XLA's seconds / kdjax's, the median.
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from method_cost import seconds
from step_flops import RESULTS, save

from kdjax import convolution

# Batch, size of the map, inputs, outputs, size of the kernel, stride.
SHAPES = (
  (64, 32, 256, 64, 3, 1),
  (64, 16, 256, 128, 3, 1),
  (64, 8, 256, 256, 3, 1),
  (64, 32, 32, 32, 3, 1),
  (64, 16, 64, 64, 3, 1),
  (64, 32, 16, 16, 3, 1),
  (64, 16, 64, 128, 3, 2),
  (16, 56, 64, 64, 3, 1),
  (16, 56, 64, 256, 1, 1),
)


def gradient(convolve: Any, stride: int, padding: int) -> Any:
  def of(x: jax.Array, kernel: jax.Array, slope: jax.Array) -> jax.Array:
    def y(kernel: jax.Array) -> jax.Array:
      return convolve(
        x,
        kernel,
        (stride, stride),
        ((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=1,
      )

    return jax.vjp(y, kernel)[1](slope)[0]

  return jax.jit(of)


def measure(shape: Sequence[int], repeats: int) -> dict[str, Any]:
  batch, size, inputs, outputs, width, stride = shape
  keys = jax.random.split(jax.random.key(0), 3)
  after = -(-size // stride)
  given = [
    jax.random.normal(key, s)
    for key, s in zip(
      keys,
      (
        (batch, size, size, inputs),
        (width, width, inputs, outputs),
        (batch, after, after, outputs),
      ),
    )
  ]
  xla, ours = (
    gradient(f, stride, width // 2)
    for f in (lax.conv_general_dilated, convolution.conv_general_dilated)
  )
  apart = jnp.abs(xla(*given) - ours(*given)).max()
  run = lambda f: seconds(lambda: f(*given).block_until_ready())[1]  # noqa: E731
  times = [(run(xla), run(ours)) for _ in range(repeats)]
  flops = 2.0 * width**2 * given[2].size * inputs
  return {
    "shape": list(shape),
    "apart": float(apart / jnp.abs(xla(*given)).max()),
    "xla": flops / statistics.median(a for a, _ in times) / 1e9,
    "kdjax": flops / statistics.median(b for _, b in times) / 1e9,
    "faster": statistics.median(a / b for a, b in times),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--repeats", type=int, default=7)
  repeats = parser.parse_args().repeats
  print(f"{'batch, map, channels, kernel, stride':38}{'XLA':>7}{'kdjax':>8}"
        f"{'faster':>8}")  # fmt: skip
  rows = []
  for shape in SHAPES:
    found = measure(shape, repeats)
    batch, size, inputs, outputs, width, stride = shape
    name = f"{batch} x {size}², {inputs} -> {outputs}, {width}², {stride}"
    print(
      f"{name:38}{found['xla']:7.0f}{found['kdjax']:8.0f}{found['faster']:8.2f}",
      flush=True,
    )
    rows.append(found)
  save(RESULTS / "kernel_gradients.json", rows=rows)


if __name__ == "__main__":
  main()
