"""Adapters: a student whose own variables are two thin matrices a kernel.

    y = x · W + scale · (x · A) · B,  scale = α / rank of the paper

W stays as it is, and lies beside the teacher in `frozen`. The adapters alone
are the student's params: trained, in the optimizer, in checkpoints.

    student_of=lambda adapters, frozen: attach(frozen[0], adapters, scale)

Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.
"""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kdjax import errors
from kdjax.types import Params

# Every linear map of a decoder's layers.
LAYERS = ("layers/*/kernel",)
_PARTS = {"lora_in", "lora_out"}


def init(
  key: Array,
  params: Params,
  *,
  rank: int,
  targets: Sequence[str] = LAYERS,
  dtype: Any = jnp.float32,
) -> Params:
  """Adapters that change nothing yet: A is drawn, B is zero.

  A is normal of variance 1 / inputs, so that x · A is as large as x; the paper
  names no variance.

  Args:
    key: seeds A.
    params: nested dicts; of an array `[..., inputs, outputs]` each matrix has
      an adapter of its own, as where layers are stacked.
    rank: inner width of A · B, from 1 to that of the narrowest target.
    targets: paths in `params`, or patterns of them.
    dtype: of the adapters; that of the params may be a smaller one.

  Returns:
    A tree like `params`, of the targets alone, each with `lora_in`
    `[..., inputs, rank]` and `lora_out` `[..., rank, outputs]`.

  Raises:
    UserError: a target that matches no array, or one that is no matrix; a rank
      out of range.
  """
  shapes = {path: jnp.shape(x) for path, x in _flat(params)}
  chosen = [p for p in shapes if any(_matches(p, t) for t in targets)]
  for target in targets:
    if not any(_matches(p, target) for p in shapes):
      raise errors.unknown("target of the adapters", target, shapes)
  if flat := [p for p in chosen if len(shapes[p]) < 2]:
    raise errors.UserError(
      f"targets of the adapters match {', '.join(flat)}, which are no matrices:"
      " name kernels alone"
    )
  most = min(min(shapes[p][-2:]) for p in chosen)
  if not 1 <= rank <= most:
    raise errors.UserError(
      f"got adapters of rank {rank}, needs 1 to {most}, the narrowest target's "
      "width: change the rank, or the targets"
    )
  tree: dict[str, Any] = {}
  for n, path in enumerate(chosen):
    *lead, inputs, outputs = shapes[path]
    drawn = jax.random.normal(jax.random.fold_in(key, n), (*lead, inputs, rank))
    node = tree
    for name in path.split("/"):
      node = node.setdefault(name, {})
    node["lora_in"] = (drawn / inputs**0.5).astype(dtype)
    node["lora_out"] = jnp.zeros((*lead, rank, outputs), dtype)
  return tree


def attach(base: Params, adapters: Params, scale: float) -> Params:
  """Params with each adapter beside its kernel, for a decoder's `apply`.

  No kernel is copied, and none has a gradient computed that nobody asks for.

  Args:
    base: the params that `init` was given; not changed.
    adapters: of `init`, for arrays that are called "kernel".
    scale: factor on A · B; it goes into B.
  """

  def beside(parent: dict[str, Any], name: str, a: Array, b: Array) -> None:
    if name != "kernel":
      raise errors.UserError(
        f"an adapter of {name!r} cannot be attached: only a decoder's kernels "
        "take one beside them; use lora.merge"
      )
    parent |= {"lora_in": a, "lora_out": b * jnp.asarray(scale, b.dtype)}

  return _with(base, adapters, beside)


def merge(base: Params, adapters: Params, scale: float) -> Params:
  """W + scale · A · B, in the dtype of W: for any network, and for export.

  The sum is taken in float32. Arrays without an adapter are those of `base`.
  """

  def into(parent: dict[str, Any], name: str, a: Array, b: Array) -> None:
    kernel = jnp.asarray(parent[name])
    wide = jnp.promote_types(jnp.promote_types(kernel.dtype, a.dtype), "f4")
    product = jnp.matmul(
      a.astype(wide), b.astype(wide), precision=jax.lax.Precision.HIGHEST
    )
    parent[name] = (kernel.astype(wide) + scale * product).astype(kernel.dtype)

  return _with(base, adapters, into)


def _with(
  base: Params,
  adapters: Params,
  put: Callable[[dict[str, Any], str, Array, Array], None],
) -> Params:
  """A copy of the dicts of `base`, in which `put` places every adapter."""
  tree = dict(base)
  for name, node in adapters.items():
    if name not in tree:
      raise errors.unknown("array with an adapter", name, tree)
    if set(node) == _PARTS:
      put(tree, name, node["lora_in"], node["lora_out"])
    else:
      tree[name] = _with(tree[name], node, put)
  return tree


def _flat(tree: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
  found = []
  for name, node in tree.items():
    path = f"{above}{name}"
    if isinstance(node, Mapping):
      found += _flat(node, f"{path}/")
    else:
      found.append((path, node))
  return found


def _matches(path: str, target: str) -> bool:
  return fnmatch.fnmatchcase(path, target)
