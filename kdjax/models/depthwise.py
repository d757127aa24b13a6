"""A depthwise convolution whose kernel's gradient is cheap on a CPU too.

    y[b, i, j, c] = Σ_uv x[b, s·i + u, s·j + v, c] · kernel[u, v, 0, c]

x being padded, s the stride. XLA makes of the kernel's gradient on a CPU that
of a dense convolution, C times the products, and keeps one in C.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

Pairs = tuple[tuple[int, int], ...]


def conv_general_dilated(
  x: Array,
  kernel: Array,
  strides: Sequence[int],
  padding: Any,
  **options: Any,
) -> Array:
  """`lax.conv_general_dilated`, for nnx.Conv; depthwise ones as above.

  Only on a CPU, where it has no derivative in forward mode, and only with
  explicit padding and no dilation.
  """
  groups = options.get("feature_group_count", 1)
  depthwise = kernel.shape[2] == 1 and groups == x.shape[-1] == kernel.shape[3]
  dilations = [options.get(f"{side}_dilation") or () for side in ("lhs", "rhs")]
  asked = isinstance(padding, str) or any(
    d != 1 for ds in dilations for d in ds
  )
  asked |= any(
    options.get(name) is not None
    for name in ("precision", "preferred_element_type")
  )
  if asked or not depthwise or jax.default_backend() != "cpu":
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)
  pairs = tuple((int(a), int(b)) for a, b in padding)
  return _depthwise(tuple(strides), pairs, x, kernel)


def _forward(strides: Any, padding: Pairs, x: Array, kernel: Array) -> Array:
  return lax.conv_general_dilated(
    x,
    kernel,
    strides,
    padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=x.shape[-1],
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _depthwise(strides: Any, padding: Pairs, x: Array, kernel: Array) -> Array:
  return _forward(strides, padding, x, kernel)


def _save(strides: Any, padding: Pairs, x: Array, kernel: Array) -> Any:
  return _forward(strides, padding, x, kernel), (x, kernel)


def _gradients(
  strides: Any, padding: Pairs, saved: Any, slope: Array
) -> tuple[Array, Array]:
  x, kernel = saved
  of_x = jax.vjp(lambda x: _forward(strides, padding, x, kernel), x)[1](slope)
  wide = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  height, width = slope.shape[1:3]

  def of_tap(u: int, v: int) -> Array:
    """Σ_bij x[b, s·i + u, s·j + v] · slope[b, i, j], a number a channel."""
    seen = wide[
      :,
      u : u + strides[0] * (height - 1) + 1 : strides[0],
      v : v + strides[1] * (width - 1) + 1 : strides[1],
    ]
    product = seen.astype(jnp.float32) * slope.astype(jnp.float32)
    return jnp.sum(product, axis=(0, 1, 2))

  rows = [
    jnp.stack([of_tap(u, v) for v in range(kernel.shape[1])])
    for u in range(kernel.shape[0])
  ]
  return of_x[0], jnp.stack(rows)[:, :, None].astype(kernel.dtype)


_depthwise.defvjp(_save, _gradients)
