"""Sums over the tokens of a head too large to multiply out.

    Σ over tokens  f(logits of the student, of the teacher, the token's row)

The tokens are taken a chunk at a time: two products give the chunk's logits,
f's gradient with respect to the student's is taken at once, and two products
more add it to those of hidden states and kernel. So no `[tokens, V]` array ever
is, each product is made once, and nothing is kept for the backward pass but the
gradients themselves. Tokens that are masked come last, and are not reached.

f is any function of rows of logits. Under a mesh each device goes through its
own tokens, and the classes may be split as well: f is then partitioned by the
compiler, which reduces over the classes by a few numbers a token.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PyTree

from kdjax import pins
from kdjax.losses.chunks import num_chunks as num_chunks
from kdjax.losses.chunks import through
from kdjax.losses.layout import Layout as Layout
from kdjax.losses.layout import added, class_parts, fewer, gathered, narrow
from kdjax.losses.layout import over as over
from kdjax.types import LinearLogits, UserError

# (student [n, V], teacher [n, V] | None, rows, constants) -> ({group: scalar},
# further sums), each the sum of what its rows give.
RowSums = Callable[..., tuple[dict[str, Array], PyTree]]


def sum_rows(
  f: RowSums,
  student: LinearLogits,
  teacher: LinearLogits | Float[Array, "*batch V"] | None,
  rows: dict[str, Array],
  constants: PyTree,
  layout: Layout | None = None,
) -> tuple[dict[str, Array], PyTree]:
  """f over all tokens, which receives and returns as `RowSums` says.

  Only the first of its two results has a gradient, and only with respect to
  the student's hidden states, kernel and bias. It is formed in the forward pass
  for the sum of the groups; a backward pass that weighs the groups apart makes
  it anew.

  Args:
    f: 0, with gradient 0, for a row whose `mask` is 0.
    student, teacher: their classes beyond the smaller true vocabulary are at
      -inf on both sides.
    rows: arrays `[*batch, ...]`, `mask` `[*batch]` among them.
    constants: further arguments of f, without gradient.
    layout: of the computation; by default on one device.

  Raises:
    UserError: for a mask of another shape than the hidden states'.
  """
  _check(student, teacher, rows)
  layout = fewer(layout or Layout(), student, teacher)
  student, teacher = _same_classes(layout, student, teacher)
  run = functools.partial(_spread, f, layout)

  @jax.custom_vjp
  def sums(*arguments):
    return run(None, *arguments)[0]

  def forward(*arguments):
    result, gradient = run({}, *arguments)
    return result, (gradient, arguments)

  def backward(saved, cotangents):
    gradient, arguments = saved
    student, by_group = arguments[0], cotangents[0]
    one, *others = by_group.values()
    cast = lambda g, x: g.astype(x.dtype)  # noqa: E731
    # Where these are constants, as for a gradient of the sum, the compiler
    # keeps one branch.
    gradient = jax.lax.cond(
      functools.reduce(jnp.logical_and, [one == x for x in others], True),
      lambda: jax.tree.map(lambda g, x: cast(one * g, x), gradient, student),
      lambda: jax.tree.map(cast, run(by_group, *arguments)[1], student),
    )
    return gradient, None, None, None

  sums.defvjp(forward, backward)
  return sums(student, teacher, rows, constants)


def _check(student, teacher, rows):
  if rows["mask"].shape != student.shape[:-1]:
    raise UserError(
      f"mask has shape {rows['mask'].shape}, the student's hidden states "
      f"{student.hidden.shape}: give one mask value a hidden state"
    )
  if teacher is not None and teacher.shape[:-1] != student.shape[:-1]:
    raise UserError(
      f"student logits have shape {student.shape}, the teacher's "
      f"{teacher.shape}: give both the same tokens"
    )


def _same_classes(layout, student, teacher):
  """Both with the smaller vocabulary, and classes that their devices divide."""
  num_classes, parts = student.vocabulary, class_parts(layout)
  student = _resized(student, -(-student.shape[-1] // parts) * parts)
  if isinstance(teacher, LinearLogits):
    num_classes = min(num_classes, teacher.vocabulary)
    teacher = dataclasses.replace(teacher, num_classes=num_classes)
    if layout.classes:
      # Once, beside the student's: in the loop it would move logits.
      teacher = _resized(teacher, student.shape[-1])
  elif teacher is not None:
    num_classes = min(num_classes, teacher.shape[-1])
  return dataclasses.replace(student, num_classes=num_classes), teacher


def _resized(logits: LinearLogits, size: int) -> LinearLogits:
  """The same, its kernel with `size` rows."""

  def resized(x: Array | None) -> Array | None:
    if x is None or x.shape[0] == size:
      return x
    pad = [(0, max(size - x.shape[0], 0))] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x[:size], pad)

  return dataclasses.replace(
    logits, kernel=resized(logits.kernel), bias=resized(logits.bias)
  )


def _spread(f, layout, weights, student, teacher, rows, constants):
  """`through` over the mesh: each device its own tokens."""
  run = functools.partial(through, f, layout)
  if not layout.mesh or not layout.tokens:
    with pins.inside(layout.mesh):
      return run(weights, student, teacher, rows, constants)
  split, whole = PartitionSpec(layout.tokens), PartitionSpec()

  def total(weights, student, teacher, rows, constants):
    ours, theirs = gathered(layout, student), gathered(layout, teacher)
    sums, gradient = run(weights, ours, theirs, rows, constants)
    if gradient is None:
      return jax.lax.psum(sums, layout.tokens), None
    sums, bias = jax.lax.psum((sums, gradient.bias), layout.tokens)
    kernel = added(layout, gradient.kernel, student.kernel.shape)
    return sums, dataclasses.replace(gradient, kernel=kernel, bias=bias)

  def specs(logits):
    if not isinstance(logits, LinearLogits):
      return split
    bias = None if logits.bias is None else whole
    columns = layout.width if narrow(layout, logits) else None
    kernel = PartitionSpec(None, columns)
    return dataclasses.replace(logits, hidden=split, kernel=kernel, bias=bias)

  # By hand over the tokens alone: the classes are left to the compiler, which
  # partitions whatever f does with them.
  return jax.shard_map(
    total,
    mesh=layout.mesh,
    axis_names=set(layout.tokens),
    in_specs=(whole, specs(student), specs(teacher), split, whole),
    out_specs=(whole, None if weights is None else specs(student)),
    check_vma=False,
  )(weights, student, teacher, rows, constants)
