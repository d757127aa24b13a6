"""The head of fused_head.py compiled for a TPU v5e, on a machine without one.

    pip install libtpu==0.0.52   # with jax 0.10.2
    python benchmarks/tpu_head.py
    python benchmarks/tpu_head.py --parts step

Nothing is run: libtpu compiles for a chip that is described to it. bfloat16,
8192 tokens, 131072 classes, chunks of 1024 tokens.

  memory  temporary memory of the compiled programs, whole / chunks
  cycles  the compiler's own estimate of the cycles, chunks / whole: its figure
          for each instruction times how often that is run, all tokens counting
  step    a whole distillation step of two small decoders for one chip: that it
          compiles, its temporary memory in MiB, and how many of its calls are
          kernels (attention's, forward and backward)
"""

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fused_head import BIG, Sizes, arguments, both, compiled
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from step_flops import _BEGIN, RESULTS, executions, save

from kdjax.losses.fused import Layout
from kdjax.models.decoder import decoder
from kdjax.objective import hinton
from kdjax.train_step import init_state, make_train_step

CHUNK = 1024
# What libtpu otherwise asks a cloud's servers for.
_ALONE = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


def chip() -> NamedSharding:
  """One chip of a v5e host."""
  for name, value in _ALONE.items():
    os.environ.setdefault(name, value)
  devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
  return NamedSharding(Mesh(np.array(devices[:1]), ("one",)), PartitionSpec())


def on(sharding: NamedSharding, shapes: Any) -> Any:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
  )


def as_tpu() -> Any:
  """What is chosen by the backend is chosen for a chip."""
  return mock.patch.multiple(
    jax, default_backend=lambda: "tpu", device_count=lambda: 1
  )


def cycles(hlo: str, chunks: int) -> int:
  """Estimated cycles of a program whose loop over tokens has `chunks` trips."""
  # A TPU's layouts stand where other text has none.
  times = executions(re.sub(r"\]\{[\d,]*:[^}]*\}", "]", hlo), chunks)
  total, inside = 0, ""
  for line in hlo.splitlines():
    if begin := _BEGIN.match(line):
      inside = begin[2]
    if told := re.search(r'"estimated_cycles":"(\d+)"', line):
      total += int(told[1]) * times(inside)
  return total


def head(sharding: NamedSharding, sizes: Sizes = BIG) -> dict[str, float]:
  given = on(sharding, jax.eval_shape(lambda: arguments(sizes, "bfloat16")))
  with as_tpu():
    naive, ours = (
      compiled(loss, given) for loss in both(layout=Layout(chunk=CHUNK))
    )
  memory = [
    x.memory_analysis().temp_size_in_bytes  # type: ignore
    for x in (naive, ours)
  ]
  trips = -(-sizes.tokens // CHUNK)
  estimates = [cycles(x.as_text() or "", trips) for x in (naive, ours)]
  return {
    "memory, whole / chunks": memory[0] / memory[1],
    "cycles, chunks / whole": estimates[1] / estimates[0],
  }


def config(width: int) -> dict[str, Any]:
  return {
    "model_type": "qwen3",
    "vocab_size": 32768,
    "hidden_size": width,
    "intermediate_size": 2 * width,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
  }


def step(sharding: NamedSharding) -> dict[str, float]:
  half: dict[str, Any] = {"head": "linear", "dtype": jnp.bfloat16}
  student, teacher = (decoder(config(n), **half) for n in (256, 512))
  goal, optimizer = hinton(alpha=0.5, temperature=2.0), optax.adamw(1e-3)
  tokens = jnp.zeros((4, 1024), jnp.int32)
  batch = {
    "tokens": tokens,
    "segment_ids": tokens + 1,
    "label": tokens,
    "mask": jnp.ones(tokens.shape),
  }

  def start(key):
    frozen = teacher.init(key, batch)
    state = init_state(
      student, teacher, goal, optimizer, key, batch, frozen=frozen
    )
    return state, frozen

  state, frozen = jax.eval_shape(start, jax.random.key(0))
  run = make_train_step(student, teacher, goal, optimizer)
  with as_tpu():
    program = (
      jax.jit(run, donate_argnums=0)
      .lower(*on(sharding, (state, frozen, batch)))
      .compile()
    )
  temporary: int = program.memory_analysis().temp_size_in_bytes  # type: ignore
  text = program.as_text() or ""
  kernels = text.count('custom_call_target="tpu_custom_call"')
  return {"step, MiB": temporary / 2**20, "step, kernels": kernels}


GOALS = {"memory, whole / chunks": 3.5, "cycles, chunks / whole": 0.92}
PARTS: dict[str, Callable[[NamedSharding], dict[str, float]]] = {
  "head": head,
  "step": step,
}


def row(name: str, value: float) -> str:
  goal = GOALS.get(name)
  told = ""
  if goal is not None:
    reached = value >= goal if "whole / chunks" in name else value <= goal
    told = f"   goal {goal:<6g}{'' if reached else 'missed'}"
  return f"{name:26}{value:8.3g}{told}"


def main(given: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
  parser.add_argument("--out", type=Path, default=RESULTS / "tpu_head.json")
  chosen = parser.parse_args(given)
  if not importlib.util.find_spec("libtpu"):
    print("libtpu is not installed: pip install libtpu==0.0.52")
    sys.exit(2)
  rows, sharding = {}, chip()
  for part in chosen.parts:
    for name, value in PARTS[part](sharding).items():
      rows[name] = value
      print(row(name, value), flush=True)
  save(chosen.out, rows=rows, goals=GOALS)


if __name__ == "__main__":
  main()
