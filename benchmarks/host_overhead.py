"""What the loop itself costs the host in a step, beyond dispatch.

    python benchmarks/host_overhead.py

A student of so little arithmetic that a step is nothing but its calls, of 300
parameter arrays; SGD. Both run in turn, A B A B, in one process, the fastest
of the blocks of each kept:

  bare   calls of the compiled step on a batch that lies on the device, and
         nothing else: what JAX needs to dispatch
  loop   the same steps in `kdjax.stepping.run`: the batch put on the device,
         the metrics of the step before fetched, checked, written to
         metrics.jsonl and TensorBoard, the bar, clock and watchdog

  beyond, milliseconds a step, is loop - bare; goal 1. What of it is the
  fetching, and the writing, is timed apart.

On a CPU the device's work is the host's too, and part of both.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from step_flops import RESULTS, save

from kdjax import parallel, stepping
from kdjax.clock import Clock
from kdjax.metrics import Progress, Writer
from kdjax.objective import Objective, hinton
from kdjax.perf import Meter
from kdjax.profiling import Profile
from kdjax.train_step import init_state, jit_step, make_train_step
from kdjax.types import Model, Output
from kdjax.watchdog import Watchdog


def network(arrays: int) -> Model:
  """Logits from a product and `arrays` - 1 vectors that are added."""

  def init(key: Any, batch: Any) -> Any:
    del key, batch
    params = {f"bias_{n}": jnp.zeros(4) for n in range(arrays - 1)}
    return {**params, "kernel": jnp.ones((4, 4))}, {}

  def apply(params, stats, batch, *, train, key=None, taps=()):
    del train, key, taps
    logits = batch["image"] @ params["kernel"]
    shift = sum(v for k, v in params.items() if k != "kernel")
    return Output(logits + jnp.reshape(shift, (1, 4))), stats

  return Model(init, apply)


def batch() -> dict[str, np.ndarray]:
  draw = np.random.default_rng(0)
  return {
    "image": draw.normal(size=(8, 4)).astype(np.float32),
    "label": draw.integers(0, 4, 8).astype(np.int32),
    "mask": np.ones(8, np.float32),
    "index": np.arange(8, dtype=np.int32),
  }


class Bench:
  """The compiled step, its state, and the two ways to run it."""

  def __init__(self, arrays: int, steps: int):
    self.mesh, self.steps = parallel.make_mesh(1), steps
    student, teacher = network(arrays), network(2)
    goal: Objective = hinton(alpha=0.1, temperature=4.0)
    given = student, teacher, goal, optax.sgd(1e-3)
    rows = batch()
    frozen = teacher.init(jax.random.key(0), rows)
    state = init_state(*given, jax.random.key(0), rows, frozen=frozen)
    self.state, self.frozen = parallel.put((state, frozen), self.mesh)
    self.step = jit_step(make_train_step(*given), self.mesh)

  def bare(self) -> float:
    rows = parallel.put_batch(batch(), self.mesh)
    begun = time.perf_counter()
    measured = None
    for _ in range(self.steps):
      self.state, measured = self.step(self.state, self.frozen, rows)
    jax.block_until_ready((self.state, measured))
    return (time.perf_counter() - begun) / self.steps

  def loop(self) -> float:
    rows, clock = batch(), Clock()
    with (
      tempfile.TemporaryDirectory() as folder,
      Writer(Path(folder)) as write,
      Watchdog(clock, print),
      clock.at("steps"),
    ):
      bar = Progress("bench", self.steps, quiet=True)
      meter = Meter(clock, 8, list(self.mesh.devices.flat))
      report = stepping.Report("bench", self.steps, bar, write, clock, meter)
      begun = time.perf_counter()
      self.state, _ = stepping.run(
        self.state,
        self.step,
        self.frozen,
        lambda: parallel.put_batch(rows, self.mesh),
        start=0,
        report=report,
        profile=Profile(None, 0, start=0, steps=self.steps, note=print),
        save_every=self.steps,
      )
      jax.block_until_ready(self.state)
      return (time.perf_counter() - begun) / self.steps

  def parts(self) -> dict[str, float]:
    """Seconds of three parts of the loop, each by itself."""
    rows = batch()
    self.state, measured = self.step(
      self.state, self.frozen, parallel.put_batch(rows, self.mesh)
    )
    jax.block_until_ready(measured)
    values = stepping.fetch(measured)
    with tempfile.TemporaryDirectory() as folder, Writer(Path(folder)) as write:
      return {
        "put_batch": fastest(lambda: parallel.put_batch(rows, self.mesh)),
        "fetch": fastest(lambda: stepping.fetch(measured)),
        "write": fastest(lambda: write(1, values)),
      }


def fastest(f: Callable[[], Any], calls: int = 200) -> float:
  """Seconds of a call: the median of all."""
  times = []
  for _ in range(calls):
    begun = time.perf_counter()
    f()
    times.append(time.perf_counter() - begun)
  return statistics.median(times)


def measure(arrays: int, steps: int, blocks: int) -> dict[str, Any]:
  bench = Bench(arrays, steps)
  bench.bare()
  bench.loop()
  pairs = [(bench.bare(), bench.loop()) for _ in range(blocks)]
  bare, loop = (min(times) for times in zip(*pairs))
  return {
    "arrays": arrays,
    "steps": steps,
    "bare_ms": 1e3 * bare,
    "loop_ms": 1e3 * loop,
    "beyond_ms": 1e3 * (loop - bare),
    "median_beyond_ms": 1e3 * statistics.median(b - a for a, b in pairs),
    **{f"{k}_ms": 1e3 * v for k, v in bench.parts().items()},
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--blocks", type=int, default=9)
  parser.add_argument(
    "--out", type=Path, default=RESULTS / "host_overhead.json"
  )
  given = parser.parse_args()
  rows = []
  for arrays in (10, 300):
    rows.append(measure(arrays, given.steps, given.blocks))
    shown = [f"{k} {v:.3g}" for k, v in rows[-1].items()]
    print(", ".join(shown), flush=True)
  save(given.out, rows=rows)


if __name__ == "__main__":
  main()
