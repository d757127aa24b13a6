"""What config.json says of each layer: its window and its rotation."""

from collections.abc import Mapping
from typing import Any

from kdjax.errors import UserError
from kdjax.models.decoder import rotary
from kdjax.models.decoder.fields import THETA
from kdjax.models.decoder.rotary import Rotation


def kinds(family: str, told: Mapping[str, Any]) -> list[str]:
  """ "full_attention" or "sliding_attention", for each layer."""
  depth, window = told["num_hidden_layers"], told.get("sliding_window")
  if not told.get("use_sliding_window", True):
    window = None
  given = told.get("layer_types")
  if given is not None:
    wrong = sorted(set(given) - {"full_attention", "sliding_attention"})
    if wrong or len(given) != depth:
      raise UserError(
        f"layer_types has {len(given)} entries ({', '.join(wrong) or 'known'}),"
        f" needs full_attention or sliding_attention for each of {depth} "
        "layers: mend config.json"
      )
    sliding = [kind == "sliding_attention" for kind in given]
  elif family == "mistral":
    sliding = [True] * depth
  elif family in ("qwen2", "qwen3"):
    sliding = [n >= told["max_window_layers"] for n in range(depth)]
  elif family == "smollm3":
    sliding = [not turns for turns in _turning(told)]
  elif family.startswith("gemma"):
    every = told.get("sliding_window_pattern", 2)
    sliding = [(n + 1) % every != 0 for n in range(depth)]
  else:
    sliding = [False] * depth
  if window is None:
    if given is not None and any(sliding) and family.startswith("gemma"):
      raise UserError(
        "layer_types has sliding_attention and sliding_window is null: give it"
      )
    return ["full_attention"] * depth
  return ["sliding_attention" if s else "full_attention" for s in sliding]


def _turning(told: Mapping[str, Any]) -> list[bool]:
  """Which layers of SmolLM3 rotate; the others know no positions."""
  depth, given = told["num_hidden_layers"], told.get("no_rope_layers")
  if given is None:
    every = told["no_rope_layer_interval"]
    return [(n + 1) % every != 0 for n in range(depth)]
  if len(given) < depth:
    raise UserError(
      f"no_rope_layers has {len(given)} entries, needs one for each of {depth} "
      "layers: mend config.json"
    )
  return [bool(turns) for turns in given[:depth]]


def rotations(
  family: str, told: Mapping[str, Any], layers: list[str], head_dim: int
) -> tuple[tuple[Rotation, ...], int]:
  """Each layer's rotation, and the context that they stretch to."""
  context = told["max_position_embeddings"]
  theta = told["rope_theta"] or THETA.get(family, 10_000.0)
  flat = dict(told["rope_scaling"] or told["rope_parameters"] or {})
  by_kind: dict[str, dict[str, Any]] = {"full_attention": flat}
  by_kind["sliding_attention"] = flat
  if family == "gemma3_text":
    nested = told["rope_parameters"] or {}
    if flat_keys := sorted(set(nested) - set(by_kind)):
      raise UserError(
        f"rope_parameters of gemma3_text has {', '.join(flat_keys)}, needs "
        f"{' and '.join(by_kind)}: mend config.json"
      )
    full = nested.get("full_attention") or {}
    by_kind["full_attention"] = {**full, **(told["rope_scaling"] or {})}
    by_kind["sliding_attention"] = {
      "rope_theta": told["rope_local_base_freq"] or 10_000.0,
      **(nested.get("sliding_attention") or {}),
    }
  made, stretched = {}, 0
  trained = "original_max_position_embeddings"
  for kind in sorted(set(layers)):
    given = {k: v for k, v in by_kind[kind].items() if v is not None}
    rope = {"rope_theta": theta, **given}
    rope_type = rope.get("rope_type", rope.get("type"))
    if told[trained] is not None and rope_type in ("llama3", "yarn"):
      rope[trained] = told[trained]
    made[kind] = rotary.rotation(rope, head_dim, context)
    if rope_type == "yarn":
      # Many a config.json stretches without naming the longer context.
      factor = rope.get("factor") or 1
      stretched = int(rotary.trained_context(rope, context) * factor)
  turning = _turning(told) if family == "smollm3" else [True] * len(layers)
  return tuple(
    made[kind] if turns else rotary.none(head_dim)
    for kind, turns in zip(layers, turning)
  ), stretched
