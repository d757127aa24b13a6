"""MiniLM's relations, by the numbers of the layers."""

from collections.abc import Sequence

from kdjax import errors, losses
from kdjax.objective import Names, Term
from kdjax.types import ScalarOrSchedule

KINDS = ("queries", "keys", "values")


def self_relations(
  name: str,
  taps: tuple[Names, Names],
  *,
  weight: ScalarOrSchedule,
  num_relation_heads: int,
  kinds: Sequence[str] = KINDS,
  causal: bool = True,
) -> Term:
  """`losses.self_relations` of the queries, keys and values of two layers.

      self_relations("minilm", ("block_6", "block_21"), weight=1.0,
                     num_relation_heads=32)

  The paper takes one layer of each network: the student's last, and of a large
  teacher one some way before its last (21 of 24), of a base one the last. The
  networks may differ in width and heads, and no projector is needed.

  Args:
    name: of the term.
    taps: of each network the layer, as the tap that it gives: `block_n` stands
      for `queries_n`, `keys_n` and `values_n`.
    weight: of the term.
    num_relation_heads: divides heads · d of each of them, keys and values that
      heads share included.
    kinds: which of the three.
    causal: whether tokens see only those before them, as in a decoder.

  Raises:
    UserError: for another tap than a block, or an unknown kind.
  """
  for kind in kinds:
    if kind not in KINDS:
      raise errors.unknown(f"kind of term {name!r}", kind, KINDS)
  ours, theirs = (_of_block(name, tap, kinds) for tap in taps)
  return Term(
    name,
    losses.self_relations,
    weight,
    hparams={"num_relation_heads": num_relation_heads, "causal": causal},
    taps=(ours, theirs),
  )


def _of_block(name: str, tap: Names, kinds: Sequence[str]) -> tuple[str, ...]:
  block, _, number = str(tap).rpartition("_")
  if not isinstance(tap, str) or block != "block" or not number.isdigit():
    raise errors.UserError(
      f"term {name!r} relates the queries, keys and values of a layer and got "
      f"the tap {tap!r}: name the layer, such as 'block_6'"
    )
  return tuple(f"{kind}_{number}" for kind in kinds)
