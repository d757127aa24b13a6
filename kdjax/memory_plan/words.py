"""A plan in words, and what to change where it does not fit."""

from collections.abc import Mapping
from typing import Any

from kdjax import errors
from kdjax.memory_plan.measured import Plan


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
