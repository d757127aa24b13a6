"""A step is compiled, and its bytes are counted."""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from kdjax.types import Batch, TrainState


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

  def figures(self) -> dict[str, Any]:
    """For a file."""
    return {**self._asdict(), "total": self.total}


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
  student = held((state.params, state.stats))
  optimizer = held(state.opt_state)
  return Plan(
    student=student,
    optimizer=optimizer,
    other=held(state) - student - optimizer,
    teacher=held(frozen),
    batch=held(batch),
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


def held(tree: PyTree) -> int:
  """Bytes of the shards that one device holds."""

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
