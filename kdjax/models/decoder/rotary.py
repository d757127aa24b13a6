"""Rotary positions: the angles of one layer's heads, and their scaled variants.

Pair n of a head of d channels turns by position · θ^(-2n/d); channel n is
paired with n + d/2, as in the hub's checkpoints, not with its neighbour.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kdjax.errors import UserError, unknown


class Rotation(NamedTuple):
  """How a layer turns its queries and keys.

  Attributes:
    frequencies: radians per position of the d/2 pairs; zeros turn nothing.
    scale: factor on both the queries and the keys (YaRN's).
  """

  frequencies: tuple[float, ...]
  scale: float = 1.0


def none(head_dim: int) -> Rotation:
  return Rotation((0.0,) * (head_dim // 2))


def tables(
  rotations: tuple[Rotation, ...], positions: Int[Array, "b s"]
) -> tuple[Float[Array, "r b s d"], Float[Array, "r b s d"]]:
  """Cosines and sines of every pair's angle, float32."""
  frequencies = jnp.array([r.frequencies for r in rotations], jnp.float32)
  scales = jnp.array([r.scale for r in rotations], jnp.float32)
  angles = positions[None, :, :, None] * frequencies[:, None, None, :]
  scales = scales[:, None, None, None]
  return scales * jnp.cos(angles), scales * jnp.sin(angles)


def rotate(
  x: Float[Array, "b s h d"],
  cos: Float[Array, "b s half"],
  sin: Float[Array, "b s half"],
) -> Float[Array, "b s h d"]:
  """Turns the pairs; in float32, where an angle's cosine keeps its digits."""
  cos, sin = cos[:, :, None, :], sin[:, :, None, :]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return turned.astype(x.dtype)


def rotation(
  parameters: Mapping[str, Any], head_dim: int, context: int
) -> Rotation:
  """The rotation that `rope_parameters` of a config.json describes.

  Args:
    parameters: `rope_theta`, `rope_type` and what that type reads.
    head_dim: d, even.
    context: the config's `max_position_embeddings`.

  Raises:
    UserError: an unknown type, or keys that are missing or unused.

  Sources: linear, Chen et al. 2023, arXiv 2306.15595; yarn, Peng et al. 2023,
    arXiv 2309.00071, section 3; llama3, the text of Llama 3.1, and where they
    differ transformers 5, which is what checkpoints are run with.
  """
  given = {k: v for k, v in parameters.items() if v is not None}
  kind = given.pop("rope_type", given.pop("type", "default"))
  given.pop("type", None)
  if kind not in _KINDS:
    raise unknown("rope_type", str(kind), _KINDS)
  required, optional = _KINDS[kind]
  missing = [k for k in required if k not in given]
  surplus = sorted(set(given) - {*required, *optional, "rope_theta"})
  if given.get("partial_rotary_factor") == 1.0:
    surplus.remove("partial_rotary_factor")
  if missing or surplus:
    raise UserError(
      f"rope of type {kind} got {', '.join(surplus) or 'nothing'} that it does "
      f"not read and lacks {', '.join(missing) or 'nothing'}: mend "
      "rope_parameters in config.json"
    )
  # float32 throughout, as the checkpoints were trained: at position 10^5 the
  # last digit of a frequency is a hundredth of a radian.
  exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
  periods = np.float32(given["rope_theta"]) ** exponents  # over 2π
  plain, scale = (1 / periods).astype(np.float32), 1.0
  if kind == "linear":
    plain = plain / np.float32(given["factor"])
  elif kind == "llama3":
    plain = _llama3(plain, given, context)
  elif kind == "yarn":
    plain, scale = _yarn(plain, given, context)
  return Rotation(tuple(float(f) for f in plain), scale)


# type: (keys it needs, keys it may have). "dynamic" is the default one up to
# the context, and beyond it sequences are refused.
_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
  "default": ((), ()),
  "linear": (("factor",), ()),
  "dynamic": (("factor",), ("original_max_position_embeddings",)),
  "llama3": (
    ("factor", "low_freq_factor", "high_freq_factor"),
    ("original_max_position_embeddings",),
  ),
  "yarn": (
    (),
    (
      "factor",
      "original_max_position_embeddings",
      "attention_factor",
      "beta_fast",
      "beta_slow",
      "mscale",
      "mscale_all_dim",
      "truncate",
    ),
  ),
}


def trained_context(parameters: Mapping[str, Any], context: int) -> int:
  """The number of positions before the rotation was stretched."""
  return parameters.get("original_max_position_embeddings") or context


def _llama3(
  plain: np.ndarray, given: Mapping[str, Any], context: int
) -> np.ndarray:
  """Slow pairs are stretched, fast ones kept, those between interpolated."""
  turns = trained_context(given, context) * plain / (2 * math.pi)
  low, high = given["low_freq_factor"], given["high_freq_factor"]
  kept = np.clip((turns - low) / (high - low), 0, 1)
  return ((1 - kept) * plain / given["factor"] + kept * plain).astype(
    np.float32
  )


def _yarn(
  plain: np.ndarray, given: Mapping[str, Any], context: int
) -> tuple[np.ndarray, float]:
  """A ramp over the pairs' numbers, and a factor on queries and keys."""
  trained = trained_context(given, context)
  factor = given.get("factor") or context / trained
  dim, theta = 2 * len(plain), given["rope_theta"]

  def pair(turns: float) -> float:
    """The number of the pair that turns so often in the trained context."""
    return dim * math.log(trained / (turns * 2 * math.pi)) / 2 / math.log(theta)

  first = pair(given.get("beta_fast") or 32)
  last = pair(given.get("beta_slow") or 1)
  if given.get("truncate", True):
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, dim - 1)
  width = last - first if last != first else 0.001
  stretched = np.clip((np.arange(dim // 2) - first) / width, 0, 1)
  frequencies = plain * (stretched / factor + 1 - stretched)
  return frequencies.astype(np.float32), _yarn_scale(given, factor)


def _yarn_scale(given: Mapping[str, Any], factor: float) -> float:
  if given.get("attention_factor") is not None:
    return float(given["attention_factor"])

  def grown(by: float) -> float:
    return 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0

  one, all_dim = given.get("mscale"), given.get("mscale_all_dim")
  return grown(one) / grown(all_dim) if one and all_dim else grown(1.0)
