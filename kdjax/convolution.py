"""Convolutions whose kernel's gradient is cheap on a CPU too.

    y[b, i, j, d] = Σ_uvc x[b, s·i + u, s·j + v, c] · kernel[u, v, c, d]

x being padded, s the stride. Of the three products of a convolution, XLA's
kernel gradient is the slow one on a CPU: slower than a product of matrices
where the map is large, and for a depthwise convolution that of a dense one, C
times the products, of which it keeps one in C.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

Pairs = tuple[tuple[int, int], ...]

# Positions in one product of the kernel's gradient: their patches stay in the
# processor's cache.
_POSITIONS = 2048


def conv_general_dilated(
  x: Array,
  kernel: Array,
  strides: Sequence[int],
  padding: Any,
  **options: Any,
) -> Array:
  """`lax.conv_general_dilated` of NHWC and HWIO, with the gradient above.

  That is for a CPU alone, where it has no derivative in forward mode; for
  explicit padding, no dilation, and one group or as many as channels. A dense
  one is left to XLA where there are several devices: its gradient walks along
  the batch, which lies split over them.
  """
  groups = options.get("feature_group_count", 1)
  depthwise = kernel.shape[2] == 1 and groups == x.shape[-1] == kernel.shape[3]
  dense = groups == 1 and jax.device_count() == 1
  dilations = [options.get(f"{side}_dilation") or () for side in ("lhs", "rhs")]
  asked = isinstance(padding, str) or any(
    d != 1 for ds in dilations for d in ds
  )
  asked |= any(
    options.get(name) is not None
    for name in ("precision", "preferred_element_type")
  )
  if asked or not (depthwise or dense) or jax.default_backend() != "cpu":
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)
  pairs = tuple((int(a), int(b)) for a, b in padding)
  return _convolve(tuple(strides), pairs, groups, x, kernel)


def _forward(strides: Any, padding: Pairs, groups: int, x: Array, k: Array):
  return lax.conv_general_dilated(
    x,
    k,
    strides,
    padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _convolve(strides: Any, padding: Pairs, groups: int, x: Array, k: Array):
  return _forward(strides, padding, groups, x, k)


def _save(strides: Any, padding: Pairs, groups: int, x: Array, k: Array) -> Any:
  return _forward(strides, padding, groups, x, k), (x, k)


def _gradients(
  strides: Any, padding: Pairs, groups: int, saved: Any, slope: Array
) -> tuple[Array, Array]:
  x, kernel = saved
  of = functools.partial(_forward, strides, padding, groups)
  of_x = jax.vjp(lambda x: of(x, kernel), x)[1](slope)
  wide = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  size = kernel.shape[:2]
  if groups > 1:
    of_kernel = _of_depthwise(wide, slope, size, strides)
  elif kernel.shape[2] > kernel.shape[3] and strides == (1, 1):
    of_kernel = _of_dense_by_slope(x, slope, size, padding)
  else:
    of_kernel = _of_dense(wide, slope, size, strides)
  return of_x[0], of_kernel.astype(kernel.dtype)


def _shifted(x: Array, shape: tuple[int, ...], strides: Any, u: int, v: int):
  """x[b, s·i + u, s·j + v] for all i, j of the output."""
  height, width = shape
  return x[
    :,
    u : u + strides[0] * (height - 1) + 1 : strides[0],
    v : v + strides[1] * (width - 1) + 1 : strides[1],
  ]


def _of_depthwise(wide: Array, slope: Array, size: Any, strides: Any) -> Array:
  """Σ_bij x[b, s·i + u, s·j + v, c] · slope[b, i, j, c]."""

  def of_tap(u: int, v: int) -> Array:
    seen = _shifted(wide, slope.shape[1:3], strides, u, v)
    product = seen.astype(jnp.float32) * slope.astype(jnp.float32)
    return jnp.sum(product, axis=(0, 1, 2))

  rows = [
    jnp.stack([of_tap(u, v) for v in range(size[1])]) for u in range(size[0])
  ]
  return jnp.stack(rows)[:, :, None]


def _of_dense(wide: Array, slope: Array, size: Any, strides: Any) -> Array:
  """Σ_bij x[b, s·i + u, s·j + v, c] · slope[b, i, j, d]: slopeᵀ · patches."""

  def patches(x: Array) -> Array:
    taps = [(u, v) for u in range(size[0]) for v in range(size[1])]
    shape = slope.shape[1:3]
    return jnp.concatenate([_shifted(x, shape, strides, *t) for t in taps], -1)

  total = _in_parts(lambda x, g: _product(g, patches(x)), wide, slope)
  return total.T.reshape(*size, wide.shape[-1], slope.shape[-1])


def _of_dense_by_slope(x: Array, slope: Array, size: Any, padding: Pairs):
  """The same for s = 1, by patches of the slope, which has fewer channels.

  It is the kernel's gradient of the convolution that takes the slope, padded to
  the full size, to x: with taps in reverse, and outputs for inputs.
  """
  around = [
    (k - 1 - low, k - 1 - high, 0) for k, (low, high) in zip(size, padding)
  ]
  config = ((0, 0, 0), *around, (0, 0, 0))
  wide = lax.pad(slope, jnp.zeros((), slope.dtype), config)
  reverse = _of_dense(wide, x, size, (1, 1))
  return jnp.swapaxes(reverse[::-1, ::-1], 2, 3)


def _product(a: Array, b: Array) -> Array:
  """Σ over all axes but the last: aᵀ b."""
  a, b = (m.reshape(-1, m.shape[-1]) for m in (a, b))
  over_rows = (((0,), (0,)), ((), ()))
  return lax.dot_general(a, b, over_rows, preferred_element_type=jnp.float32)


def _in_parts(product: Any, a: Array, b: Array) -> Array:
  """Σ of `product` over parts of the batch of about `_POSITIONS` positions."""
  batch = a.shape[0]
  most = max(_POSITIONS // (a.shape[1] * a.shape[2]), 1)
  each = max(n for n in range(1, min(most, batch) + 1) if batch % n == 0)
  if each == batch:
    return product(a, b)
  a, b = (m.reshape(batch // each, each, *m.shape[1:]) for m in (a, b))
  start = jnp.zeros(jax.eval_shape(product, a[0], b[0]).shape, jnp.float32)
  total, _ = lax.scan(lambda t, ab: (t + product(*ab), None), start, (a, b))
  return total


_convolve.defvjp(_save, _gradients)
