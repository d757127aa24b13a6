"""Small decoders of transformers, of odd shapes, with drawn weights.

A case is a class of config and what it has beside the sizes: each turns on what
makes its family differ.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tiny_networks import draw
from torch_models import hub

SIZES = dict(
  vocab_size=61,
  hidden_size=24,
  intermediate_size=37,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=40,
  bos_token_id=1,
  eos_token_id=2,
  pad_token_id=0,
)
GPT2 = dict(vocab_size=61, n_embd=24, n_layer=3, n_head=4, n_positions=40)
GPT2 |= dict(bos_token_id=1, eos_token_id=2)
BATCH, LENGTH, NEW = 2, 17, 8
# The taps that a golden file has.
STORED = ("embed", "block_1", "block_2", "attention_2")


def _rope(kind, **more):
  return {"rope_type": kind, "rope_theta": 500.0, **more}


def _llama(**more):
  return lambda: hub.LlamaConfig(**{**SIZES, **more})


CASES = {
  "llama": _llama(num_key_value_heads=4, rms_norm_eps=1e-3),
  "llama_3": _llama(
    head_dim=16,
    tie_word_embeddings=True,
    rope_parameters=_rope(
      "llama3",
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=16,
    ),
  ),
  "llama_biases": _llama(attention_bias=True, mlp_bias=True, hidden_act="gelu"),
  "llama_linear": _llama(rope_parameters=_rope("linear", factor=3.0)),
  "llama_dynamic": _llama(rope_parameters=_rope("dynamic", factor=3.0)),
  "llama_yarn": _llama(
    head_dim=16,
    rope_parameters=_rope(
      "yarn", factor=4.0, original_max_position_embeddings=20
    ),
  ),
  "llama_yarn_scaled": _llama(
    head_dim=16,
    rope_parameters=_rope(
      "yarn",
      factor=4.0,
      original_max_position_embeddings=20,
      beta_fast=8.0,
      beta_slow=0.5,
      mscale=1.2,
      mscale_all_dim=0.5,
      truncate=False,
    ),
  ),
  "mistral": lambda: hub.MistralConfig(**SIZES, sliding_window=5, head_dim=10),
  "qwen2": lambda: hub.Qwen2Config(
    **SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1
  ),
  "qwen3": lambda: hub.Qwen3Config(
    **SIZES, head_dim=10, tie_word_embeddings=True
  ),
  "qwen3_biases": lambda: hub.Qwen3Config(
    **SIZES, head_dim=10, attention_bias=True
  ),
  "gemma2": lambda: hub.Gemma2Config(
    **SIZES,
    head_dim=10,
    query_pre_attn_scalar=20,
    sliding_window=4,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
  ),
  "gemma3": lambda: hub.Gemma3TextConfig(
    **SIZES,
    head_dim=10,
    query_pre_attn_scalar=20,
    sliding_window=4,
    sliding_window_pattern=3,
    rope_parameters={
      "full_attention": _rope("linear", factor=8.0),
      "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
  ),
  "smollm3": lambda: hub.SmolLM3Config(
    **SIZES,
    no_rope_layer_interval=2,
    use_sliding_window=True,
    sliding_window=7,
  ),
  "gpt2": lambda: hub.GPT2Config(**GPT2),
  "gpt2_scaled": lambda: hub.GPT2Config(
    **GPT2,
    n_inner=50,
    scale_attn_by_inverse_layer_idx=True,
    tie_word_embeddings=False,
    activation_function="relu",
  ),
}


def module(config):
  """The network of a config, with its own initial weights."""
  return hub.AutoModelForCausalLM.from_config(
    config, attn_implementation="eager"
  )


def load(folder):
  return hub.AutoModelForCausalLM.from_pretrained(
    folder, attn_implementation="eager", dtype=torch.float32
  ).eval()


def drawn(name, folder):
  """Saves a case's network with drawn weights, by transformers itself."""
  module(CASES[name]()).save_pretrained(folder)
  path = Path(folder) / "model.safetensors"
  tensors = draw({k: v.shape for k, v in load_file(path).items()})
  save_file(tensors, path, {"format": "pt"})
  return load(folder), {k: v.shape for k, v in tensors.items()}


def tokens(name, shape=(BATCH, LENGTH)):
  rng = np.random.default_rng(sum(map(ord, name)))
  return rng.integers(3, SIZES["vocab_size"], shape)


def run(network, ids, **more):
  """Logits, the taps that their outputs equal, and attention maps."""
  with torch.no_grad():
    out = network(
      torch.tensor(ids),
      output_hidden_states=True,
      output_attentions=True,
      use_cache=False,
      **more,
    )
  states = [h.numpy() for h in out.hidden_states]
  taps = {"embed": states[0], "final": states[-1]}
  taps |= {f"block_{n}": h for n, h in enumerate(states[1:-1], 1)}
  taps |= {f"attention_{n}": a.numpy() for n, a in enumerate(out.attentions, 1)}
  return out.logits.numpy(), taps


def greedy(network, ids, mask=None):
  """The tokens that follow, with no token that ends them."""
  ids = torch.tensor(ids)
  mask = torch.ones_like(ids) if mask is None else torch.tensor(mask)
  with torch.no_grad():
    out = network.generate(
      ids,
      attention_mask=mask,
      max_new_tokens=NEW,
      do_sample=False,
      eos_token_id=None,
      pad_token_id=0,
    )
  return out[:, ids.shape[1] :].numpy()


def golden(name):
  """What is stored of a case."""
  with tempfile.TemporaryDirectory() as folder:
    network, shapes = drawn(name, folder)
    config = (Path(folder) / "config.json").read_text()
  ids = tokens(name)
  logits, taps = run(network, ids)
  return dict(
    config=config,
    shapes=json.dumps({k: list(v) for k, v in sorted(shapes.items())}),
    tokens=ids.astype(np.int32),
    logits=logits,
    greedy=greedy(network, ids).astype(np.int32),
    **{f"tap_{k}": v for k, v in taps.items() if k in STORED},
  )
