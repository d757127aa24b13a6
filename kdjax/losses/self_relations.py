"""MiniLM's relations of a layer's queries, keys and values to themselves."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Integer

from kdjax.losses.groups import gram
from kdjax.losses.maps import both
from kdjax.losses.softmax import softmax_kl
from kdjax.losses.traits import tap_loss
from kdjax.types import UserError

# An activation [B, heads, S, d], or one of each kind.
Kinds = Float[Array, "b heads s d"] | tuple[Float[Array, "b heads s d"], ...]


@tap_loss(takes="sequences", reads=("segment_ids",))
def self_relations(
  student: Kinds,
  teacher: Kinds,
  segment_ids: Integer[Array, "b s"] | None = None,
  *,
  num_relation_heads: int,
  causal: bool = True,
) -> Float32[Array, "b s"]:
  """mean over kinds and relation heads of KL(R_t‖R_s), R = softmax(A Aᵀ / √d).

  A is one kind of the layer's vectors (its queries, keys or values): the heads
  are laid side by side and cut anew into relation heads of d channels each. So
  the networks may differ in width, in heads, and in heads that keys and values
  share; only the number of relation heads is common. Row t of R is a
  distribution over the tokens that token t is related to, itself among them:

  - those of its own document. The others are about something else, and which
    they are is chance.
  - where `causal`, none after it. A decoder does not see them at t; a relation
    to them would have it tell at t what they are.

  O(B · num_relation_heads · S²) memory for each kind and network.

  Args:
    student: one activation, or one of each kind.
    teacher: as many, in the same order.
    segment_ids: the number of each token's document, 0 = padding, which gets 0
      and moves nothing. None: every row is one document.
    num_relation_heads: divides heads · d of each activation. The paper has 12
      to 64, more than heads.
    causal: false for networks whose tokens see the whole document.

  Returns:
    One number a token, in nats.

  Raises:
    UserError: activations of other numbers of tokens or kinds, or that
      num_relation_heads does not divide.

  Source: Wang et al. 2020 (MiniLMv2), arXiv 2012.15828, section 3: the relation
    of each of queries, keys and values to itself. There the kinds are summed;
    here their mean is taken, so that a weight means the same for any number.
    The paper has encoders alone: what is said of decoders is not from it.
  """
  kinds = _paired(student, teacher)
  b, _, s, _ = kinds[0][0].shape
  seen, exists = _related(segment_ids, (b, s), causal)
  total = jnp.zeros((b, num_relation_heads, s))
  for pair in kinds:
    ours, theirs = (
      _relations(x, num_relation_heads, seen, exists) for x in both(*pair)
    )
    total += softmax_kl(theirs, ours, 1.0, seen)
  return jnp.where(exists, jnp.mean(total, axis=1) / len(kinds), 0.0)


def _paired(student: Any, teacher: Any) -> list[tuple[Array, Array]]:
  ours, theirs = (
    x if isinstance(x, (tuple, list)) else (x,) for x in (student, teacher)
  )
  if not ours or len(ours) != len(theirs):
    raise UserError(
      f"got {len(ours)} activations of the student and {len(theirs)} of the "
      "teacher: give as many on both sides, at least one"
    )
  tokens = ours[0].shape[0], *ours[0].shape[2:3]
  for x in (*ours, *theirs):
    if x.ndim != 4 or (x.shape[0], x.shape[2]) != tokens:
      raise UserError(
        f"got activations of shapes {ours[0].shape} and {x.shape}, needs "
        "[B, heads, S, d] of equal B and S: choose queries, keys and values"
      )
  return list(zip(ours, theirs))


def _related(
  segment_ids: Array | None, shape: tuple[int, int], causal: bool
) -> tuple[Bool[Array, "b 1 s s"], Bool[Array, "b s"]]:
  """Which tokens each is related to, and which exist."""
  exists = jnp.ones(shape, bool)
  seen = jnp.ones((shape[1], shape[1]), bool)
  if causal:
    seen = jnp.tril(seen)
  seen = jnp.broadcast_to(seen, (shape[0], 1, *seen.shape))
  if segment_ids is not None:
    exists = segment_ids > 0
    # Padding is related to padding: no token at all would be NaN.
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    seen &= same[:, None]
  return seen, exists


def _relations(
  x: Float32[Array, "b heads s d"],
  num_relation_heads: int,
  seen: Bool[Array, "b 1 s s"],
  exists: Bool[Array, "b s"],
) -> Float32[Array, "b relation_heads s s"]:
  b, heads, s, d = x.shape
  if num_relation_heads < 1 or heads * d % num_relation_heads:
    raise UserError(
      f"got num_relation_heads={num_relation_heads} for {heads} heads of {d} "
      f"channels, needs a divisor of {heads * d}: choose one that divides the "
      "student's and the teacher's"
    )
  # 0 before: a NaN in padding would come back through the gradient.
  x = jnp.where(exists[:, None, :, None], x, 0.0)
  x = jnp.moveaxis(x, 1, 2).reshape(b, s, num_relation_heads, -1)
  x = jnp.moveaxis(x, 2, 1)
  return gram(x) / math.sqrt(x.shape[-1])
