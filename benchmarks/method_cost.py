"""What each method's step costs, beside the plain KD step.

    python benchmarks/method_cost.py
    python benchmarks/method_cost.py --pair resnet32x4_to_resnet8x4
    python benchmarks/method_cost.py --methods crd review --repeats 20

Each method is added to the plain KD step of the same two networks, or takes the
place of its soft loss. The two steps run in turn, A B A B, in one process, so
that what else the machine does hits both; the columns are

  own       the method's own FLOPs, / those of the KD step, both of the
            products in the compiled steps
  wall      its step's time / that of the KD step beside it: the median, and
            the quartiles over the repeats
  cores     the same of the seconds of all cores together, which other work on
            the machine moves less
  over      cores / (1 + own), on a GPU or TPU wall / (1 + own); goal: at most
            1.15. The row `kl` is the KD step against itself
  memory    its temporary memory / the KD step's

On a GPU or TPU: the same commands, with jax[cuda12] or jax[tpu] installed.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from step_flops import (
  PAIRS,
  RESULTS,
  Pair,
  make_pair,
  objective,
  products,
  put,
  save,
  step_and_arguments,
)

from kdjax import parallel

GOAL = 1.15
_LAST = {"student": "stage_3", "teacher": "stage_3"}
_STAGES = {"student": "stage_?", "teacher": "stage_?"}
_BEFORE_RELU = {"student": "preact_?", "teacher": "preact_?"}
_POOLED = {"student": "pooled", "teacher": "pooled"}
_LINEAR = {"name": "linear", "norm": True}
_MLP = {"name": "mlp", "num_hidden": 2}

# In the place of the soft loss.
LOGIT_METHODS = (
  "alpha_beta",
  "dist",
  "dkd",
  "jsd",
  "logit_mse",
  "multi_level",
  "nkd",
  "reverse_kl",
  "ttm",
  "wttm",
)
# Beside it: the term, as a config has it.
TERMS: dict[str, dict[str, Any]] = {
  "activation_boundary": {**_BEFORE_RELU, "projector": _LINEAR},
  "attention_transfer": _STAGES,
  "correlation": {**_POOLED, "projector": _LINEAR},
  "correlation_congruence": {**_POOLED, "projector": _LINEAR},
  "crd": _POOLED,
  "factor": _LAST,
  "flow": _STAGES,
  "hint": {**_LAST, "projector": {"name": "conv"}},
  "info_nce": _POOLED,
  "inter_channel": {**_LAST, "projector": _LINEAR},
  "masked_generative": {**_LAST, "projector": _LINEAR},
  "mutual": _POOLED,
  "nst": _STAGES,
  "overhaul": {**_BEFORE_RELU, "projector": _LINEAR},
  "probabilistic": _POOLED,
  "relational_angle": _POOLED,
  "relational_distance": _POOLED,
  "review": _STAGES,
  "similarity_preserving": _LAST,
  "simple": _POOLED,
  "variational_information": {**_LAST, "projector": _MLP},
}
METHODS = (*LOGIT_METHODS, *TERMS)


class Step:
  """A compiled step with its state."""

  def __init__(self, pair: Pair, mesh: Mesh, **goal: Any):
    step, arguments = step_and_arguments(pair, objective(pair, **goal), mesh)
    self.state, *self.rest = put(arguments(), mesh)
    self.compiled = step.lower(self.state, *self.rest).compile()

  @property
  def flops(self) -> float:
    return sum(products(self.compiled.as_text()))

  @property
  def temporary(self) -> int:
    return self.compiled.memory_analysis().temp_size_in_bytes

  def __call__(self) -> None:
    self.state, _ = self.compiled(self.state, *self.rest)
    jax.block_until_ready(self.state)


def method(name: str) -> dict[str, Any]:
  """What `objective` takes."""
  if name in LOGIT_METHODS:
    return {"soft": name}
  term = {"name": name, "weight": 1.0, **TERMS[name]}
  return {"terms": {name: term}}


def seconds(step: Callable[[], None]) -> tuple[float, float]:
  """Of the wall, and of all cores together."""
  wall, cores = time.perf_counter(), time.process_time()
  step()
  return time.perf_counter() - wall, time.process_time() - cores


def in_turn(
  first: Callable[[], None], second: Callable[[], None], repeats: int
) -> dict[str, Any]:
  """Times of the second over those of the first, run A B A B."""
  first()
  second()
  pairs = [(seconds(first), seconds(second)) for _ in range(repeats)]
  wall = statistics.quantiles((b[0] / a[0] for a, b in pairs), n=4)
  cores = statistics.quantiles((b[1] / a[1] for a, b in pairs), n=4)
  return {
    "wall": wall[1],
    "wall_quartiles": wall[::2],
    "cores": cores[1],
    "cores_quartiles": cores[::2],
    "first_seconds": statistics.median(a[0] for a, _ in pairs),
    "second_seconds": statistics.median(b[0] for _, b in pairs),
  }


def measure(plain: Step, other: Step, repeats: int) -> dict[str, Any]:
  own = (other.flops - plain.flops) / plain.flops
  times = in_turn(plain, other, repeats)
  ratio = times["cores" if jax.default_backend() == "cpu" else "wall"]
  return {
    "own": own,
    **times,
    "over": ratio / (1 + own),
    "memory": other.temporary / plain.temporary,
  }


def row(name: str, found: Mapping[str, Any]) -> str:
  def times(key: str) -> str:
    low, high = found[f"{key}_quartiles"]
    return f"{found[key]:9.3f} {f'({low:.2f}-{high:.2f})':12}"

  told = "" if found["over"] <= GOAL else f"  above {GOAL}"
  return (
    f"{name:24}{found['own']:7.3f}{times('wall')}{times('cores')}"
    f"{found['over']:7.3f}{found['memory']:8.2f}{told}"
  )


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--pair", choices=PAIRS, default="resnet14_to_resnet8")
  parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument("--repeats", type=int, default=10)
  parser.add_argument("--out", type=Path, default=RESULTS / "method_cost.json")
  given = parser.parse_args(arguments)
  pair, mesh = make_pair(given.pair, given.batch), parallel.make_mesh(1)
  plain = Step(pair, mesh)
  print(
    f"{given.pair}, batch {given.batch}\n{'':24}{'own':>7}{'wall':>9}{'':13}"
    f"{'cores':>9}{'':13}{'over':>7}{'memory':>8}"
  )
  rows = {}
  for name in ("kl", *given.methods):
    # The KD step against itself shows what the machine's noise alone does.
    other = Step(pair, mesh, **({} if name == "kl" else method(name)))
    rows[name] = measure(plain, other, given.repeats)
    print(row(name, rows[name]), flush=True)
  save(given.out, pair=given.pair, batch=given.batch, rows=rows)


if __name__ == "__main__":
  main()
