"""Llama-3.1-8B teaches Llama-3.2-1B: what a step takes, on many devices.

    python -m kdjax.scaling --config=configs/llm_8b_1b.py:8 --devices=8
    python -m kdjax.scaling --config=configs/llm_8b_1b.py:64 --topology=v5e:8x8

The word after the colon is the number of devices: so many rows of 4096 tokens
are a batch, and `fsdp` splits both networks, over 16 at most. The sizes are
those of the published config.json of meta-llama/Llama-3.1-8B and
Llama-3.2-1B, so that neither has to be at hand. To train, name the two as in
configs/llm.py: `--config.teacher.path=... --config.teacher.model={}`.

NOBODY HAS RUN THIS: see docs/scaling.md for what is known of it.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

_ROPE = dict(
  rope_type="llama3",
  factor=32.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=8192,
)
_EVERY = dict(
  model_type="llama",
  vocab_size=128256,
  hidden_act="silu",
  num_attention_heads=32,
  num_key_value_heads=8,
  max_position_embeddings=131072,
  rms_norm_eps=1e-5,
  rope_theta=500000.0,
)
LLAMA_8B = dict(
  _EVERY,
  hidden_size=4096,
  intermediate_size=14336,
  num_hidden_layers=32,
  head_dim=128,
  rope_scaling=dict(_ROPE, factor=8.0),
  tie_word_embeddings=False,
)
LLAMA_1B = dict(
  _EVERY,
  hidden_size=2048,
  intermediate_size=8192,
  num_hidden_layers=16,
  head_dim=64,
  rope_scaling=_ROPE,
  tie_word_embeddings=True,
)


def get_config(arg: str = "") -> ConfigDict:
  count = int(arg or 8)
  c = _llm()
  c.data.path = "data.jsonl"
  c.data.sequence_length = 4096
  c.data.batch_size = c.data.eval_batch_size = count
  c.teacher.model, c.student.model = LLAMA_8B, LLAMA_1B
  # Narrower than 128, the width of a register, a share of the 1B's 2048
  # channels would be padded: the compiler then reduces whole gradients.
  c.mesh.data, c.mesh.fsdp = -1, min(count, 16)
  return c


def _llm() -> ConfigDict:
  """The config of every pair of language models, which stands beside this."""
  path = Path(__file__).with_name("llm.py")
  spec = importlib.util.spec_from_file_location("llm", path)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()
