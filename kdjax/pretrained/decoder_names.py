"""Where a decoder's arrays are in a file of transformers, and what misfits."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from kdjax.errors import UserError
from kdjax.models.decoder import Architecture
from kdjax.models.decoder.parameters import shapes
from kdjax.pretrained.files import CONFIG, Tensors

# As safetensors and config.json call them.
DTYPES = {
  "F32": ("float32", np.float32),
  "F16": ("float16", np.float16),
  "BF16": ("bfloat16", ml_dtypes.bfloat16),
}
# What older versions of transformers stored beside the weights.
_BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


class Place(NamedTuple):
  """Where an array of ours is in a file.

  Attributes:
    name: of the tensor; with {} for the layer's number, of a stack of them.
    transposed: [outputs, inputs] there, the other way round here.
    third: ours is this third of its last axis (queries, keys, values).
  """

  name: str
  transposed: bool = False
  third: int | None = None


def places(net: Architecture) -> dict[str, Place]:
  """Where each array of the tree is in a file of its family."""
  table = _gpt2_table() if net.family == "gpt2" else _llama_table(net)
  found = {}
  for path in shapes(net):
    module, _, part = path.rpartition("/")
    place = table[module]
    # GPT-2's linear maps are stored [inputs, outputs], embeddings like all.
    suffix = ".bias" if part == "bias" else ".weight"
    transposed = place.transposed and part == "kernel"
    found[path] = place._replace(
      name=place.name + suffix, transposed=transposed
    )
  return found


def _llama_table(net: Architecture) -> dict[str, Place]:
  gemma = net.post_norms
  layer = {
    "attention_norm": Place("input_layernorm"),
    "query": Place("self_attn.q_proj", transposed=True),
    "key": Place("self_attn.k_proj", transposed=True),
    "value": Place("self_attn.v_proj", transposed=True),
    "output": Place("self_attn.o_proj", transposed=True),
    "query_norm": Place("self_attn.q_norm"),
    "key_norm": Place("self_attn.k_norm"),
    "mlp_norm": Place(
      "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
    ),
    "gate": Place("mlp.gate_proj", transposed=True),
    "up": Place("mlp.up_proj", transposed=True),
    "down": Place("mlp.down_proj", transposed=True),
    "post_attention_norm": Place("post_attention_layernorm"),
    "post_mlp_norm": Place("post_feedforward_layernorm"),
  }
  return {
    "embed": Place("model.embed_tokens"),
    "norm": Place("model.norm"),
    "head": Place("lm_head"),
    **_stacked("model.layers.{}.", layer),
  }


def _gpt2_table() -> dict[str, Place]:
  layer = {
    "attention_norm": Place("ln_1"),
    "query": Place("attn.c_attn", third=0),
    "key": Place("attn.c_attn", third=1),
    "value": Place("attn.c_attn", third=2),
    "output": Place("attn.c_proj"),
    "mlp_norm": Place("ln_2"),
    "up": Place("mlp.c_fc"),
    "down": Place("mlp.c_proj"),
  }
  return {
    "embed": Place("transformer.wte"),
    "positions": Place("transformer.wpe"),
    "norm": Place("transformer.ln_f"),
    "head": Place("lm_head"),
    **_stacked("transformer.h.{}.", layer),
  }


def _stacked(prefix: str, layer: Mapping[str, Place]) -> dict[str, Place]:
  return {
    f"layers/{module}": place._replace(name=prefix + place.name)
    for module, place in layer.items()
  }


def unprefixed(
  found: Mapping[str, Place], tensors: Tensors
) -> dict[str, Place]:
  """The names that a file has: those of a model without a head lack a part."""
  prefixes = ("model.", "transformer.")
  if any(name.startswith(prefixes) for name in tensors.shapes):
    return dict(found)
  return {
    path: place._replace(
      name=place.name.removeprefix("model.").removeprefix("transformer.")
    )
    for path, place in found.items()
  }


def check(
  source: str | Path,
  net: Architecture,
  found: Mapping[str, Place],
  tensors: Tensors,
) -> None:
  """Names all tensors that are missing, surplus, misshaped or of no float."""
  wanted: dict[str, list[int]] = {}
  for path, shape in shapes(net).items():
    place, one = found[path], list(shape)
    stacked = "{}" in place.name
    one = one[1:] if stacked else one
    if place.third is not None:
      one[-1] *= 3
    one = one[::-1] if place.transposed else one
    for n in range(net.depth if stacked else 1):
      wanted[place.name.format(n)] = one
  there = {k for k in tensors.shapes if not k.endswith(_BUFFERS)}
  if net.tied and "lm_head.weight" in there - set(wanted):
    there.remove("lm_head.weight")
    _check_tied(source, found["embed/kernel"].name, tensors)
  told = {
    "missing": sorted(set(wanted) - there),
    "surplus": sorted(there - set(wanted)),
    "misshaped": [
      f"{name} {list(tensors.shapes[name])} for {shape}"
      for name, shape in wanted.items()
      if name in there and list(tensors.shapes[name]) != shape
    ],
    f"neither {' nor '.join(DTYPES)}": [
      f"{name} {tensors.dtypes[name]}"
      for name in wanted
      if name in there and tensors.dtypes[name] not in DTYPES
    ],
  }
  if problems := _problems(told):
    raise UserError(
      f"{source} does not fit its {CONFIG} ({net.family}): {problems}"
    )


def _check_tied(source: str | Path, embed: str, tensors: Tensors) -> None:
  head = "lm_head.weight"
  same = tensors.shapes.get(embed) == tensors.shapes[head] and np.array_equal(
    tensors.load(embed), tensors.load(head)
  )
  if not same:
    raise UserError(
      f"{source} has another {head} than {embed}, and {CONFIG} says "
      "tie_word_embeddings: true: make it false, or remove the tensor"
    )


def check_params(net: Architecture, arrays: Mapping[str, Any]) -> None:
  wanted = shapes(net)
  told = {
    "missing": sorted(set(wanted) - set(arrays)),
    "surplus": sorted(set(arrays) - set(wanted)),
    "misshaped": [
      f"{path} {list(arrays[path].shape)} for {list(shape)}"
      for path, shape in wanted.items()
      if path in arrays and tuple(arrays[path].shape) != shape
    ],
  }
  if problems := _problems(told):
    raise UserError(
      f"the parameters are not those of the architecture ({net.family}): "
      f"{problems}; give both of one model"
    )


def _problems(told: Mapping[str, Collection[str]]) -> str:
  return "; ".join(
    f"{len(names)} {what}: {', '.join(names)}"
    for what, names in told.items()
    if names
  )
