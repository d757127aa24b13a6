"""How a head lies on a mesh, and what of it travels.

The tokens and the classes are split; a kernel may lie split along its width
too. Either it is then gathered once, as its gradient is scattered once, or the
hidden states of the tokens are, and each device keeps some of the classes: what
is fewer, classes or tokens, travels (`fewer`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from kdjax.pins import BATCH_AXES, batch_axes
from kdjax.types import LinearLogits


class Layout(NamedTuple):
  """How the tokens of a head are gone through.

  Attributes:
    chunk: tokens at a time, on each device; None: 256 on CPU, otherwise 1024.
      Memory is that of some [chunk, V] arrays, shared by those that split V.
    mesh: what tokens and classes are split over, or None.
    tokens: the axes of the mesh that split the leading axis of the batch.
    classes: the axis that splits the classes, padded to a multiple, or None.
    width: the axis, one of `tokens`, over which kernels lie split along D, or
      None. They are gathered once, and so is a gradient scattered.

  Where `classes` is itself an axis that splits a batch, the tokens along it are
  brought together: see `fewer`.
  """

  chunk: int | None = None
  mesh: Mesh | None = None
  tokens: tuple[str, ...] = ("data",)
  classes: str | None = None
  width: str | None = None


def over(mesh: Mesh) -> Layout:
  """The layout for a mesh of `parallel.make_mesh`."""
  if mesh.size == 1:
    return Layout()
  several = {axis for axis in mesh.axis_names if mesh.shape[axis] > 1}
  return Layout(
    mesh=mesh,
    tokens=batch_axes(mesh),
    classes="model" if "model" in several else None,
    width="fsdp" if "fsdp" in several else None,
  )


def chunk_of(layout: Layout) -> int:
  """Tokens at a time."""
  return layout.chunk or (256 if jax.default_backend() == "cpu" else 1024)


def class_parts(layout: Layout) -> int:
  """How many devices share the classes."""
  blocks = layout.mesh.shape if layout.mesh else {}
  return blocks[layout.classes] if layout.classes else 1


def fewer(layout: Layout, student: LinearLogits, teacher: Any) -> Layout:
  """The layout in which less is sent and held: of kernels, or hidden states.

  n devices along `width` hold t tokens and V classes. Kernels gathered for the
  tokens are V rows on each; hidden states gathered for the classes are t rows,
  and a device works on V / n classes of n times the tokens, so that the chunks
  are as large as before. Teacher logits that are an array stay where they are.
  """
  if not layout.mesh or layout.classes or not narrow(layout, student):
    return layout
  assert layout.width is not None
  sizes = layout.mesh.shape
  rest = tuple(a for a in layout.tokens if a != layout.width and sizes[a] > 1)
  tokens = math.prod(student.shape[:-1]) // math.prod(sizes[a] for a in rest)
  linear = teacher is None or isinstance(teacher, LinearLogits)
  if not linear or tokens >= student.shape[-1]:
    return layout
  return layout._replace(
    chunk=chunk_of(layout) * sizes[layout.width],
    tokens=rest,
    classes=layout.width,
    width=None,
  )


def together(layout: Layout, tree: Any) -> Any:
  """Rows of tokens, on every device along an axis that splits the classes."""
  if layout.classes is None:
    return tree
  constrain = jax.lax.with_sharding_constraint
  return jax.tree.map(lambda x: constrain(x, PartitionSpec()), tree)


def apart(layout: Layout, shares: Array) -> Array:
  """[devices along classes, tokens, D] summed, tokens where they came from."""
  if layout.classes not in BATCH_AXES:
    return shares.sum(0)
  scatter = functools.partial(
    jax.lax.psum_scatter, axis_name=layout.classes, tiled=True
  )
  return by_classes(layout, lambda x: scatter(x[0]))(shares)


def by_rows(layout: Layout, kernel: Array) -> Array:
  """A kernel, which lies along its width, with the classes on their devices."""
  if layout.classes not in BATCH_AXES or kernel.shape[1] % class_parts(layout):
    return split_classes(layout, kernel)
  return _exchanged(layout, kernel, of=1, to=0)


def turned(layout: Layout, gradient: Array) -> Array:
  """A kernel's gradient, split along its width again, as the kernel lies."""
  if layout.classes not in BATCH_AXES:
    return gradient
  return _exchanged(layout, gradient, of=0, to=1)


def _exchanged(layout: Layout, kernel: Array, *, of: int, to: int) -> Array:
  """Split along `to` and not, as before, `of`.

  By hand: some compilers would make the whole of it on the way.
  """
  exchange = functools.partial(
    jax.lax.all_to_all,
    axis_name=layout.classes,
    split_axis=to,
    concat_axis=of,
    tiled=True,
  )
  return by_classes(layout, exchange, of, to)(kernel)


def _along(layout: Layout, axis: int) -> PartitionSpec:
  """Of an array whose `axis` lies along that of the classes."""
  return PartitionSpec(*[None] * axis, layout.classes)


def split_classes(layout: Layout, x: Array, axis: int = 0) -> Array:
  """x with the classes, along `axis`, on their devices."""
  if layout.classes is None:
    return x
  return jax.lax.with_sharding_constraint(x, _along(layout, axis))


def narrow(layout: Layout, logits: LinearLogits) -> bool:
  """Whether each device holds some columns of the kernel."""
  assert layout.mesh is not None
  width = layout.width and layout.mesh.shape[layout.width]
  return bool(width) and logits.hidden.shape[-1] % width == 0


def gathered(layout: Layout, logits: Any) -> Any:
  """With its whole kernel, sent in the dtype that it is multiplied in."""
  if not isinstance(logits, LinearLogits) or not narrow(layout, logits):
    return logits
  gather = by_classes(
    layout,
    functools.partial(
      jax.lax.all_gather, axis_name=layout.width, axis=1, tiled=True
    ),
  )
  kernel = gather(logits.kernel.astype(logits.hidden.dtype))
  return dataclasses.replace(logits, kernel=kernel)


def added(layout: Layout, gradient: Array, shape: tuple[int, ...]) -> Array:
  """The sum over the devices, each the columns that it holds."""
  if gradient.shape == shape:
    return jax.lax.psum(gradient, layout.tokens)
  rest = tuple(axis for axis in layout.tokens if axis != layout.width)

  def add(gradient: Array) -> Array:
    gradient = jax.lax.psum_scatter(
      gradient, layout.width, scatter_dimension=1, tiled=True
    )
    return jax.lax.psum(gradient, rest) if rest else gradient

  return by_classes(layout, add)(gradient)


def by_classes(
  layout: Layout, f: Callable[[Array], Array], of: int = 0, to: int = 0
) -> Callable[[Array], Array]:
  """f of an array, each device its own part: along `of` before, `to` after.

  The compiler would bring them together for a collective over another axis.
  """
  if layout.classes is None:
    return f
  return jax.shard_map(
    f,
    axis_names={layout.classes},
    in_specs=_along(layout, of),
    out_specs=_along(layout, to),
    check_vma=False,
  )
