"""What a checkpoint's `config.json` says of its decoder: `architecture`.

Every field is used, is known to change nothing that is computed, or is named
in an error.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from kdjax import errors
from kdjax.errors import UserError
from kdjax.models.decoder import fields, per_layer
from kdjax.models.decoder.rotary import Rotation


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A decoder, in the terms of its mathematics.

  Attributes:
    family: `model_type` of its config.json.
    vocab_size, width, depth, heads, kv_heads, head_dim, mlp_width: sizes.
    context: the most positions a sequence may have.
    activation: of the MLP, one of `fields.ACTIVATIONS`.
    gated: the MLP is down(f(gate x) · up x), else down(f(up x)).
    norm: "rms" (w · x), "rms_plus_one" ((1 + w) · x) or "layer".
    epsilon: of all norms.
    qkv_bias, output_bias, mlp_bias: which linear maps have a bias.
    qk_norm: queries and keys are normalised in each head.
    post_norms: what attention and MLP return is normalised too (Gemma 2, 3).
    tied: the head is the embedding.
    score_scale: factor on the attention scores.
    score_scale_by_layer: layer n divides its scores by n besides (GPT-2).
    windows: of each layer, how many tokens a query sees, itself included; None
      = all before it.
    rotations: of each layer; () where positions are learned (GPT-2).
    attention_softcap, final_softcap: c of c · tanh(x / c), on the scores and
      on the logits.
    embed_scale: factor on the embeddings.
    embed_dropout, residual_dropout, attention_dropout: in training only.
    init_std: standard deviation of drawn weights.
    config: the whole config.json, for writing it back.
  """

  family: str
  vocab_size: int
  width: int
  depth: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp_width: int
  context: int
  activation: str
  gated: bool
  norm: str
  epsilon: float
  qkv_bias: bool
  output_bias: bool
  mlp_bias: bool
  qk_norm: bool
  post_norms: bool
  tied: bool
  score_scale: float
  score_scale_by_layer: bool
  windows: tuple[int | None, ...]
  rotations: tuple[Rotation, ...]
  attention_softcap: float | None
  final_softcap: float | None
  embed_scale: float
  embed_dropout: float
  residual_dropout: float
  attention_dropout: float
  init_std: float
  config: Mapping[str, Any] = dataclasses.field(compare=False, repr=False)


def architecture(
  config: Mapping[str, Any], *, ignore: Collection[str] = ()
) -> Architecture:
  """The decoder that a `config.json` describes.

  Args:
    config: the content of config.json, in the form of transformers 4 or 5.
    ignore: fields that you know to change nothing, which no error names then.

  Raises:
    UserError: a family or value that is not supported; all fields that are
      unknown, and all that are missing, in one line.
  """
  family = str(config.get("model_type"))
  if family not in fields.FAMILIES:
    if "text_config" in config:
      raise UserError(
        f"config.json is of model_type {family!r}, a model of text and images: "
        "take a checkpoint of the text model alone (gemma3_text)"
      )
    raise errors.unknown("model_type in config.json", family, fields.FAMILIES)
  reads = fields.FAMILIES[family]
  surplus = [
    f"{key}={value!r}"
    for key, value in config.items()
    if value is not None
    and not key.startswith("_")  # private to the library that wrote it
    and key not in {*reads, *fields.IRRELEVANT, *ignore}
    and key not in fields.IRRELEVANT_IN.get(family, ())
    and not (key in fields.ONLY and fields.ONLY[key] == value)
  ]
  missing = [
    k for k in reads if reads[k] is fields.NEEDED and config.get(k) is None
  ]
  if surplus or missing:
    raise UserError(
      f"config.json of a {family} has {', '.join(surplus) or 'nothing'} that "
      f"is not supported and lacks {', '.join(missing) or 'nothing'}: mend it, "
      "or name in `ignore` what changes nothing"
    )
  told = {key: config.get(key, default) for key, default in reads.items()}
  _check(told)
  return (_gpt2 if family == "gpt2" else _llama)(family, told, config)


def _llama(
  family: str, told: Mapping[str, Any], config: Mapping[str, Any]
) -> Architecture:
  heads, width = told["num_attention_heads"], told["hidden_size"]
  depth, context = told["num_hidden_layers"], told["max_position_embeddings"]
  head_dim = told["head_dim"] or width // heads
  gemma = family.startswith("gemma")
  bias = told.get("attention_bias", False)
  kinds = per_layer.kinds(family, told)
  rotations, stretched = per_layer.rotations(family, told, kinds, head_dim)
  return Architecture(
    family=family,
    vocab_size=told["vocab_size"],
    width=width,
    depth=depth,
    heads=heads,
    kv_heads=told["num_key_value_heads"] or heads,
    head_dim=head_dim,
    mlp_width=told["intermediate_size"],
    context=max(context, stretched),
    activation=told["hidden_activation" if gemma else "hidden_act"],
    gated=True,
    norm="rms_plus_one" if gemma else "rms",
    epsilon=told["rms_norm_eps"],
    qkv_bias=bias or family == "qwen2",
    output_bias=bias,
    mlp_bias=told.get("mlp_bias", False),
    qk_norm=family in ("qwen3", "gemma3_text"),
    post_norms=gemma,
    tied=told["tie_word_embeddings"],
    score_scale=(told["query_pre_attn_scalar"] if gemma else head_dim) ** -0.5,
    score_scale_by_layer=False,
    windows=tuple(
      told["sliding_window"] if kind == "sliding_attention" else None
      for kind in kinds
    ),
    rotations=rotations,
    # Gemma 3 has the key and its code does not read it.
    attention_softcap=(
      told["attn_logit_softcapping"] if family == "gemma2" else None
    ),
    final_softcap=told.get("final_logit_softcapping"),
    embed_scale=width**0.5 if gemma else 1.0,
    embed_dropout=0.0,
    residual_dropout=0.0,
    attention_dropout=told["attention_dropout"] or 0.0,
    init_std=told["initializer_range"],
    config=dict(config),
  )


def _gpt2(
  family: str, told: Mapping[str, Any], config: Mapping[str, Any]
) -> Architecture:
  width, heads, depth = told["n_embd"], told["n_head"], told["n_layer"]
  head_dim = width // heads
  return Architecture(
    family=family,
    vocab_size=told["vocab_size"],
    width=width,
    depth=depth,
    heads=heads,
    kv_heads=heads,
    head_dim=head_dim,
    mlp_width=told["n_inner"] or 4 * width,
    context=told["n_positions"],
    activation=told["activation_function"],
    gated=False,
    norm="layer",
    epsilon=told["layer_norm_epsilon"],
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    qk_norm=False,
    post_norms=False,
    tied=told["tie_word_embeddings"],
    score_scale=head_dim**-0.5 if told["scale_attn_weights"] else 1.0,
    score_scale_by_layer=told["scale_attn_by_inverse_layer_idx"],
    windows=(None,) * depth,
    rotations=(),
    attention_softcap=None,
    final_softcap=None,
    embed_scale=1.0,
    embed_dropout=told["embd_pdrop"],
    residual_dropout=told["resid_pdrop"],
    attention_dropout=told["attn_pdrop"],
    init_std=told["initializer_range"],
    config=dict(config),
  )


def _check(told: Mapping[str, Any]) -> None:
  """Refuses sizes that make no network."""
  sizes = {
    key: told[key]
    for key in (*fields.SIZES, "num_key_value_heads", "head_dim", "n_inner")
    if told.get(key) is not None
  }
  if wrong := [
    f"{key}={size!r}"
    for key, size in sizes.items()
    if type(size) is not int or size < 1
  ]:
    raise UserError(
      f"config.json has {', '.join(wrong)}, needs whole numbers above 0: mend "
      "it"
    )
  for key in ("hidden_act", "hidden_activation", "activation_function"):
    if key in told and told[key] not in fields.ACTIVATIONS:
      raise errors.unknown(key, str(told[key]), fields.ACTIVATIONS)
  width = told.get("hidden_size", told.get("n_embd"))
  heads = told.get("num_attention_heads", told.get("n_head"))
  kv_heads = told.get("num_key_value_heads") or heads
  head_dim = told.get("head_dim")
  if heads % kv_heads:
    raise UserError(
      f"config.json has {heads} heads and {kv_heads} key/value heads: the "
      "first must be a multiple of the second"
    )
  if head_dim is None and width % heads:
    raise UserError(
      f"config.json has width {width} and {heads} heads: the width must be a "
      "multiple of the heads, or head_dim be given"
    )
  if "rope_theta" in told and (head_dim or width // heads) % 2:
    raise UserError(
      f"config.json has heads of {head_dim or width // heads} channels, which "
      "rotate in pairs: the number must be even"
    )
