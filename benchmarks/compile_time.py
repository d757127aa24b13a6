"""How long a step compiles, by the depth of its networks.

    python benchmarks/compile_time.py
    python benchmarks/compile_time.py --kinds decoder --depths 2 8 32 64

The distillation step of two networks of one depth, compiled anew each time and
not run. Shallow and deep come in turn, A B A B. Printed, for each depth:

  seconds   of all cores, to trace the step to a program and to compile that
            (on a GPU and TPU too: compiling is the host's work), the median
  ratio     those / those of the shallowest, round by round, the median
  text      megabytes of the program as compiled

and these kinds of networks:

  decoder   Llamas of width 128, teacher and student, whose layers are scanned:
            one layer is compiled, whatever the depth
  unrolled  the same with the scan unrolled: what a Python loop over the layers
            would give
  resnet    ResNets for 32 px, whose blocks are not scanned
"""

import argparse
import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import lm_step
import step_flops
from step_flops import RESULTS, save

from kdjax import parallel

DEPTHS = {
  "decoder": (2, 8, 32),
  "unrolled": (2, 8, 32),
  "resnet": (8, 20, 56),
}


def llama_step(depth: int) -> tuple[Any, Any]:
  """The jitted step of two Llamas, and the shapes of its arguments."""
  net = lm_step.llama(128, depth, 4, 1024)
  size = lm_step.Size(net, net, 4, 128)
  step, arguments = lm_step.step_and_arguments(lm_step.models(size), size)
  return step, jax.eval_shape(arguments)


def resnet_step(depth: int) -> tuple[Any, Any]:
  network = "resnet_cifar", {"depth": depth}
  with mock.patch.dict(step_flops.PAIRS, deep=(network, network, 32)):
    pair = step_flops.make_pair("deep", 64, jnp.float32)
  step, arguments = step_flops.step_and_arguments(
    pair, step_flops.objective(pair), parallel.make_mesh(1)
  )
  return step, jax.eval_shape(arguments)


@contextlib.contextmanager
def unrolled() -> Iterator[None]:
  """Every scan becomes as many copies of its body."""
  scan = functools.partial(jax.lax.scan, unroll=True)
  with mock.patch.object(jax.lax, "scan", scan):
    yield


KINDS: dict[str, tuple[Callable[[int], tuple[Any, Any]], Any]] = {
  "decoder": (llama_step, contextlib.nullcontext),
  "unrolled": (llama_step, unrolled),
  "resnet": (resnet_step, contextlib.nullcontext),
}


def measure(kind: str, depth: int) -> dict[str, float]:
  """Of one compilation, with nothing left of those before it."""
  make, around = KINDS[kind]
  jax.clear_caches()
  with around():
    step, shapes = make(depth)
    times = [time.process_time()]
    lowered = step.lower(*shapes)
    times.append(time.process_time())
    compiled = lowered.compile()
    times.append(time.process_time())
  return {
    "trace": times[1] - times[0],
    "compile": times[2] - times[1],
    "text": len(compiled.as_text()) / 1e6,
  }


def rows(
  kind: str, depths: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
  measure(kind, depths[0])  # what Python does once
  rounds = [[measure(kind, depth) for depth in depths] for _ in range(repeats)]
  whole = [[one["trace"] + one["compile"] for one in each] for each in rounds]
  found = []
  for n, depth in enumerate(depths):
    middle = {
      part: statistics.median(each[n][part] for each in rounds)
      for part in ("trace", "compile", "text")
    }
    ratio = statistics.median(each[n] / each[0] for each in whole)
    found.append({"kind": kind, "depth": depth, **middle, "ratio": ratio})
  return found


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
  parser.add_argument("--depths", nargs="+", type=int, help="for all kinds")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--out", type=Path, default=RESULTS / "compile_time.json")
  given = parser.parse_args(arguments)
  jax.config.update("jax_enable_compilation_cache", False)
  print("             depth   trace s  compile s   ratio     text")
  found = []
  for kind in given.kinds:
    for row in rows(kind, given.depths or DEPTHS[kind], given.repeats):
      found.append(row)
      print(
        f"{kind:12}{row['depth']:6}{row['trace']:10.2f}{row['compile']:11.2f}"
        f"{row['ratio']:8.2f}{row['text']:6.2f} MB",
        flush=True,
      )
  save(given.out, repeats=given.repeats, rows=found)


if __name__ == "__main__":
  main()
