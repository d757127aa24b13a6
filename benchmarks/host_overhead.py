"""What the loop itself costs the host in a step, beyond dispatch.

    python benchmarks/host_overhead.py

A student of so little arithmetic that a step is nothing but its calls, of 300
parameter arrays; SGD. Both run in turn, A B A B, in one process:

  bare   calls of the compiled step on a batch that lies on the device, and
         nothing else: what JAX needs to dispatch
  loop   the same steps in `kdjax.stepping.run`: the batch put on the device,
         the metrics of the step before fetched, checked, written to
         metrics.jsonl and TensorBoard, the bar, clock and watchdog

  beyond, milliseconds a step, is loop - bare, goal 1: of the seconds of the
  host's own thread (its wait for the device is not among them), the median,
  and of the wall, the fastest block of each. The latter holds what the step
  itself is late by, where a CPU is the device and others share it. What of it
  is the putting, fetching and writing is timed apart.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from step_flops import RESULTS, save

from kdjax import parallel, stepping
from kdjax.clock import Clock
from kdjax.metrics import Writer
from kdjax.objective import Objective, hinton
from kdjax.perf import Meter
from kdjax.profiling import Profile
from kdjax.progress import Progress
from kdjax.save_clock import SaveClock
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


GOAL = 1.0  # of beyond, milliseconds
SHOWN = (
  "bare",
  "loop",
  "beyond",
  "bare_wall",
  "loop_wall",
  "beyond_wall",
  "put_batch",
  "fetch",
  "write",
)


class Times(NamedTuple):
  """Seconds of the wall, and of this thread while it ran."""

  wall: float
  thread: float

  @classmethod
  def now(cls) -> "Times":
    return cls(time.perf_counter(), time.thread_time())

  def until_now(self, steps: int) -> "Times":
    """Since then, for a step."""
    return Times(*((b - a) / steps for a, b in zip(self, self.now())))


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

  def bare(self) -> Times:
    rows = parallel.put_batch(batch(), self.mesh)
    begun, measured = Times.now(), None
    for _ in range(self.steps):
      self.state, measured = self.step(self.state, self.frozen, rows)
    jax.block_until_ready((self.state, measured))
    return begun.until_now(self.steps)

  def loop(self) -> Times:
    rows, clock = batch(), Clock()
    with (
      tempfile.TemporaryDirectory() as folder,
      Writer(Path(folder)) as write,
      Watchdog(clock, print),
      clock.at("steps"),
    ):
      bar = Progress("bench", self.steps, quiet=True)
      meter = Meter(clock, 8, list(self.mesh.devices.flat))
      report = stepping.Report("bench", self.steps, bar, [write], clock, meter)
      begun = Times.now()
      self.state, _ = stepping.run(
        self.state,
        self.step,
        self.frozen,
        lambda: parallel.put_batch(rows, self.mesh),
        start=0,
        report=report,
        profile=Profile(None, 0, start=0, steps=self.steps, note=print),
        save_every=self.steps,
        save_clock=SaveClock(0),
        told_to_stop=lambda: False,
      )
      jax.block_until_ready(self.state)
      return begun.until_now(self.steps)

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
        "put_batch": middle(lambda: parallel.put_batch(rows, self.mesh)),
        "fetch": middle(lambda: stepping.fetch(measured)),
        "write": middle(lambda: write(1, values)),
      }


def middle(f: Callable[[], Any], calls: int = 200) -> float:
  """Seconds of this thread for a call: the median of all."""
  times = []
  for _ in range(calls):
    begun = time.thread_time()
    f()
    times.append(time.thread_time() - begun)
  return statistics.median(times)


def measure(arrays: int, steps: int, blocks: int) -> dict[str, Any]:
  bench = Bench(arrays, steps)
  bench.bare()
  bench.loop()
  pairs = [(bench.bare(), bench.loop()) for _ in range(blocks)]
  wall = [min(x.wall for x in times) for times in zip(*pairs)]
  thread = [statistics.median(x.thread for x in times) for times in zip(*pairs)]
  return {
    "arrays": arrays,
    "steps": steps,
    "bare_ms": 1e3 * thread[0],
    "loop_ms": 1e3 * thread[1],
    "beyond_ms": 1e3 * (thread[1] - thread[0]),
    "ratio": thread[1] / thread[0],
    "bare_wall_ms": 1e3 * wall[0],
    "loop_wall_ms": 1e3 * wall[1],
    "beyond_wall_ms": 1e3 * (wall[1] - wall[0]),
    **{f"{k}_ms": 1e3 * v for k, v in bench.parts().items()},
    "load": os.getloadavg()[0],
  }


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--blocks", type=int, default=9)
  parser.add_argument(
    "--out", type=Path, default=RESULTS / "host_overhead.json"
  )
  given = parser.parse_args(arguments)
  rows = []
  print("milliseconds a step, of the host's thread and of the wall")
  print(
    "arrays " + "".join(f"{name:>13}" for name in SHOWN) + " loop/bare  load"
  )
  for arrays in (10, 300):
    rows.append(row := measure(arrays, given.steps, given.blocks))
    shown = "".join(f"{row[f'{name}_ms']:13.2f}" for name in SHOWN)
    missed = f"  above {GOAL:g}" if row["beyond_ms"] > GOAL else ""
    print(
      f"{arrays:<7}{shown}{row['ratio']:10.2f}{row['load']:6.1f}{missed}",
      flush=True,
    )
  save(given.out, rows=rows)


if __name__ == "__main__":
  main()
