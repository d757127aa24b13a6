"""The fields of `config.json`: which family reads which, which change nothing.

The defaults are those of transformers 5, for keys that a file does not have.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

# A size: the default of a class of transformers is that of some checkpoint.
NEEDED = object()
_SHARED = {
  "vocab_size": NEEDED,
  "hidden_size": NEEDED,
  "intermediate_size": NEEDED,
  "num_hidden_layers": NEEDED,
  "num_attention_heads": NEEDED,
  "num_key_value_heads": NEEDED,
  "max_position_embeddings": NEEDED,
  "head_dim": None,
  "hidden_act": "silu",
  "rms_norm_eps": 1e-6,
  "initializer_range": 0.02,
  "tie_word_embeddings": False,
  "attention_dropout": 0.0,
  "rope_theta": None,
  "rope_scaling": None,
  "rope_parameters": None,
  "original_max_position_embeddings": None,
}
_QWEN = {
  **_SHARED,
  "use_sliding_window": False,
  "sliding_window": 4096,
  "max_window_layers": 28,
  "layer_types": None,
}
_GEMMA = {
  **{k: v for k, v in _SHARED.items() if k != "hidden_act"},
  "head_dim": 256,
  "hidden_activation": "gelu_pytorch_tanh",
  "tie_word_embeddings": True,
  "attention_bias": False,
  "query_pre_attn_scalar": 256,
  "sliding_window": 4096,
  "layer_types": None,
  "final_logit_softcapping": None,
  "attn_logit_softcapping": None,
}
SIZES = tuple(k for k in _SHARED if _SHARED[k] is NEEDED) + (
  "n_embd",
  "n_layer",
  "n_head",
  "n_positions",
)
# family: the keys it reads, with what transformers takes where one is absent.
FAMILIES: dict[str, dict[str, Any]] = {
  "llama": {
    **_SHARED,
    "num_key_value_heads": None,
    "attention_bias": False,
    "mlp_bias": False,
  },
  "mistral": {**_SHARED, "sliding_window": 4096},
  "qwen2": _QWEN,
  "qwen3": {**_QWEN, "head_dim": 128, "attention_bias": False},
  "gemma2": {
    **_GEMMA,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
  },
  "gemma3_text": {
    **_GEMMA,
    "sliding_window_pattern": 6,
    "rope_local_base_freq": 10_000.0,
  },
  "smollm3": {
    **_SHARED,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "layer_types": None,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
  },
  "gpt2": {
    "vocab_size": NEEDED,
    "n_embd": NEEDED,
    "n_layer": NEEDED,
    "n_head": NEEDED,
    "n_positions": NEEDED,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "embd_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "attn_pdrop": 0.1,
  },
}
# Base of the rotation where a config.json has none.
THETA = {"smollm3": 2e6, "gemma3_text": 1e6}

# They change nothing that is computed here: names, tokens, what a run returns.
IRRELEVANT = frozenset(
  """
  architectures model_type dtype torch_dtype transformers_version use_cache
  bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
  output_attentions output_hidden_states output_scores return_dict
  return_dict_in_generate id2label label2id num_labels problem_type torchscript
  finetuning_task tokenizer_class task_specific_params chunk_size_feed_forward
  cache_implementation attn_implementation pretraining_tp n_ctx
  reorder_and_upcast_attn summary_type summary_use_proj summary_activation
  summary_proj_to_labels summary_first_dropout do_sample max_length
  max_new_tokens temperature top_p top_k repetition_penalty
  gradient_checkpointing is_llama_config transformers.js_config unsloth_fixed
  unsloth_version
""".split()  # noqa: SIM905 - quotes would hide the names
)
# Keys of which we compute one value's meaning alone.
ONLY: dict[str, Any] = {
  "add_cross_attention": False,
  "is_decoder": False,
  "is_encoder_decoder": False,
  "use_bidirectional_attention": False,
  "use_mrope": False,
  "rope_interleaved": False,
  "partial_rotary_factor": 1.0,
}
IRRELEVANT_IN = {
  "gemma2": {"hidden_act"},
  "gemma3_text": {"hidden_act"},
  "smollm3": {"max_window_layers"},
}

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "silu": jax.nn.silu,
  "swish": jax.nn.silu,
  "relu": jax.nn.relu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_new": jax.nn.gelu,
  "gelu_pytorch_tanh": jax.nn.gelu,
  "gelu_fast": jax.nn.gelu,
}
