"""How a head lies on a mesh, and what of it travels.

The tokens and the classes are split; a kernel may lie split along its width
too, and is then gathered once, as its gradient is scattered once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from kdjax.pins import batch_axes
from kdjax.types import LinearLogits


class Layout(NamedTuple):
  """How the tokens of a head are gone through.

  Attributes:
    chunk: tokens at a time, on each device; None: 256 on CPU, otherwise 1024.
      Memory is that of some [chunk, V] arrays.
    mesh: what tokens and classes are split over, or None.
    tokens: the axes of the mesh that split the leading axis of the batch.
    classes: the axis that splits the classes, or None; where it does not divide
      a head's, it splits nothing.
    width: the axis, one of `tokens`, over which kernels lie split along D, or
      None. They are gathered once, and so is a gradient scattered.
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


def split_classes(layout: Layout, x: Array, axis: int = 0) -> Array:
  """x with the classes, along `axis`, on their devices."""
  if layout.classes is None:
    return x
  spec = PartitionSpec(*[None] * axis, layout.classes)
  return jax.lax.with_sharding_constraint(x, spec)


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
  layout: Layout, f: Callable[[Array], Array]
) -> Callable[[Array], Array]:
  """f of a kernel, each device its own classes.

  The compiler would bring them together for a collective over another axis.
  """
  if layout.classes is None:
    return f
  rows = PartitionSpec(layout.classes)
  return jax.shard_map(
    f,
    axis_names={layout.classes},
    in_specs=rows,
    out_specs=rows,
    check_vma=False,
  )
