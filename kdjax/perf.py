"""How fast a run is: the metrics `perf/<figure>`.

steps_per_second     of the time in steps and in waiting for their batches;
                     evaluation and saving are left out
examples_per_second  the same, times the rows of the whole batch
input_wait           share of that time in which the host waited for the next
                     batch. The device may still compute meanwhile: it idles for
                     this share at most
memory_gib           the most that any device of this process has had in use;
                     absent where the backend does not say (CPU)
mfu                  see `kdjax.flops`; absent for devices it does not know
"""

from collections.abc import Sequence
from typing import Any

import jax

from kdjax import flops
from kdjax.clock import Clock

# Steps between figures: what one step takes says little.
EVERY = 10


class Meter:
  """The figures of the steps since they were last read.

  Args:
    clock: of the run.
    num_examples: rows of the whole batch.
    devices: those that compute together.
    of_step: model FLOPs of a step; None leaves `mfu` out.
  """

  def __init__(
    self,
    clock: Clock,
    num_examples: int,
    devices: Sequence[Any],
    of_step: float | None = None,
  ):
    self._clock, self._num_examples = clock, num_examples
    self._devices, self._of_step = devices, of_step
    self._before = self._spent()

  def read(self) -> dict[str, float]:
    """The figures, without waiting for a device; {} if no step has ended."""
    now, before = self._spent(), self._before
    steps, stepping, waited = (b - a for a, b in zip(before, now))
    if not steps or stepping <= 0:
      return {}
    self._before = now
    rate = steps / stepping
    found = {
      "perf/steps_per_second": rate,
      "perf/examples_per_second": rate * self._num_examples,
      "perf/input_wait": waited / stepping,
    }
    memory = peak_memory(self._devices)
    if memory is not None:
      found["perf/memory_gib"] = memory / 2**30
    if self._of_step is not None:
      kind = self._devices[0].device_kind
      share = flops.mfu(self._of_step, 1 / rate, kind, len(self._devices))
      if share is not None:
        found["perf/mfu"] = share
    return found

  def _spent(self) -> tuple[int, float, float]:
    spent = self._clock.read()
    waited = spent.get("input", 0.0)
    return self._clock.steps, spent.get("steps", 0.0) + waited, waited


def peak_memory(devices: Sequence[Any]) -> int | None:
  """Bytes of the fullest of this process's devices at its fullest."""
  mine = [d for d in devices if d.process_index == jax.process_index()]
  found = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in mine]
  return max((x for x in found if x is not None), default=None)
