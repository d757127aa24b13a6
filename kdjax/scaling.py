"""What a config's distilled step takes on devices that are not here.

    python -m kdjax.scaling --config=configs/llm_8b_1b.py:64 --topology=v5e:8x8
    python -m kdjax.scaling --config=configs/digits.py --devices=8

  --config=FILE[:ARG]   as for kdjax.train; --config.NAME=VALUE too
  --topology=CHIP:SHAPE TPUs: v5e, v5p or v6e, such as v5e:16x16, v5p:4x4x4
  --slices=N            so many of them, joined by the data center's network
  --devices=N           instead: N simulated devices of this CPU
  --json=FILE           the figures, for programs
  --hlo=FILE            the compiled program's text
  --help                this text

The step is compiled and never run. No TPU is needed, no data set, no weights:
shapes are enough. `pip install 'jax[tpu]'` brings the compiler for TPUs.
data.batch_size is that of all devices together.

FLOPs are those of the matrix products and convolutions of the step as traced,
loops counted as often as they run, shared equally by the devices; `model` are
those without what is computed twice (`kdjax.flops`). Collectives and traffic
are read from the compiled program (`kdjax.hlo`). The time is a bound from below
(`kdjax.chips`): compute, memory and links overlap wholly and are at their most.
Exit codes: 0 done, 2 a mistake that the message explains.
"""

import collections
import contextlib
import importlib.util
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
from absl import flags
from jax.sharding import Mesh
from jaxtyping import PyTree

import kdjax.config as configuration
from kdjax import (
  chips,
  commands,
  errors,
  files,
  health,
  memory_plan,
  parallel,
)
from kdjax.experiment import experiment, phases
from kdjax.flops import of_program, of_step, peak
from kdjax.hlo import Collective, Program
from kdjax.losses import fused
from kdjax.memory_plan import Plan, readable
from kdjax.train_step import jit_step, state_shardings
from kdjax.types import Batch, LinearLogits, TrainState

# What libtpu otherwise asks a cloud's servers for, and the lock of a TPU.
_ALONE = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Figures(NamedTuple):
  """Of one device and one step, if nothing else is said.

  Attributes:
    kind, slices: the chip, and the slice of each device.
    mesh: devices along each axis.
    memory: bytes.
    flops: as computed; of_model: without what is computed twice.
    traffic: bytes that HBM reads and writes.
    collectives: of the step.
    seconds: what each part takes at least; None for an unknown chip.
    compile_seconds: of this machine.
  """

  kind: str
  slices: list[int]
  mesh: dict[str, int]
  memory: Plan
  flops: float
  of_model: float
  traffic: int
  collectives: list[Collective]
  seconds: dict[str, float] | None
  compile_seconds: float


def simulated(count: int) -> list[Any]:
  """So many devices of this CPU.

  Raises:
    UserError: jax has begun with fewer.
  """
  with contextlib.suppress(RuntimeError):  # it has begun
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
  devices = jax.devices("cpu")
  if len(devices) < count:
    raise errors.UserError(
      f"this process has {len(devices)} CPU devices, needs {count}: unset "
      "XLA_FLAGS, or set JAX_NUM_CPU_DEVICES"
    )
  return devices[:count]


def described(topology: str, slices: int = 1) -> list[Any]:
  """The chips of a TPU slice, or of several, as the compiler knows them.

  Raises:
    UserError: no compiler for TPUs, or no such slice.
  """
  if not importlib.util.find_spec("libtpu"):
    raise errors.UserError(
      "libtpu, the compiler for TPUs, is not installed: pip install 'jax[tpu]',"
      " or use --devices"
    )
  from jax.experimental import topologies

  for name, value in _ALONE.items():
    os.environ.setdefault(name, value)
  several = {"num_slices": slices} if slices > 1 else {}
  try:
    found = topologies.get_topology_desc(topology, "tpu", **several)
  except Exception as error:
    told = str(error).splitlines()[0]
    raise errors.UserError(
      f"got --topology={topology}, needs CHIP:SHAPE such as v5e:4x4, v5p:4x4x4 "
      f"or v6e:16x16: {told}"
    ) from error
  devices = list(found.devices)
  chip = chips.CHIPS.get(devices[0].device_kind)
  each = len(devices) // slices
  if chip is not None and each > chip.largest:
    raise errors.UserError(
      f"--topology={topology} has {each} chips, a slice has {chip.largest} at "
      "most: take several, with --slices"
    )
  return devices


def measure(
  config: Any, devices: Sequence[Any], hlo: Path | None = None
) -> Figures:
  """Compiles the config's distilled step for these devices.

  Args:
    config: the whole; its mesh is that of `devices`.
    devices: of `simulated` or `described`.
    hlo: a file for the program's text.

  Raises:
    UserError: for mistakes in the config, and a mesh or batch that the devices
      do not divide.
  """
  configuration.check_keys(config)
  mesh = parallel.make_mesh(devices=devices, **config.mesh)
  microbatches = config.phases.distilled.microbatches
  rows = config.data.batch_size
  parallel.check_batch_size(rows, mesh, microbatches=microbatches)
  here = config.copy_and_resolve_references()
  here.mesh.update(dict(data=-1, fsdp=1, model=1))
  kind = devices[0].device_kind
  with _as_on(devices):
    made = experiment(here, blank=True)
    step, given = _step(made, config, mesh)
    begin = time.perf_counter()
    traced = step.trace(*given)
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - begin
    parts = made.parts
    trips = _head_trips(parts, mesh)
    state = phases.begun(parts)
    of_model = of_step(
      parts.student,
      parts.teacher,
      (state.params, state.stats),
      parts.frozen,
      parts.batch,
    )
  text = compiled.as_text() or ""
  if hlo is not None:
    hlo.write_text(text)
  program, count = Program(text, trips), len(devices)
  # The program numbers the devices as the mesh has them.
  slices = parallel.slice_of(mesh.devices.flat)
  found = program.collectives(slices)
  computed = of_program(traced.jaxpr.jaxpr, trips) / count
  traffic = program.traffic()
  return Figures(
    kind,
    slices,
    dict(mesh.shape),
    memory_plan.read(compiled, *given),
    computed,
    of_model / count,
    traffic,
    found,
    chips.roofline(kind, computed, traffic, found, slices),
    seconds,
  )


def _step(made: Any, config: Any, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
  """The step as `distill` makes it, and its arguments' shapes."""
  ours, theirs = (made.partition[side] for side in ("student", "teacher"))
  parts = made.parts
  if config.on_nan == "skip":
    guarded = health.guarded(parts.rule.transformation)
    parts = parts._replace(rule=parts.rule._replace(transformation=guarded))
  parts = parts._replace(
    student=parallel.gathered(parts.student, mesh, ours),
    teacher=parallel.gathered(parts.teacher, mesh, theirs),
  )
  state = phases.begun(parts)
  split = state_shardings(parts.goal, state, mesh, ours)
  step = jit_step(phases.step_of(parts, fused.over(mesh)), mesh, split)
  rows = jax.tree.map(lambda _: parallel.batch_sharding(mesh), parts.batch)
  return step, (
    _on(state, split),
    _on(parts.frozen, parallel.shardings(parts.frozen, mesh, theirs)),
    _on(parts.batch, rows),
  )


def _head_trips(parts: phases.Parts, mesh: Mesh) -> int:
  """Of the loop over a head's tokens, which ends where none counts any more."""

  def logits(state: TrainState, batch: Batch) -> Any:
    apply = parts.student.apply
    return apply(state.params, state.stats, batch, train=False)[0].logits

  found = jax.eval_shape(logits, phases.begun(parts), dict(parts.batch))
  if not isinstance(found, LinearLogits):
    return 1
  tokens = math.prod(parts.batch["mask"].shape) // parts.microbatches
  each = tokens // parallel.batch_parts(mesh)
  return fused.num_chunks(fused.over(mesh), each, found.shape[-1])


def _on(shapes: PyTree, shardings: PyTree) -> PyTree:
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


@contextlib.contextmanager
def _as_on(devices: Sequence[Any]) -> Iterator[None]:
  """What is chosen by the backend is chosen as those devices would."""
  platform, count = devices[0].platform, len(devices)
  with mock.patch.multiple(
    jax, default_backend=lambda: platform, device_count=lambda: count
  ):
    yield


def table(figures: Figures) -> str:
  """What there is to be read of them."""
  axes = " x ".join(f"{name} {n}" for name, n in figures.mesh.items() if n > 1)
  count = len(figures.slices)
  slices = len(set(figures.slices))
  several = f", {slices} slices" if slices > 1 else ""
  lines = [
    f"{count} x {figures.kind}{several}: {axes or 'one device'}; compiled in "
    f"{figures.compile_seconds:.0f} s",
    "",
    # What this machine has says nothing of the devices.
    memory_plan.table(figures.memory._replace(limit=None)).rpartition("\n")[0],
  ]
  chip = chips.CHIPS.get(figures.kind)
  if chip is not None:
    fits = "fits" if figures.memory.total <= chip.hbm else "DOES NOT FIT"
    lines.append(f"{fits}: a chip has {readable(chip.hbm)}")
  lines += ["", *_of_collectives(figures), "", *_of_time(figures)]
  return "\n".join(lines)


def grouped(
  found: Sequence[Collective], slices: Sequence[int]
) -> list[dict[str, Any]]:
  """By kind and by whether a loop runs them, what travels most first."""
  sums: dict[Any, dict[str, Any]] = collections.defaultdict(
    lambda: {"operations": 0, "times": 0, "bytes": 0, "ici": 0.0, "dcn": 0.0}
  )
  for one in found:
    total = sums[one.kind, one.times > 1]
    within, across = chips.sent(one, slices)
    total["operations"] += 1
    total["times"] += one.times
    total["bytes"] += one.times * one.bytes
    total["ici"] += one.times * within
    total["dcn"] += one.times * across
  rows = [
    {"kind": kind, "in_loop": looped, **total}
    for (kind, looped), total in sums.items()
  ]
  return sorted(rows, key=lambda row: -row["ici"] - row["dcn"])


def _of_collectives(figures: Figures) -> list[str]:
  lines = [
    f"{'collectives of a step':<30}{'in the text':>12}{'times':>8}"
    f"{'bytes':>12}{'sent':>12}{'to slices':>12}"
  ]
  for row in grouped(figures.collectives, figures.slices):
    name = row["kind"] + (", in a loop" if row["in_loop"] else "")
    sizes = (readable(int(row[k])) for k in ("bytes", "ici", "dcn"))
    lines.append(
      f"{name:<30}{row['operations']:>12}{row['times']:>8}"
      + "".join(f"{size:>12}" for size in sizes)
    )
  return lines if len(lines) > 1 else ["no collectives"]


def _of_time(figures: Figures) -> list[str]:
  lines = [
    f"FLOPs of a device         {figures.flops:.4g}, of the model "
    f"{figures.of_model:.4g}",
    f"traffic of its memory     {readable(figures.traffic)}",
  ]
  if figures.seconds is None:
    return lines
  least = max(figures.seconds, key=lambda name: figures.seconds[name])  # type: ignore
  seconds = figures.seconds[least]
  told = ", ".join(f"{k} {1e3 * v:.4g}" for k, v in figures.seconds.items())
  most = figures.of_model / (seconds * (peak(figures.kind) or 1))
  return [
    *lines,
    f"a step takes at least     {1e3 * seconds:.4g} ms, by {least} ({told})",
    f"MFU is at most            {most:.1%}",
  ]


def content(figures: Figures) -> dict[str, Any]:
  """The figures, for a JSON file."""
  memory = figures.memory
  return {
    "device": figures.kind,
    "devices": len(figures.slices),
    "slices": len(set(figures.slices)),
    "mesh": figures.mesh,
    "memory": {**memory._asdict(), "total": memory.total},
    "flops": figures.flops,
    "model_flops": figures.of_model,
    "traffic": figures.traffic,
    "collectives": grouped(figures.collectives, figures.slices),
    "seconds": figures.seconds,
    "compile_seconds": figures.compile_seconds,
    "jax": jax.__version__,
  }


def main(argv: Sequence[str]) -> int:
  """The command line; returns the exit code."""
  return commands.run(argv, __doc__, lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
  given = configuration.arguments(argv, _define)
  for name in ("json", "hlo"):
    if given[name] and not os.access(Path(given[name]).parent, os.W_OK):
      raise errors.UserError(
        f"cannot write --{name}={given[name]}: name a file in a folder that "
        "exists and can be written to"
      )
  figures = measure(
    given["config"], _devices(given), given["hlo"] and Path(given["hlo"])
  )
  print(table(figures))
  if given["json"]:
    files.write_json(Path(given["json"]), content(figures))
  return 0


def _define(values: flags.FlagValues) -> None:
  for name in ("topology", "json", "hlo"):
    flags.DEFINE_string(name, None, "", flag_values=values)
  for name, default in (("devices", None), ("slices", 1)):
    flags.DEFINE_integer(name, default, "", lower_bound=1, flag_values=values)


def _devices(given: dict[str, Any]) -> list[Any]:
  topology, count = given["topology"], given["devices"]
  if bool(topology) == bool(count):
    raise errors.UserError(
      f"got --topology={topology}, --devices={count}: give one of the two"
    )
  if count:
    return simulated(count)
  jax.config.update("jax_platforms", "cpu")
  return described(topology, given["slices"])


if __name__ == "__main__":
  sys.exit(main(sys.argv))
