"""The whole step of a language model under a larger one, random weights.

    python benchmarks/lm_step.py
    python benchmarks/lm_step.py --size 0.6b-4b --parts time     # on a GPU
    python benchmarks/lm_step.py --size 0.6b-4b --dtype float32 \\
      --parts program text      # compiles, runs nothing

0.1 · cross-entropy + 0.9 · T² · KL, AdamW, heads that are not multiplied out.

  flops    products of matrices, with their loops, / (2 · teacher + 6 · student)
           · tokens + attention: of the step as traced, and as compiled. The
           attention is that of the scores that are made: on a CPU by blocks,
           elsewhere of the whole square, as the equation has it; a GPU's
           kernels are calls of a library, not counted
  memory   temporary memory / that of the student's own step on the labels, with
           the same head. `remat`: both with remat="block"; the teacher takes
           the batch in 4 parts, or all that is compared takes 4 microbatches
  donated  share of the state's bytes whose memory the new state takes
  time     the step / (the teacher's forward pass with its head + the student's
           own step), A B A B: seconds of all cores, on a GPU those of the wall.
           `no head`: the teacher's hidden states alone in the denominator
  text     bytes of the program, for teachers of 2 and 24 layers: as traced, and
           as compiled; seconds of all cores to compile it
  mfu      (2 · teacher + 6 · student) · tokens + half the square of attention,
           over the seconds of a step and the peak of the device: on a GPU
"""

import argparse
import functools
import math
import time as clock
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from method_cost import in_turn
from step_flops import RESULTS, bytes_of, products, put, save, temporary

from kdjax import flops, parallel
from kdjax.in_parts import in_parts
from kdjax.losses.fused import Layout
from kdjax.models.decoder import architecture, attention, decoder
from kdjax.models.decoder.parameters import shapes
from kdjax.objective import Objective, hinton
from kdjax.train_step import init_state, jit_step, make_train_step
from kdjax.types import Model

T, ALPHA, PARTS = 2.0, 0.1, 4


class Size(NamedTuple):
  """Two networks and a batch; dtype is that of the computation."""

  student: Mapping[str, Any]
  teacher: Mapping[str, Any]
  batch: int
  length: int
  dtype: str = "float32"
  remat: str = "none"


def llama(width: int, depth: int, heads: int, classes: int) -> dict[str, Any]:
  return dict(
    model_type="llama",
    vocab_size=classes,
    hidden_size=width,
    intermediate_size=3 * width,
    num_hidden_layers=depth,
    num_attention_heads=heads,
    num_key_value_heads=heads,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
  )


def qwen3(width: int, mlp: int, depth: int, heads: int) -> dict[str, Any]:
  return dict(
    model_type="qwen3",
    vocab_size=151_936,
    hidden_size=width,
    intermediate_size=mlp,
    num_hidden_layers=depth,
    num_attention_heads=heads,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40_960,
    tie_word_embeddings=True,
    hidden_act="silu",
    rms_norm_eps=1e-6,
    rope_theta=1e6,
  )


SIZES = {
  "tiny": Size(llama(8, 1, 2, 32), llama(16, 2, 2, 32), 4, 16),
  "5m-25m": Size(llama(192, 6, 6, 8192), llama(448, 8, 7, 8192), 8, 256),
  "0.6b-4b": Size(
    qwen3(1024, 3072, 28, 16),
    qwen3(2560, 9728, 36, 32),
    *(4, 4096),
    dtype="bfloat16",
    remat="block",
  ),
}


def models(size: Size, remat: str | None = None) -> tuple[Model, Model]:
  """Student and teacher; the teacher's weights lie in the compute dtype."""
  make = functools.partial(decoder, head="linear", dtype=jnp.dtype(size.dtype))
  return (
    make(size.student, remat=remat or size.remat),
    make(size.teacher, param_dtype=jnp.dtype(size.dtype)),
  )


def batch_of(size: Size) -> dict[str, jax.Array]:
  shape = size.batch, size.length
  draw = functools.partial(
    jax.random.randint, shape=shape, minval=0, maxval=classes(size)
  )
  return {
    "tokens": draw(jax.random.key(1)),
    "label": draw(jax.random.key(2)),
    "mask": jnp.ones(shape),
  }


def classes(size: Size) -> int:
  return size.student["vocab_size"]


def step_and_arguments(
  networks: tuple[Model, Model | None], size: Size, microbatches: int = 1
) -> tuple[Any, Callable[[], Any]]:
  """The step, and `() -> (state, frozen, batch)`; no teacher: labels alone."""
  teacher = networks[1]
  goal = hinton(alpha=ALPHA, temperature=T)
  if teacher is None:
    goal = Objective(goal.terms[:1])
  optimizer = optax.adamw(1e-3)
  step = make_train_step(
    *networks, goal, optimizer, microbatches=microbatches, layout=Layout()
  )

  def arguments() -> Any:
    key, batch = jax.random.key(0), batch_of(size)
    frozen = teacher.init(key, batch) if teacher else ()
    given = (*networks, goal, optimizer, key, batch)
    return init_state(*given, frozen=frozen), frozen, batch

  return jit_step(step, parallel.make_mesh(1)), arguments


def lowered(*given: Any, **more: Any) -> Any:
  step, arguments = step_and_arguments(*given, **more)
  return step.lower(*jax.eval_shape(arguments))


def needed(size: Size, *, visible: float | None = None) -> float:
  """(2 · teacher + 6 · student) · tokens + attention of that share of S².

  By default of the share that is made.
  """
  tokens, total = size.batch * size.length, 0.0
  visible = visible or scores_made(size.length)
  for config, times in ((size.teacher, 1), (size.student, 3)):
    net = architecture(config)
    weights = net.vocab_size * net.width + sum(
      math.prod(shape)
      for path, shape in shapes(net).items()
      if path.startswith("layers/") and path.endswith("kernel")
    )
    scores = 2 * net.depth * net.heads * net.head_dim * visible * size.length
    total += times * 2 * tokens * (weights + scores)
  return total


def scores_made(length: int) -> float:
  """Share of the square of scores that this backend's attention makes."""
  if jax.default_backend() != "cpu" or length <= attention.BLOCK:
    return 1.0
  made = sum((b - a) * b for a, b in attention.blocks(length))
  return made / length**2


def program(size: Size) -> dict[str, float]:
  """What is read off the compiled programs: nothing is run."""
  student, teacher = models(size, remat="none")
  step = lowered((student, teacher), size)
  compiled, alone = step.compile(), lowered((student, None), size).compile()
  tokens, chunk = size.batch * size.length, _chunk()
  count = functools.partial(products, unknown=-(-tokens // chunk))
  state = jax.eval_shape(step_and_arguments((student, teacher), size)[1])[0]
  found = {
    "flops traced": sum(count(step.as_text(dialect="hlo"))) / needed(size),
    "flops compiled": sum(count(compiled.as_text())) / needed(size),
    "memory": temporary(compiled) / temporary(alone),
    "memory, GB": temporary(compiled) / 1e9,
    "donated": compiled.memory_analysis().alias_size_in_bytes / bytes_of(state),
  }
  student, _ = models(size, remat="block")
  pairs = (student, in_parts(teacher, PARTS)), (student, teacher)
  for name, both, parts in zip(("teacher", "both"), pairs, (1, PARTS)):
    whole, own = (
      temporary(lowered(networks, size, microbatches=parts).compile())
      for networks in (both, (student, None))
    )
    name = f"memory, remat, {name} in parts"
    found |= {name: whole / own, f"{name}, GB": whole / 1e9}
  return found


def text(size: Size, depths: Sequence[int] = (2, 24)) -> dict[str, float]:
  found = {}
  for depth in depths:
    deep = size._replace(teacher={**size.teacher, "num_hidden_layers": depth})
    step = lowered(models(deep), deep)
    start = clock.process_time()
    compiled = step.compile()
    told = {
      "seconds": clock.process_time() - start,
      "MB traced": len(step.as_text()) / 1e6,
      "MB compiled": len(compiled.as_text()) / 1e6,
    }
    found |= {f"text {depth} layers, {k}": v for k, v in told.items()}
  return found


class Running:
  """A compiled step with its state, run by a call."""

  def __init__(self, networks: tuple[Model, Model | None], size: Size):
    step, arguments = step_and_arguments(networks, size)
    self.state, *self.rest = put(arguments(), parallel.make_mesh(1))
    self.compiled = step.lower(self.state, *self.rest).compile()

  def __call__(self) -> dict[str, jax.Array]:
    self.state, metrics = self.compiled(self.state, *self.rest)
    jax.block_until_ready(self.state)
    return metrics


def forward(size: Size, frozen: Any, *, head: str) -> Callable[[], Any]:
  """The teacher's forward pass, with its head multiplied out or without."""
  dtype = jnp.dtype(size.dtype)
  teacher = decoder(size.teacher, head=head, dtype=dtype)
  batch = batch_of(size)

  @jax.jit
  def outputs(frozen: Any, batch: Any) -> Any:
    made = teacher.apply(*frozen, batch, train=False)[0].logits
    return made if head == "dense" else made.hidden

  return lambda: jax.block_until_ready(outputs(frozen, batch))


def time(
  size: Size, repeats: int = 5, peak: float | None = None
) -> dict[str, float]:
  student, teacher = models(size)
  whole = Running((student, teacher), size)
  own = Running((student, None), size)
  which = "cores" if jax.default_backend() == "cpu" else "wall"
  found = {}
  for name, head in (("time", "dense"), ("time, no head", "linear")):
    if head == "dense" and size.length * size.batch * classes(size) > 2**30:
      continue  # the logits would not fit
    ahead = forward(size, whole.rest[0], head=head)

    def apart(ahead: Callable[[], Any] = ahead) -> None:
      ahead()
      own()

    times = in_turn(apart, whole, repeats)
    found[name] = times[which]
    low, high = times[f"{which}_quartiles"]
    found |= {f"{name}, quartile 1": low, f"{name}, quartile 3": high}
    seconds = times["second_seconds"]
  found["seconds of a step"] = seconds
  peak = peak or _peak()
  if peak:
    found["mfu"] = needed(size, visible=0.5) / seconds / (peak * 1e12)
  return found


def _peak() -> float | None:
  """TFLOP/s of this device."""
  found = flops.peak(jax.devices()[0].device_kind)
  return found and found / 1e12


def _chunk() -> int:
  """Tokens that the head takes at a time, as `Layout` has it by default."""
  return 256 if jax.default_backend() == "cpu" else 1024


# At most, but for the last two.
GOALS: Mapping[str, float] = {
  "flops traced": 1.03,
  "flops compiled": 1.03,
  "memory": 1.15,
  "memory, remat, teacher in parts": 1.1,
  "time": 1.08,
  "text 2 layers, MB traced": 5,
  "text 24 layers, MB traced": 5,
  "donated": 1,
  "mfu": 0.45,
}


def row(name: str, value: float) -> str:
  goal = GOALS.get(name)
  if goal is None:
    return f"{name:36}{value:10.3f}"
  least = name in ("donated", "mfu")
  reached = value >= goal if least else value <= goal
  return (
    f"{name:36}{value:10.3f}   goal {goal:<6g}{'' if reached else 'missed'}"
  )


def main(given: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parts = {"program": program, "text": text, "time": time}
  parser.add_argument("--size", choices=SIZES, default="5m-25m")
  parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
  parser.add_argument("--batch", type=int, help="rows, instead of the size's")
  parser.add_argument("--dtype", help="of the computation, likewise")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--peak", type=float, help="of the device, TFLOP/s")
  parser.add_argument("--out", type=Path, default=RESULTS / "lm_step.json")
  chosen = parser.parse_args(given)
  size = SIZES[chosen.size]
  size = size._replace(
    batch=chosen.batch or size.batch, dtype=chosen.dtype or size.dtype
  )
  parts["time"] = functools.partial(
    time, repeats=chosen.repeats, peak=chosen.peak
  )
  rows = {}
  for part in chosen.parts:
    for name, value in parts[part](size).items():
      rows[name] = value
      print(row(name, value), flush=True)
  save(chosen.out, size=chosen.size, settings=size, rows=rows, goals=GOALS)


if __name__ == "__main__":
  main()
