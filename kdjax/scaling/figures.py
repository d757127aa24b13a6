"""A config's distilled step, compiled for some devices: `measure`."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

import kdjax.config as configuration
from kdjax import chips, health, memory_plan, parallel
from kdjax.errors import UserError, in_line
from kdjax.experiment import experiment, phases
from kdjax.flops import of_program, of_step
from kdjax.hlo import Collective, Program
from kdjax.losses import fused
from kdjax.memory_plan import Plan, readable
from kdjax.train_state import state_shardings
from kdjax.train_step import jit_step
from kdjax.types import Batch, LinearLogits, TrainState


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


def measure(
  config: Any, devices: Sequence[Any], hlo: Path | None = None
) -> Figures:
  """Compiles the config's distilled step for these devices.

  Args:
    config: the whole; its mesh is that of `devices`.
    devices: of `simulated` or `described`.
    hlo: a file for the program's text.

  Raises:
    UserError: for mistakes in the config, a mesh or batch that the devices do
      not divide, and a program that the compiler cannot print.
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
  memory = memory_plan.read(compiled, *given)
  text = _text(compiled, kind, memory)
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
    memory,
    computed,
    of_model / count,
    traffic,
    found,
    chips.roofline(kind, computed, traffic, found, slices),
    seconds,
  )


def _text(compiled: Any, kind: str, memory: Plan) -> str:
  try:
    return compiled.as_text() or ""
  except jax.errors.JaxRuntimeError as error:
    # As libtpu 0.0.52 does of some programs for v5p.
    raise UserError(
      f"the step compiles for {kind} and takes {readable(memory.total)} of a "
      "device, but the compiler cannot print it, so that its collectives and "
      f"time are not known: try another chip ({in_line(str(error))[:200]})"
    ) from error


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
