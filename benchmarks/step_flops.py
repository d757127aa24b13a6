"""The arithmetic of the KD step: is any of it needless?

    python benchmarks/step_flops.py
    python benchmarks/step_flops.py --pairs resnet50_to_mobilenet_v2 --batch 32

What there must be is the teacher's forward pass, the student's, and twice the
student's for its gradients, but for the gradient of the image. Products with
the padding, or with the zeros that a stride leaves, are not counted, neither
there nor in the step. The columns:

  GFLOP      what there must be, an addition and a multiplication being two
  asked      that of the step as traced, / what there must be
  compiled   that of the step as XLA compiled it, / what there must be; goal
             1.03. On a GPU convolutions are calls of a library, not counted
  compiles   compilations in three updates; "-" where none was run (224 px)
  donated    share of the state's bytes whose memory the new state takes
  NCHW       transposes of a batch of maps to channels-first, as traced
  teacher    temporary memory beyond that of the student's own step, / the
             bytes of the teacher's convolutions: near 1 if all were kept
  forward    that of the teacher's forward pass by itself, / the same

On a GPU or TPU: the same commands, with jax[cuda12] or jax[tpu] installed.
"""

import argparse
import functools
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from kdjax import models, parallel
from kdjax.adapters import from_nnx, tap_specs
from kdjax.config.goal import goal
from kdjax.objective import Objective
from kdjax.train_step import init_state, jit_step, make_train_step
from kdjax.types import Model

RESULTS = Path(__file__).parent / "results"
_WIDE = {"width": 64, "stem_width": 32}
# name: (teacher, student, pixels), a network being (name, arguments).
PAIRS: dict[str, tuple[tuple[str, dict], tuple[str, dict], int]] = {
  "resnet14_to_resnet8": (
    ("resnet_cifar", {"depth": 14}),
    ("resnet_cifar", {"depth": 8}),
    32,
  ),
  "resnet32x4_to_resnet8x4": (
    ("resnet_cifar", {"depth": 32, **_WIDE}),
    ("resnet_cifar", {"depth": 8, **_WIDE}),
    32,
  ),
  "wrn40_2_to_wrn16_2": (
    ("wrn", {"depth": 40, "width": 2}),
    ("wrn", {"depth": 16, "width": 2}),
    32,
  ),
  "resnet32x4_to_shufflenet_v2": (
    ("resnet_cifar", {"depth": 32, **_WIDE}),
    ("shufflenet_v2_cifar", {}),
    32,
  ),
  "resnet50_to_mobilenet_v2": (
    ("resnet", {"depth": 50}),
    ("mobilenet_v2", {}),
    224,
  ),
}


class Pair(NamedTuple):
  teacher: Any  # a Model, or None
  student: Model
  batch: Mapping[str, jax.ShapeDtypeStruct]


def make_pair(name: str, batch_size: int, dtype: Any = jnp.float32) -> Pair:
  """The networks of a pair, and the shapes of a batch of images."""
  teacher, student, pixels = PAIRS[name]
  classes = 1000 if pixels > 32 else 100

  def model(network: tuple[str, dict]) -> Model:
    make = functools.partial(
      models.MODELS[network[0]],
      **network[1],
      num_classes=classes,
      dtype=dtype,
    )
    return from_nnx(lambda rngs: make(rngs=rngs))

  spec = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  rows = {
    "image": spec((batch_size, pixels, pixels, 3)),
    "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    "mask": spec((batch_size,)),
    "index": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
  }
  return Pair(model(teacher), model(student), rows)


def objective(
  pair: Pair, soft: str = "kl", terms: Mapping[str, Any] | None = None
) -> Objective:
  """0.1 · hard + 0.9 · T² · soft, T = 4, and further terms as in a config."""
  key = jax.random.key(0)
  taps = [
    tap_specs(m, jax.eval_shape(m.init, key, pair.batch), pair.batch)
    for m in (pair.student, pair.teacher)
  ]
  config = {
    "alpha": 0.1,
    "hard_weight": None,
    "soft_weight": None,
    "temperature": 4.0,
    "hard": {"name": "cross_entropy"},
    "soft": {"name": soft},
    "terms": terms or {},
  }
  return goal(config, *taps, num_examples=50_000)


def step_and_arguments(
  pair: Pair, terms: Objective, mesh: Mesh
) -> tuple[Any, Callable[[], Any]]:
  """The step by SGD with momentum, and `() -> (state, frozen, batch)`.

  Without a teacher in the pair it is the student's own step.
  """
  optimizer = optax.sgd(0.05, momentum=0.9)
  networks = (pair.student, pair.teacher)
  step = make_train_step(*networks, terms, optimizer)

  def arguments() -> Any:
    key = jax.random.key(0)
    batch = values(pair)
    frozen = pair.teacher.init(key, batch) if pair.teacher else ()
    given = (*networks, terms, optimizer, key, batch)
    return init_state(*given, frozen=frozen), frozen, batch

  return jit_step(step, mesh), arguments


def put(arguments: Any, mesh: Mesh) -> Any:
  """(state, frozen, batch) where the step expects them."""
  state, frozen, batch = arguments
  # Made by another program, the state may be the very array that it began with.
  state, frozen = parallel.put((state, frozen), mesh)
  return state, frozen, parallel.put_batch(batch, mesh)


def values(pair: Pair) -> dict[str, jax.Array]:
  """Noise for images."""
  count = pair.batch["mask"].shape[0]
  image = pair.batch["image"].shape
  return {
    "image": jax.random.normal(jax.random.key(1), image),
    "label": jnp.arange(count) % 100,
    "mask": jnp.ones(count),
    "index": jnp.arange(count),
  }


_NAMED = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = \w+\[([\d,]*)\]")
_PRODUCT = re.compile(r" (convolution|dot)\(([^)]*)\)(.*)")


_BEGIN = re.compile(r"(ENTRY )?%?([\w.-]+) (?:\(.*)?\{$")
_CALLED = re.compile(r"(to_apply|calls|condition|body)=%?([\w.-]+)")


def products(hlo: str) -> list[float]:
  """FLOPs of each convolution and matrix product of a program's text.

  Each as often as it is called, and run by the loops around it.
  """
  shapes: dict[str, tuple[int, ...]] = {}
  found = []
  times, inside = executions(hlo), ""
  for line in hlo.splitlines():
    if begin := _BEGIN.match(line):
      inside = begin[2]
    named = _NAMED.match(line)
    if not named:
      continue
    shape = tuple(int(n) for n in named[2].split(",") if n)
    shapes[named[1]] = shape
    product = _PRODUCT.search(line)
    if product:
      names = re.findall(r"([\w.-]+)(?:,|$)", product[2])
      left, right = (shapes[n] for n in names)
      of = _convolution if product[1] == "convolution" else _dot
      once = 2.0 * of(left, right, shape, product[3])
      found.append(times(inside) * once)
  return found


def executions(hlo: str, unknown: int | None = None) -> Callable[[str], int]:
  """How often a computation of a program's text runs.

  A loop runs its body as often as the constant in its condition says, which is
  how loops of a fixed length are compiled; one without, `unknown` times.
  """
  calls: dict[str, list[tuple[str, str]]] = {}
  limits: dict[str, int] = {}
  entry, inside = "", ""
  for line in hlo.splitlines():
    if begin := _BEGIN.match(line):
      inside = begin[2]
      entry = inside if begin[1] else entry
    if constant := re.search(r" s32\[\] constant\((\d+)\)", line):
      limits[inside] = max(limits.get(inside, 0), int(constant[1]))
    called = dict(_CALLED.findall(line))
    for kind, name in called.items():
      over = called["condition"] if kind == "body" else ""
      calls.setdefault(name, []).append((inside, over))

  def trips(condition: str) -> int:
    if unknown is None:
      return limits[condition]
    return limits.get(condition, unknown)

  @functools.cache
  def times(name: str) -> int:
    if name == entry:
      return 1
    return sum(
      times(caller) * (trips(over) if over else 1)
      for caller, over in calls.get(name, [])
    )

  return times


def _dot(left, right, out, text: str) -> int:
  axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", text)
  contracted = [left[int(n)] for n in axes[1].split(",") if n] if axes else []
  return math.prod(out) * math.prod(contracted)


def _convolution(left, right, out, text: str) -> int:
  """Multiplications of an element of the left with one of the right."""
  a, b, c = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", text)[0]

  def number(name: str, default: int = 1) -> int:
    found = re.search(rf"{name}=(\d+)", text)
    return int(found[1]) if found else default

  window = re.search(r"window=\{([^}]*)\}", text)
  settings = dict(re.findall(r"(\w+)=(\S+)", window[1] if window else ""))
  count = left[a.index("b")] // number("batch_group_count")
  count *= out[c.index("f")] * right[b.index("i")]
  for axis in (x for x in a if x.isdigit()):
    n = int(axis)

    def of(name: str, default: str, n: int = n) -> str:
      return settings[name].split("x")[n] if name in settings else default

    count *= _meetings(
      left[a.index(axis)],
      right[b.index(axis)],
      out[c.index(axis)],
      stride=int(of("stride", "1")),
      before=int(of("pad", "0_0").split("_")[0]),
      left_dilation=int(of("lhs_dilate", "1")),
      right_dilation=int(of("rhs_dilate", "1")),
    )
  return count


def _meetings(
  left: int,
  right: int,
  out: int,
  *,
  stride: int,
  before: int,
  left_dilation: int,
  right_dilation: int,
) -> int:
  """Along one axis: how often a window's element meets one of the left."""
  at = stride * np.arange(out)[:, None] - before
  at = at + right_dilation * np.arange(right)
  inside = (at >= 0) & (at <= (left - 1) * left_dilation)
  return int(np.sum(inside & (at % left_dilation == 0)))


def forward(model: Model, batch: Mapping[str, Any], *, train: bool) -> Any:
  """A network's forward pass alone, as traced."""
  key = jax.random.key(0)

  def logits(variables: Any, batch: Any) -> Any:
    output, _ = model.apply(
      variables[0], variables[1], batch, train=train, key=key
    )
    return output.logits

  variables = jax.eval_shape(model.init, key, batch)
  return jax.jit(logits).lower(variables, batch)


def bytes_of(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def to_channels_first(hlo: str, count: int) -> int:
  """Transposes [count, H, W, C] -> [count, C, H, W]."""
  pattern = rf"\[{count},\d+,\d+,\d+\]\S* transpose\(.*=\{{0,3,1,2\}}"
  return len(re.findall(pattern, hlo))


def compilations(step: Any, arguments: Any, steps: int) -> int:
  state, *rest = arguments
  for _ in range(steps):
    state, _ = step(state, *rest)
  return step._cache_size()


def measure(name: str, batch_size: int, dtype: Any, steps: int) -> dict:
  """One row of the table."""
  pair, mesh = make_pair(name, batch_size, dtype), parallel.make_mesh(1)
  terms = objective(pair)
  step, arguments = step_and_arguments(pair, terms, mesh)
  state, *rest = jax.eval_shape(arguments)
  start = time.perf_counter()
  lowered = step.lower(state, *rest)
  compiled = lowered.compile()
  seconds = time.perf_counter() - start
  count = compilations(step, put(arguments(), mesh), steps) if steps else None

  teacher = forward(pair.teacher, pair.batch, train=False)
  student = forward(pair.student, pair.batch, train=True)
  text, of_teacher = (x.as_text(dialect="hlo") for x in (lowered, teacher))
  once = products(student.as_text(dialect="hlo"))
  # The first convolution's input is the image, which needs no gradient.
  needed = sum(products(of_teacher)) + 3 * sum(once) - once[0]
  maps = jnp.dtype(dtype).itemsize * sum(_sizes_of_convolutions(of_teacher))
  memory = compiled.memory_analysis()
  beyond = temporary(compiled) - temporary(_alone(pair, terms, mesh))
  return {
    "pair": name,
    "batch_size": batch_size,
    "gflop": needed / 1e9,
    "asked": sum(products(text)) / needed,
    "compiled": sum(products(compiled.as_text())) / needed,
    "compilations": count,
    "donated": memory.alias_size_in_bytes / bytes_of(state),
    "channels_first": to_channels_first(text, batch_size),
    "teacher": beyond / maps,
    "teacher_forward": temporary(teacher.compile()) / maps,
    "compile_seconds": seconds,
  }


def _alone(pair: Pair, terms: Objective, mesh: Mesh) -> Any:
  """The step without the teacher, compiled."""
  hard = Objective(terms.terms[:1])
  step, arguments = step_and_arguments(pair._replace(teacher=None), hard, mesh)
  return step.lower(*jax.eval_shape(arguments)).compile()


def temporary(compiled: Any) -> int:
  return compiled.memory_analysis().temp_size_in_bytes


def _sizes_of_convolutions(hlo: str) -> list[int]:
  found = re.findall(r" = \w+\[([\d,]*)\]\S* convolution\(", hlo)
  return [math.prod(int(n) for n in shape.split(",")) for shape in found]


def environment() -> dict[str, Any]:
  """The hardware, the versions and the day."""
  devices = jax.devices()
  return {
    "device": devices[0].device_kind,
    "devices": len(devices),
    "processor": _processor(),
    "cores": os.cpu_count(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "flax": flax.__version__,
    "optax": optax.__version__,
    "date": time.strftime("%Y-%m-%d"),
  }


def _processor() -> str:
  info = Path("/proc/cpuinfo")
  text = info.read_text() if info.exists() else ""
  found = re.search(r"model name\s*: (.*)", text)
  return found[1] if found else platform.processor()


def save(path: Path, **content: Any) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  content = {**environment(), **content}
  path.write_text(json.dumps(content, indent=1, default=str) + "\n")
  print(f"wrote {path}")


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  small = [name for name in PAIRS if PAIRS[name][2] <= 32]
  parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=small)
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--out", type=Path, default=RESULTS / "step_flops.json")
  given = parser.parse_args(arguments)
  print(
    f"{'':28}{'GFLOP':>10}{'asked':>10}{'compiled':>10}{'compiles':>10}"
    f"{'donated':>10}{'NCHW':>10}{'teacher':>10}{'forward':>10}"
  )
  rows = []
  for name in given.pairs:
    steps = 3 if PAIRS[name][2] <= 32 else 0
    row = measure(name, given.batch, jnp.dtype(given.dtype), steps)
    rows.append(row)
    numbers = (
      f"{row['gflop']:10.2f}{row['asked']:10.3f}{row['compiled']:10.3f}"
      f"{row['compilations'] or '-':>10}{row['donated']:10.2f}"
      f"{row['channels_first']:10}{row['teacher']:10.2f}"
      f"{row['teacher_forward']:10.2f}"
    )
    print(f"{name:28}{numbers}", flush=True)
  save(given.out, rows=rows)


if __name__ == "__main__":
  main()
