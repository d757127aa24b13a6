"""What a checkpoint costs the steps around it.

    python benchmarks/checkpoint_stall.py
    python benchmarks/checkpoint_stall.py --pair resnet32x4_to_resnet8x4

The KD step of two networks, 100 times without a checkpoint and 100 times with
one after the middle, in turn (A B A B), in one process, so that what else the
machine does hits both. The columns are

  save     seconds until `save` returns, and the next step may be dispatched
  ratio    the steps with the checkpoint / without: the median and the
           quartiles over the repeats; goal: at most 1.05. `sure`: until it is
           on disk
  noise    the same of 100 steps without against those before them

On a GPU or TPU: the same commands, with jax[cuda12] or jax[tpu] installed.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from method_cost import Step
from step_flops import PAIRS, RESULTS, make_pair, save

from kdjax import parallel
from kdjax.checkpoint import Checkpointer

GOAL = 1.05


def steps(step: Step, count: int) -> float:
  """Seconds that `count` steps take."""
  began = time.perf_counter()
  for _ in range(count):
    step()
  return time.perf_counter() - began


def with_checkpoint(
  step: Step, count: int, saver: Checkpointer, number: int
) -> tuple[float, float, float]:
  """Seconds of the steps, of the call of `save`, until it is on disk."""
  first = steps(step, count // 2)
  began = time.perf_counter()
  saver.save(number, step.state)
  called = time.perf_counter() - began
  second = steps(step, count - count // 2)
  total = first + called + second
  saver.wait()
  sure = first + time.perf_counter() - began
  return total, called, sure


def measure(step: Step, count: int, repeats: int) -> dict[str, Any]:
  with tempfile.TemporaryDirectory() as folder, Checkpointer(folder) as saver:
    saver.save(0, step.state)
    saver.wait()
    rows = []
    before = steps(step, count)
    for number in range(1, repeats + 1):
      without = steps(step, count)
      total, called, sure = with_checkpoint(step, count, saver, number)
      rows.append((total / without, called, sure / without, without / before))
      before = without
  ratios, calls, sures, noise = zip(*rows)
  low, middle, high = statistics.quantiles(ratios, n=4)
  return {
    "save_seconds": statistics.median(calls),
    "ratio": middle,
    "quartiles": [low, high],
    "sure": statistics.median(sures),
    "noise": statistics.quantiles(noise, n=4),
    "step_seconds": before / count,
    "ratios": ratios,
  }


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--pair", choices=PAIRS, default="resnet14_to_resnet8")
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument("--steps", type=int, default=100)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument(
    "--out", type=Path, default=RESULTS / "checkpoint_stall.json"
  )
  given = parser.parse_args(arguments)
  pair, mesh = make_pair(given.pair, given.batch), parallel.make_mesh(1)
  step = Step(pair, mesh)
  steps(step, 2)
  found = measure(step, given.steps, given.repeats)
  size = sum(x.nbytes for x in jax.tree.leaves(step.state))
  low, high = found["quartiles"]
  told = "" if found["ratio"] <= GOAL else f"  above {GOAL}"
  print(
    f"{given.pair}, batch {given.batch}, {size / 1e6:.1f} MB of state, "
    f"{given.steps} steps of {found['step_seconds'] * 1e3:.0f} ms\n"
    f"save {found['save_seconds']:.3f} s, ratio {found['ratio']:.3f} "
    f"({low:.3f}-{high:.3f}){told}, sure {found['sure']:.3f}, noise "
    f"{found['noise'][0]:.3f}-{found['noise'][2]:.3f}"
  )
  save(
    given.out,
    pair=given.pair,
    batch=given.batch,
    steps=given.steps,
    state_bytes=size,
    goal=GOAL,
    **found,
  )


if __name__ == "__main__":
  main()
