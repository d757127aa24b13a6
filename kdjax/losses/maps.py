"""What the losses on activations share: float32, norms, pooling.

An activation is a map `[B, H, W, C]`, tokens `[B, S, D]` or a vector `[B, D]`;
its last axis holds the channels.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Float32

from kdjax.types import UserError


def both(student: ArrayLike, teacher: ArrayLike) -> tuple[Array, Array]:
  """Both in float32, the teacher's without gradient."""
  student = jnp.asarray(student, jnp.float32)
  return student, jax.lax.stop_gradient(jnp.asarray(teacher, jnp.float32))


def same_shape(student: ArrayLike, teacher: ArrayLike) -> tuple[Array, Array]:
  """`both`, of one shape.

  Raises:
    UserError: if the shapes differ; broadcasting would hide the mistake.
  """
  if jnp.shape(student) != jnp.shape(teacher):
    raise UserError(
      f"student activation has shape {jnp.shape(student)}, the teacher's "
      f"{jnp.shape(teacher)}: give the term a projector, or choose other taps"
    )
  return both(student, teacher)


def example_mean(values: Array) -> Float32[Array, " b"]:
  """The mean over all axes but the first."""
  return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def magnitude(x: Array) -> Array:
  """|x|, with slope 0 at 0 as in PyTorch; that of `jnp.abs` is 1."""
  return x * jnp.sign(x)


def l2_normalize(
  x: Array, axis: int | tuple[int, ...] = -1, epsilon: float = 1e-12
) -> Array:
  """x / max(‖x‖₂, epsilon); 0, with a gradient of 0, where ‖x‖ <= epsilon."""
  squares = jnp.sum(x * x, axis=axis, keepdims=True)
  # Twice `where`: the root has no slope at 0, and inf · 0 would be NaN.
  alive = squares > epsilon**2
  norm = jnp.sqrt(jnp.where(alive, squares, 1.0))
  return jnp.where(alive, x / norm, 0.0)


def spatial_size(x: Array) -> tuple[int, int]:
  """(H, W) of a map.

  Raises:
    UserError: if it is no map.
  """
  if x.ndim != 4:
    raise UserError(
      f"got an activation of shape {x.shape}, needs a map [B, H, W, C]: choose "
      "the tap of a convolutional stage"
    )
  return x.shape[1], x.shape[2]


def adaptive_pool(
  x: Float[Array, "b h w c"], size: tuple[int, int]
) -> Float[Array, "b h2 w2 c"]:
  """Average over bins [floor(i·h/h2), ceil((i+1)·h/h2)), as PyTorch's.

  Raises:
    UserError: if the map is smaller than `size` along an axis.
  """
  ours = spatial_size(x)
  if ours == size:
    return x
  if ours[0] < size[0] or ours[1] < size[1]:
    raise UserError(
      f"got a map of {ours[0]} x {ours[1]}, needs at least {size[0]} x "
      f"{size[1]} to be pooled to that: choose an earlier tap of this network"
    )
  if ours[0] % size[0] == 0 and ours[1] % size[1] == 0:
    b, h, w, c = x.shape
    split = x.reshape(b, size[0], h // size[0], size[1], w // size[1], c)
    return jnp.mean(split, axis=(2, 4))
  rows, columns = (_bins(a, b) for a, b in zip(ours, size))
  return jnp.einsum(
    "ih,jw,bhwc->bijc", rows, columns, x, precision=jax.lax.Precision.HIGHEST
  ).astype(x.dtype)


def to_smaller(student: Array, teacher: Array) -> tuple[Array, Array]:
  """Two maps, the larger one pooled to the size of the smaller."""
  size = smaller_size(student, teacher)
  return adaptive_pool(student, size), adaptive_pool(teacher, size)


def smaller_size(x: Array, y: Array) -> tuple[int, int]:
  """(H, W) that both maps can be pooled to."""
  (height, width), (height2, width2) = spatial_size(x), spatial_size(y)
  return min(height, height2), min(width, width2)


def same_positions(x: Array, y: Array) -> tuple[Array, Array]:
  """Both, the larger map pooled to the smaller; their channels may differ.

  Raises:
    UserError: if they are vectors, differ in kind or number of examples, or are
      tokens of different lengths.
  """
  alike = x.ndim == y.ndim and x.shape[0] == y.shape[0]
  if alike and x.ndim > 2 and x.shape[1:-1] == y.shape[1:-1]:
    return x, y
  if alike and x.ndim == 4:
    return to_smaller(x, y)
  raise UserError(
    f"got activations of shapes {x.shape} and {y.shape}, needs two maps "
    "[B, H, W, C], or tokens [B, S, D] of equal length: choose other taps"
  )


def per_channel(values: ArrayLike, like: Array, what: str) -> Array:
  """`[C]` in float32, with as many axes as the activation that it meets.

  Raises:
    UserError: if it has not one value a channel.
  """
  if jnp.shape(values) != like.shape[-1:]:
    raise UserError(
      f"{what} has shape {jnp.shape(values)}, needs {like.shape[-1:]}: give "
      "one value a channel of the teacher's activation"
    )
  shape = (1,) * (like.ndim - 1) + like.shape[-1:]
  return jnp.asarray(values, jnp.float32).reshape(shape)


@functools.cache
def _bins(length: int, count: int) -> np.ndarray:
  """[count, length]: the weights that average each bin."""
  weights = np.zeros((count, length), np.float32)
  for i in range(count):
    first, last = i * length // count, math.ceil((i + 1) * length / count)
    weights[i, first:last] = 1 / (last - first)
  return weights
