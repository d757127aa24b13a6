"""A head taken a chunk of tokens at a time, beside the whole logits.

    python benchmarks/fused_head.py
    python benchmarks/fused_head.py --parts time --repeats 9
    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \\
      python benchmarks/fused_head.py --parts sharded --out sharded.json

Both give alpha · cross-entropy + (1 − alpha) · T² · KL and the gradients of the
student's hidden states and kernel. The whole one is that equation in plain JAX,
differentiated, its [tokens, V] arrays left to the compiler; the other is
`totals.logit_terms` of `LinearLogits`, which also reports the KL at T = 1.

  memory   temporary memory of the compiled programs, whole / chunks; nothing is
           run. `growth`: that of the chunks at four times the tokens
  time     chunks / whole, run in turn, A B A B, in one process: seconds of all
           cores together, on a GPU or TPU those of the wall. `user`: a
           divergence of the user's own on both sides. `half`: chunks with half
           of the tokens masked / chunks with none. `products`: what is left of
           chunks if nothing is done to the logits, and so the least they take
  error    relative distance of the gradients to those in float64
  sharded  memory of a device, chunks / whole, on a mesh of 4 by 2: tokens by
           classes
"""

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from method_cost import in_turn
from step_flops import RESULTS, save

from kdjax import losses, totals
from kdjax.losses import fused
from kdjax.losses.fused import Layout
from kdjax.objective import hinton
from kdjax.types import LinearLogits

ALPHA, T = 0.3, 2.0
DTYPES = ("float32", "bfloat16")


class Sizes(NamedTuple):
  tokens: int
  classes: int
  student: int
  teacher: int


BIG = Sizes(8192, 131072, 2048, 4096)
SMALL = Sizes(1024, 32768, 512, 1024)
FOR_ERROR = Sizes(512, 8192, 128, 256)
SHARDED = Sizes(8192, 131072, 1024, 2048)


def arguments(sizes: Sizes, dtype: str, spread: float = 1.0) -> tuple:
  """(hidden, kernel) of student and teacher, labels and mask."""
  keys = jax.random.split(jax.random.key(0), 5)

  def normal(key, *shape, scale=1.0):
    return (scale * jax.random.normal(key, shape)).astype(dtype)

  def head(one, other, width):
    kernel = normal(other, sizes.classes, width, scale=spread / width**0.5)
    return normal(one, sizes.tokens, width), kernel

  return (
    head(*keys[:2], sizes.student),
    head(*keys[2:4], sizes.teacher),
    jax.random.randint(keys[4], (sizes.tokens,), 0, sizes.classes),
    jnp.ones(sizes.tokens),
  )


def kl(student, teacher, temperature):
  log_p = jax.nn.log_softmax(teacher / temperature)
  log_q = jax.nn.log_softmax(student / temperature)
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)


@losses.logit_loss(power=2)
def hellinger(student, teacher, *, temperature=1.0):
  """Σ (√p − √q)², as a user would write it."""
  p = jax.nn.softmax(teacher / temperature)
  log_q = jax.nn.log_softmax(student / temperature)
  return jnp.sum((jnp.sqrt(p) - jnp.exp(log_q / 2)) ** 2, -1)


def whole(soft, student, teacher, label, mask):
  def product(x, kernel):
    return jnp.einsum("nd,vd->nv", x, kernel, preferred_element_type=np.float32)

  z, y = product(*student), jax.lax.stop_gradient(product(*teacher))
  hard = -jnp.take_along_axis(jax.nn.log_softmax(z), label[:, None], 1)[:, 0]
  each = ALPHA * hard + (1 - ALPHA) * T**2 * soft(z, y, temperature=T)
  return jnp.sum(mask * each) / jnp.sum(mask)


def chunks(soft, layout, student, teacher, label, mask):
  # Schedules, so that T and alpha are traced as in a training step.
  goal = hinton(
    alpha=lambda n: n + ALPHA, temperature=lambda n: n + T, soft=soft
  )
  batch = {"label": label, "mask": mask}
  parts, sums = totals.logit_terms(
    goal.terms,
    LinearLogits(*student),
    LinearLogits(*teacher),
    batch,
    totals.denominators(goal.terms, batch),
    jnp.int32(0),
    layout,
  )
  return sum(parts.values()), sums


def products(student, teacher, label, mask):
  """The chunks with nothing done to the logits but to multiply them."""
  del label
  sums, _ = fused.sum_rows(
    lambda z, y, rows, _: ({"all": jnp.sum(z * y)}, {}),
    LinearLogits(*student),
    LinearLogits(*teacher),
    {"mask": mask},
    None,
  )
  return sums["all"]


def compiled(loss: Callable[..., Any], given: tuple):
  with_sums = getattr(loss, "func", None) is chunks
  gradient = jax.value_and_grad(loss, has_aux=with_sums)
  return jax.jit(gradient).lower(*given).compile()


def both(soft=(kl, losses.kl), layout: Layout | None = None) -> tuple:
  return (
    functools.partial(whole, soft[0]),
    functools.partial(chunks, soft[1], layout or Layout()),
  )


def temporary(loss: Callable[..., Any], given: tuple) -> int:
  return compiled(loss, given).memory_analysis().temp_size_in_bytes


def memory(sizes: Sizes = BIG) -> dict[str, float]:
  found = {}
  for dtype in DTYPES:
    more = sizes._replace(tokens=4 * sizes.tokens)
    given, more = (
      jax.eval_shape(functools.partial(arguments, size, dtype))
      for size in (sizes, more)
    )
    naive, ours = (temporary(loss, given) for loss in both())
    found[f"memory {dtype}, whole / chunks"] = naive / ours
    found[f"memory {dtype}, growth"] = temporary(both()[1], more) / ours
  return found


def ratio(first: Callable, second: Callable, repeats: int) -> float:
  """Time of the second / that of the first."""
  times = in_turn(
    lambda: jax.block_until_ready(first()),
    lambda: jax.block_until_ready(second()),
    repeats,
  )
  return times["cores" if jax.default_backend() == "cpu" else "wall"]


def time(sizes: Sizes = SMALL, repeats: int = 5) -> dict[str, float]:
  def steps(given, **how):
    losses = (*both(**how), products)
    return [functools.partial(compiled(f, given), *given) for f in losses]

  found = {}

  def compare(name, given):
    naive, ours, least = steps(given)
    found[name] = ratio(naive, ours, repeats)
    found[f"{name}, products"] = ratio(naive, least, repeats)
    return ours

  given = arguments(sizes, "float32")
  ours = compare("time float32", given)
  naive, users, _ = steps(given, soft=(hellinger, hellinger))
  found["time float32, user"] = ratio(naive, users, repeats)
  masked = given[3].at[::2].set(0)
  half = functools.partial(ours.func, *given[:3], masked)
  found["time float32, half / none masked"] = ratio(ours, half, repeats)
  longer = sizes._replace(tokens=4 * sizes.tokens)
  name = f"time float32, {longer.tokens} tokens"
  compare(name, arguments(longer, "float32"))
  compare("time bfloat16", arguments(sizes, "bfloat16"))
  return found


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def error(sizes: Sizes = FOR_ERROR) -> dict[str, float]:
  found = {}
  for dtype in DTYPES:
    worst = {}
    for spread in (1.0, 6.0):
      given = arguments(sizes, dtype, spread)
      (h, w), (g, v) = jax.tree.map(np.float64, given[:2])
      z, y = h @ w.T, g @ v.T
      onehot = np.eye(sizes.classes)[np.asarray(given[2])]
      dz = ALPHA * (softmax(z) - onehot)
      dz += (1 - ALPHA) * T * (softmax(z / T) - softmax(y / T))
      want = dz @ w / sizes.tokens, dz.T @ h / sizes.tokens
      for name, loss in zip(("whole", "chunks"), both(layout=Layout(64))):
        got = compiled(loss, given)(*given)[1]
        off = max(
          np.linalg.norm(np.float64(x) - y) / np.linalg.norm(y)
          for x, y in zip(got, want)
        )
        worst[name] = max(worst.get(name, 0), float(off))
    found |= {f"error {dtype}, {name}": x for name, x in worst.items()}
  return found


def sharded(sizes: Sizes = SHARDED) -> dict[str, float]:
  if jax.device_count() < 8:
    raise SystemExit("sharded needs 8 devices: see the commands above")
  mesh = jax.make_mesh(
    (4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2
  )

  def lie(axis):
    sharding = NamedSharding(mesh, PartitionSpec(axis))
    return lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  def head(hidden, kernel):
    return lie("data")(hidden), lie("model")(kernel)

  student, teacher, *rest = jax.eval_shape(lambda: arguments(sizes, "float32"))
  given = head(*student), head(*teacher), *map(lie("data"), rest)
  layout = Layout(128, mesh, classes="model")
  naive, ours = (temporary(loss, given) for loss in both(layout=layout))
  return {"sharded memory, chunks / whole": ours / naive}


# What is wanted: at least, of the memory, and otherwise at most.
GOALS: Mapping[str, float] = {
  "memory float32, whole / chunks": 40,
  "memory float32, growth": 1.1,
  "memory bfloat16, whole / chunks": 18,
  "memory bfloat16, growth": 1.1,
  "time float32": 0.85,
  "time float32, user": 0.9,
  "time float32, half / none masked": 0.6,
  "time float32, 4096 tokens": 0.45,
  "time bfloat16": 0.55,
  "error float32, chunks": 3e-6,
  "error bfloat16, chunks": 3e-3,
  "sharded memory, chunks / whole": 0.12,
}


def row(name: str, value: float) -> str:
  goal = GOALS.get(name)
  told = ""
  if goal is not None:
    reached = value >= goal if "whole / chunks" in name else value <= goal
    told = f"   goal {goal:<8g}{'' if reached else 'missed'}"
  return f"{name:40}{value:10.3g}{told}"


def main(given: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parts = {"memory": memory, "time": time, "error": error, "sharded": sharded}
  parser.add_argument(
    "--parts", nargs="+", choices=parts, default=["memory", "error", "time"]
  )
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--out", type=Path, default=RESULTS / "fused_head.json")
  chosen = parser.parse_args(given)
  parts["time"] = functools.partial(time, repeats=chosen.repeats)
  rows = {}
  for part in chosen.parts:
    for name, value in parts[part]().items():
      rows[name] = value
      print(row(name, value), flush=True)
  save(chosen.out, rows=rows, goals=GOALS)


if __name__ == "__main__":
  main()
