"""The architecture of a part of a decoder, and its config.json: `smaller`."""

from collections.abc import Sequence
from typing import Any

from kdjax.errors import UserError
from kdjax.models.decoder.architecture import Architecture, architecture

# Of these transformers loads no other, whatever head_dim says.
_WIDTH_OF_HEADS = ("llama", "gemma2", "gemma3_text")


def smaller(
  net: Architecture,
  *,
  layers: Sequence[int],
  width: int,
  mlp_width: int,
  kv_heads: int,
) -> Architecture:
  """The decoder of some layers of `net`, and of fewer channels in them.

  Heads keep their size, and each key/value head its number of query heads.
  What else config.json says stays, but for what it says of each layer: that is
  stated, where the teacher's may follow from a pattern of its numbers.

  Args:
    net: the whole decoder.
    layers: which, from 0.
    width, mlp_width, kv_heads: sizes.

  Raises:
    UserError: a GPT-2 whose heads would change their size, for which its
      config.json has no field; a Llama or Gemma whose heads do not divide its
      width, which transformers refuses.
  """
  heads = kv_heads * (net.heads // net.kv_heads)
  if net.family in _WIDTH_OF_HEADS and width % heads:
    raise UserError(
      f"a {net.family} of width {width} and {heads} heads is none that "
      f"transformers loads: take a width that {heads} divides"
    )
  config: dict[str, Any] = dict(net.config)
  if net.family == "gpt2":
    if heads * net.head_dim != width:
      raise UserError(
        f"a GPT-2 of {heads} heads of {net.head_dim} channels has width "
        f"{heads * net.head_dim}, got {width}: give kv_heads and width="
        f"{net.head_dim} · kv_heads"
      )
    config |= {"n_embd": width, "n_head": heads, "n_inner": mlp_width}
    config["n_layer"] = len(layers)
  else:
    config |= {
      "hidden_size": width,
      "intermediate_size": mlp_width,
      "num_hidden_layers": len(layers),
      "num_attention_heads": heads,
      "num_key_value_heads": kv_heads,
      "head_dim": net.head_dim,
    }
  if net.family not in ("gpt2", "llama", "mistral"):
    config["layer_types"] = [
      "sliding_attention" if net.windows[n] else "full_attention"
      for n in layers
    ]
  if net.family == "smollm3":
    config["no_rope_layers"] = [
      int(any(net.rotations[n].frequencies)) for n in layers
    ]
  # All of its fields were accepted before.
  return architecture(config, ignore=set(net.config))
