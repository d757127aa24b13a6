"""What the losses between examples share: groups of rows, and products."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float32

from kdjax.types import UserError

# GPUs and TPUs multiply in fewer bits by default, and what counts here is the
# small difference of two products.
HIGHEST = jax.lax.Precision.HIGHEST


def in_groups(
  of_group: Callable[[Array, Array, Array], Array],
  student: Array,
  teacher: Array,
  where: Array | None,
  group_size: int | None,
) -> Float32[Array, " b"]:
  """`of_group(student [G, D], teacher [G, D'], exists [G]) -> [G]` for each.

  Rows that do not exist are 0 before, as a NaN there would come back in the
  gradient, and after.

  Raises:
    UserError: batches that differ, or that `group_size` does not divide.
  """
  b = len(student)
  if len(teacher) != b:
    raise UserError(
      f"student activation has {b} examples, the teacher's {len(teacher)}: "
      "choose taps whose first axis is the batch"
    )
  size = b if group_size is None else group_size
  if size < 1 or b % size:
    raise UserError(
      f"got group_size={size} for {b} examples, needs a divisor: choose one, "
      "such as the batch of one device"
    )
  exists = jnp.ones(b, bool) if where is None else jnp.asarray(where, bool)
  s, t = (
    jnp.where(exists[:, None], x.reshape(b, -1), 0.0)
    for x in (student, teacher)
  )
  if size < b:
    split = [x.reshape(b // size, size, *x.shape[1:]) for x in (s, t, exists)]
    values = jax.vmap(of_group)(*split).reshape(b)
  else:
    values = of_group(s, t, exists)
  return jnp.where(exists, values, 0.0)


def same_size(student: ArrayLike, teacher: ArrayLike) -> None:
  """Refuses rows that cannot be compared number by number."""
  ours, theirs = jnp.shape(student), jnp.shape(teacher)
  if ours[1:] != theirs[1:]:
    raise UserError(
      f"student activation has shape {ours}, the teacher's {theirs}: give the "
      "term a projector, or choose other taps"
    )


def count(exists: Array) -> Array:
  """n, or 1 where there is none."""
  return jnp.maximum(jnp.sum(exists), 1)


def gram(x: Array) -> Array:
  """X Xᵀ over the last two axes."""
  return jnp.matmul(x, jnp.swapaxes(x, -1, -2), precision=HIGHEST)
