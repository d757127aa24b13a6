"""Which axis of which array is split over which axis of the mesh.

A rule is `(pattern, axes)`: a regular expression that is searched for in an
array's path, such as "layers/0/kernel", and for each axis of the array the axes
of the mesh that split it, or None. The first rule counts whose pattern is found
and that has as many axes as the array:

    (
      (r"(query|key|value)/kernel$", (None, "fsdp", "model")),
      (r"embed/kernel$", ("model", "fsdp")),
    )

What no rule fits is split over `fsdp` along its largest axis that is a multiple
of it; if there is none, or the array is small, every device has all of it. An
optimizer's moments bear the paths of their parameters and have their shapes, so
they lie where those do.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from kdjax import errors

Axis = str | tuple[str, ...] | None
Rule = tuple[str, tuple[Axis, ...]]

# Fewer elements are not worth a collective of their own.
SMALL = 1024


def shardings(tree: PyTree, mesh: Mesh, rules: Sequence[Rule] = ()) -> PyTree:
  """A `NamedSharding` for each array of a tree, or for each shape."""

  def one(path: Any, x: Any) -> NamedSharding:
    return NamedSharding(mesh, spec(_name(path), np.shape(x), mesh, rules))

  return jax.tree_util.tree_map_with_path(one, tree)


def spec(
  name: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence[Rule] = ()
) -> PartitionSpec:
  """Of one array. An axis of a rule that does not divide splits nothing."""
  for pattern, axes in rules:
    if len(axes) == len(shape) and re.search(pattern, name):
      fitting = [
        axis if size % _size(mesh, axis) == 0 else None
        for axis, size in zip(axes, shape)
      ]
      return PartitionSpec(*fitting)
  return _largest(shape, mesh)


def _largest(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  count = _size(mesh, "fsdp") if "fsdp" in mesh.axis_names else 1
  dividing = [n for n, size in enumerate(shape) if size % count == 0]
  if count == 1 or not dividing or math.prod(shape) < SMALL:
    return PartitionSpec()
  widest = max(dividing, key=lambda n: shape[n])
  return PartitionSpec(*(None,) * widest, "fsdp")


def _size(mesh: Mesh, axis: Axis) -> int:
  names = (axis,) if isinstance(axis, str) else axis or ()
  return math.prod(mesh.shape[name] for name in names)


def check_rules(rules: Sequence[Any], mesh: Mesh, key: str) -> None:
  """Refuses what is no rule.

  Args:
    key: of the config, for the message.

  Raises:
    UserError: not (pattern, axes), a pattern that is no regular expression, an
      axis that the mesh has not, or one used twice.
  """
  for rule in rules:
    if (
      len(rule) != 2
      or not isinstance(rule[0], str)
      or not isinstance(rule[1], tuple | list)
    ):
      raise errors.UserError(
        f'{key} has {rule!r}, needs (pattern, axes), such as ("kernel$", (None,'
        ' "fsdp"))'
      )
    pattern, axes = rule
    try:
      re.compile(pattern)
    except re.error as error:
      raise errors.UserError(
        f"{key}: {pattern!r} is no regular expression: {error}"
      ) from None
    named = [n for a in axes for n in ((a,) if isinstance(a, str) else a or ())]
    for name in named:
      if name not in mesh.axis_names:
        raise errors.unknown(
          f"axis of the mesh in {key}", name, mesh.axis_names
        )
    if len(named) > len(set(named)):
      raise errors.UserError(
        f"{key}: {pattern!r} names an axis twice in {axes}: an axis of the "
        "mesh splits one axis of an array"
      )


def table(tree: PyTree) -> str:
  """What lies where: a line for each kind of array, the largest first.

  Args:
    tree: of arrays or shapes that have their shardings.
  """
  kinds: dict[tuple[Any, ...], list[Any]] = {}
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    axes = tuple(x.sharding.spec)
    kind = x.shape, str(x.dtype), axes
    kinds.setdefault(kind, []).append((_name(path), x))
  lines = [("bytes a device", "split over", "array", "")]
  for (shape, dtype, axes), found in sorted(
    kinds.items(), key=lambda kind: -_bytes_each(kind[1])
  ):
    split = " ".join(
      "·" if a is None else "+".join((a,) if isinstance(a, str) else a)
      for a in (*axes, *(None,) * (len(shape) - len(axes)))
    )
    names, more = found[0][0], len(found) - 1
    lines.append(
      (
        f"{_bytes_each(found):,}",
        split if any(axes) else "every device has all",
        f"{dtype}[{','.join(map(str, shape))}]",
        names + (f" and {more} more" if more else ""),
      )
    )
  widths = [max(len(line[n]) for line in lines) for n in range(3)]
  return "\n".join(
    f"{a:>{widths[0]}}  {b:<{widths[1]}}  {c:<{widths[2]}}  {d}".rstrip()
    for a, b, c, d in lines
  )


def unsplit(tree: PyTree) -> str:
  """A line on larger arrays that nothing splits, where others are; or ""."""
  found = [
    (_name(path), x)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
    if x.size >= SMALL and x.sharding.is_fully_replicated
  ]
  meshes = {x.sharding.mesh for _, x in found}
  splitting = ("fsdp", "model")
  if not any(m.shape.get(axis, 1) > 1 for m in meshes for axis in splitting):
    return ""
  shown = ", ".join(name for name, _ in found[:3])
  more = f" and {len(found) - 3} more" if len(found) > 3 else ""
  return (
    f"{len(found)} arrays of {_bytes_each(found) / 2**20:.1f} MiB lie whole on "
    f"every device, as no axis of theirs divides: {shown}{more}"
  )


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _bytes_each(found: Sequence[tuple[str, Any]]) -> int:
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for _, x in found
  )
