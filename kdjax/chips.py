"""What TPU chips have, and the least time that a step can take on them.

    seconds = max(FLOPs / peak, bytes of HBM / its bandwidth,
                  bytes sent / bandwidth of the links)

All three overlap at best, and each is at its published most; so a step takes
longer. The links count as one: a ring uses those of one axis of the torus
unless the compiler splits an array over several.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kdjax import flops
from kdjax.hlo import Collective


class Chip(NamedTuple):
  """A chip's memory and its links.

  Attributes:
    hbm: bytes.
    hbm_rate: bytes/s.
    ici: bytes/s that it sends to the other chips of its slice, all links.
    dcn: bytes/s that it sends to other slices, its share of the hosts' network.
    largest: chips of the largest slice.
  """

  hbm: int
  hbm_rate: float
  ici: float
  dcn: float
  largest: int


# docs.cloud.google.com/tpu/docs, v5e, v5p and v6e: HBM, its bandwidth, half
# of the bidirectional bandwidth of the links. The network of v5e and v6e is a
# pod's (6.4 and 25.6 Tbit/s) over 256 chips, that of v5p 50 Gbit/s a chip. The
# compiler describes a v4 core by core, which is not how it is used: left out.
CHIPS = {
  "TPU v5 lite": Chip(16 * 2**30, 819e9, 200e9, 3.125e9, 256),
  "TPU v5": Chip(95 * 2**30, 2765e9, 600e9, 6.25e9, 6144),
  "TPU v6 lite": Chip(32 * 2**30, 1638e9, 400e9, 12.5e9, 256),
}


def roofline(
  kind: str,
  of_step: float,
  traffic: float,
  collectives: Iterable[Collective],
  slices: Sequence[int],
) -> dict[str, float] | None:
  """Seconds of a step: for `compute`, `hbm`, `ici` and `dcn`.

  Args:
    kind: a device's `device_kind`.
    of_step: FLOPs of a device.
    traffic: bytes that it reads from and writes to HBM.
    collectives: of a step.
    slices: of each device, the slice that it is in.

  Returns:
    None for a chip that is not known.
  """
  chip, peak = CHIPS.get(kind), flops.peak(kind)
  if chip is None or peak is None:
    return None
  ici = dcn = 0.0
  for one in collectives:
    within, across = sent(one, slices)
    ici, dcn = ici + one.times * within, dcn + one.times * across
  seconds = {
    "compute": of_step / peak,
    "hbm": traffic / chip.hbm_rate,
    "ici": ici / chip.ici,
  }
  if dcn:
    seconds["dcn"] = dcn / chip.dcn
  return seconds


def sent(one: Collective, slices: Sequence[int]) -> tuple[float, float]:
  """Bytes that a device sends within its slice, and to other slices, once.

  Over k slices with m devices of a group in each, an operation is done within
  them first, and a device then exchanges its 1/m of the array with the others.
  """
  where = [slices[device] for device in one.group]
  k = len(set(where))
  if k == 1:
    return one.sent, 0.0
  if one.kind == "collective-permute":
    return 0.0, one.sent
  m = len(where) // k
  twice = 2 if one.kind == "all-reduce" else 1
  within = twice * one.bytes * (m - 1) / m
  return within, twice * one.bytes / m * (k - 1) / k
