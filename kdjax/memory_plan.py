"""What a step takes of each device's memory, before the first one runs.

The arrays that go in are counted by their shardings, the rest is what the
compiled step says of itself. Nothing is executed.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from kdjax import errors, totals
from kdjax.losses.fused import Layout
from kdjax.objective import Objective, Term, as_objective
from kdjax.types import Batch, LinearLogits, Model, TrainState


class Plan(NamedTuple):
  """Bytes on one device; where devices differ, on the fullest.

  Attributes:
    student: its parameters and other variables.
    optimizer: the optimizer's state.
    other: the rest of the state: what terms own, the key, the count.
    teacher: its variables.
    batch: this device's rows.
    temporary: what the step makes and lets go of: activations, gradients, the
      head's logits.
    head: of the temporary memory, what the head takes when compiled alone;
      None where that was not asked.
    output: what comes out, the donated state left out: the metrics.
    program: the compiled program.
    state: student + optimizer + other.
    donated: how much of the state's memory the new state takes over.
    num_devices, device: how many, of which kind.
    limit: what the device has; on a CPU an equal share of the host's memory.
      None where nobody knows.
    reported: the limit is the backend's own.
  """

  student: int
  optimizer: int
  other: int
  teacher: int
  batch: int
  temporary: int
  head: int | None
  output: int
  program: int
  donated: int
  num_devices: int
  device: str
  limit: int | None
  reported: bool

  @property
  def state(self) -> int:
    return self.student + self.optimizer + self.other

  @property
  def activations(self) -> int:
    """The temporary memory beyond the head's; a gradient is among it too."""
    return max(self.temporary - (self.head or 0), 0)

  @property
  def total(self) -> int:
    """The peak: everything at once, which is not below the truth."""
    arguments = self.state + self.teacher + self.batch
    return arguments + self.temporary + self.output + self.program


def plan(
  step: Any,
  state: TrainState,
  frozen: PyTree,
  batch: Batch,
  *,
  head: int | None = None,
) -> Plan:
  """Compiles the step and reads what it needs.

  Called with the same arrays (or `ShapeDtypeStruct`s that have their
  shardings), `step` then runs the program that was compiled here, and compiles
  none of its own.

  Args:
    step: of `jit_step`.
    state, frozen, batch: its arguments, where they lie when it is called.
    head: of `head_bytes`.
  """
  compiled = step.lower(state, frozen, batch).compile()
  return read(compiled, state, frozen, batch, head=head)


def read(
  compiled: Any,
  state: TrainState,
  frozen: PyTree,
  batch: Batch,
  *,
  head: int | None = None,
) -> Plan:
  """What a compiled step says; arguments as for `plan`."""
  memory: Any = compiled.memory_analysis()
  devices = sorted(
    {
      device
      for x in jax.tree.leaves(compiled.input_shardings)
      for device in x.device_set
    },
    key=lambda device: device.id,
  )
  limit, reported = _limit(devices)
  student = _bytes((state.params, state.stats))
  optimizer = _bytes(state.opt_state)
  return Plan(
    student=student,
    optimizer=optimizer,
    other=_bytes(state) - student - optimizer,
    teacher=_bytes(frozen),
    batch=_bytes(batch),
    temporary=memory.temp_size_in_bytes,
    head=head,
    output=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    program=memory.generated_code_size_in_bytes,
    donated=memory.alias_size_in_bytes,
    num_devices=len(devices),
    device=devices[0].device_kind,
    limit=limit,
    reported=reported,
  )


def head_bytes(
  student: Model,
  teacher: Model | None,
  terms: Objective | Sequence[Term],
  state: TrainState,
  frozen: PyTree,
  batch: Batch,
  *,
  microbatches: int = 1,
  layout: Layout | None = None,
) -> int:
  """What the losses on logits take by themselves, compiled without networks.

  Their temporary memory and gradients and, where logits are multiplied out,
  the logits. In the whole step a part of it may be used again for something
  else. Arguments are those of `make_train_step`; `batch` as for `plan`.
  """
  terms = [t for t in as_objective(terms).terms if t.reads_logits]

  def part(x: Any) -> jax.ShapeDtypeStruct:
    shape = (x.shape[0] // microbatches, *x.shape[1:])
    sharding = getattr(x, "sharding", None)
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

  rows = {name: part(x) for name, x in batch.items()}

  def logits(model: Model, variables: PyTree, *, train: bool) -> Any:
    apply = functools.partial(model.apply, train=train, key=jax.random.key(0))
    made = jax.eval_shape(apply, *variables, rows)[0].logits
    split = functools.partial(
      jax.ShapeDtypeStruct, sharding=rows["mask"].sharding
    )
    if not isinstance(made, LinearLogits):
      return split(made.shape, made.dtype)
    hidden = split(made.hidden.shape, made.hidden.dtype)
    return dataclasses.replace(made, hidden=hidden)

  def loss(student: Any, teacher: Any, rows: Batch) -> tuple[Array, Any]:
    divide_by = totals.denominators(terms, rows)
    groups, sums = totals.logit_terms(
      terms, student, teacher, rows, divide_by, jnp.int32(0), layout
    )
    return sum(groups.values(), jnp.float32(0)), sums

  ours = logits(student, (state.params, state.stats), train=True)
  theirs = teacher and logits(teacher, frozen, train=False)
  gradient = jax.jit(jax.grad(loss, has_aux=True))
  compiled = gradient.lower(ours, theirs, rows).compile()
  memory: Any = compiled.memory_analysis()
  held = memory.temp_size_in_bytes + memory.output_size_in_bytes
  if isinstance(ours, LinearLogits):
    return held
  return held + _bytes((ours, theirs))


def table(
  plan: Plan,
  settings: Mapping[str, Any] | None = None,
  *,
  phase: str = "distilled",
) -> str:
  """A row a part and its share; below, if it does not fit, what to change.

  Args:
    settings, phase: as for `advice`.
  """
  rows = {**_parts(plan), "total": plan.total}
  lines = [f"memory of each of {plan.num_devices} x {plan.device}"]
  lines += [
    f"{name:<18}{readable(size):>10}{size / plan.total:>6.0%}"
    for name, size in rows.items()
    if size
  ]
  if plan.limit is None:
    return "\n".join([*lines, "the device does not tell how much it has"])
  whose = "the device" if plan.reported else "this host, all devices alike,"
  lines.append(f"{whose} has {readable(plan.limit)}")
  if plan.total > plan.limit:
    lines += ["it does not fit:", *advice(plan, settings, phase=phase)]
  return "\n".join(lines)


def line(plan: Plan) -> str:
  """The parts of some size, on one line."""
  sizes = [
    f"{name} {readable(size)}"
    for name, size in _parts(plan).items()
    if size >= plan.total / 100
  ]
  has = "" if plan.limit is None else f" of {readable(plan.limit)}"
  where = f"each of {plan.num_devices} {plan.device} device(s)"
  return f"takes {readable(plan.total)}{has} on {where}: {', '.join(sizes)}"


def advice(
  plan: Plan,
  settings: Mapping[str, Any] | None = None,
  *,
  phase: str = "distilled",
) -> list[str]:
  """What to change, for the two largest parts that anything can be done about.

  Args:
    settings: `{config key: value}` of what is in use, such as
      `{"student.remat": "block"}`; what is done already is not advised. Read
      are teacher.dtype, head, data.batch_size and the phase's network.remat,
      microbatches and optimizer.name.
    phase: whose step it is: of `teacher`, the network is the teacher.
  """
  settings, keys = settings or {}, f"phases.{phase}"
  network = "teacher" if phase == "teacher" else "student"
  twice = 2 * settings.get(f"{keys}.microbatches", 1)
  rows = settings.get("data.batch_size", twice * plan.num_devices)
  name = settings.get(f"{keys}.optimizer.name", "")
  stored = settings.get("teacher.dtype", "float32") == "float32"
  remedies = {
    "activations": {
      f'{network}.remat="block"': settings.get(f"{network}.remat") != "block",
      f"{keys}.microbatches={twice}": rows % (twice * plan.num_devices) == 0,
      "a smaller data.batch_size or data.sequence_length": True,
      "more devices": True,
    },
    "head": {'head="linear"': settings.get("head") != "linear"},
    "teacher": {'teacher.dtype="bfloat16"': stored},
    "optimizer": {
      f'{keys}.optimizer.name="adafactor"': name != "adafactor",
      f'{keys}.optimizer.mu_dtype="bfloat16"': name in ("", "adam", "adamw"),
    },
  }
  if plan.head is None:
    remedies["activations"] = remedies["head"] | remedies["activations"]
  found = {}
  for part, size in _parts(plan).items():
    part = part.removesuffix(", head")
    ways = [way for way, open_ in remedies.get(part, {}).items() if open_]
    if size and ways:
      found[f"{part}, {readable(size)}: {', or '.join(ways)}"] = size
  return sorted(found, key=lambda line: -found[line])[:2]


def check_fits(
  plan: Plan,
  settings: Mapping[str, Any] | None = None,
  *,
  phase: str = "distilled",
) -> None:
  """Refuses a step that the device cannot hold.

  Only where the backend says what it has: a host's memory may be swapped, or
  be less than what the system tells.

  Raises:
    UserError: with what it takes, what there is, and `advice`.
  """
  if plan.reported and plan.limit is not None and plan.total > plan.limit:
    ways = "; ".join(advice(plan, settings, phase=phase))
    raise errors.UserError(
      f"a step takes {readable(plan.total)} of each device, {plan.device} has "
      f"{readable(plan.limit)}: change {ways or 'to a smaller student'}"
    )


def readable(size: int) -> str:
  """In units of 1024: 1536 -> 1.5 KiB."""
  power = min(max(size.bit_length() - 1, 0) // 10, 4)
  unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
  return f"{size / 1024**power:.{1 if power else 0}f} {unit}"


def _parts(plan: Plan) -> dict[str, int]:
  whole = "activations" if plan.head is not None else "activations, head"
  return {
    "student": plan.student,
    "optimizer": plan.optimizer,
    "rest of the state": plan.other,
    "teacher": plan.teacher,
    "batch": plan.batch,
    whole: plan.activations,
    "head": plan.head or 0,
    "output": plan.output,
    "program": plan.program,
  }


def _bytes(tree: PyTree) -> int:
  """Of the shards that one device holds."""

  def one(x: Any) -> int:
    sharding = getattr(x, "sharding", None)
    shape = sharding.shard_shape(x.shape) if sharding else x.shape
    return math.prod(shape) * x.dtype.itemsize

  return sum(one(x) for x in jax.tree.leaves(tree))


def _limit(devices: Sequence[Any]) -> tuple[int | None, bool]:
  """What a device has, and whether the backend says so."""
  first = next(d for d in devices if d.process_index == jax.process_index())
  try:
    told = (first.memory_stats() or {}).get("bytes_limit")
  except jax.errors.JaxRuntimeError:  # compiled for what is not here
    return None, False
  if told is not None:
    return told, True
  if first.platform != "cpu" or not hasattr(os, "sysconf"):
    return None, False
  host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return host // jax.local_device_count(), False
