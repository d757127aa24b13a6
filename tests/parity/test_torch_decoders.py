"""Decoders of transformers beside ours, run here: both directions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from golden_decoders import assert_close  # noqa: E402
from hub_decoders import (  # noqa: E402
  CASES,
  NEW,
  drawn,
  greedy,
  hub,
  load,
  module,
  run,
  tokens,
)

from kdjax.generate import generate  # noqa: E402
from kdjax.models.decoder import decoder  # noqa: E402
from kdjax.pretrained import decoders  # noqa: E402


def ours(net, params, ids, taps=(), **options):
  model = decoder(net, **options)
  apply = lambda p, b: model.apply(p, {}, b, train=False, taps=taps)  # noqa: E731
  return jax.jit(apply)(params, {"tokens": ids})[0]


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_computes_what_they_compute(name, tmp_path):
  theirs, _ = drawn(name, tmp_path)
  ids = tokens(name, (3, 31))
  logits, taps = run(theirs, ids)
  net, params = decoders.read(tmp_path)
  output = ours(net, params, ids, tuple(taps))
  for tap, value in taps.items():
    assert_close(output.taps[tap], value, tap)
  assert_close(output.logits, logits, "logits")


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_they_read(name, tmp_path):
  """Weights drawn by us, in shards; the config.json is theirs."""
  module(CASES[name]()).save_pretrained(tmp_path / "theirs")
  config = json.loads((tmp_path / "theirs" / "config.json").read_text())
  config["initializer_range"] = 0.3  # so that logits are no small numbers
  model = decoder(config)
  params, _ = model.init(jax.random.key(0), {})
  net, _ = decoders.read(tmp_path / "theirs")
  net = decoders.architecture(config)
  decoders.write(tmp_path / "ours", params, net, shard_bytes=8000)
  theirs = load(tmp_path / "ours")
  ids = tokens(name, (3, 31))
  logits, _ = run(theirs, ids)
  exact, _ = run(theirs.double(), ids)
  scale = np.abs(exact).max()
  assert scale > 0.5
  # Weights of 0.3 and not 0.02 make both sides' rounding larger, by the draw:
  # 1e-6 to 8e-6 of the scale from float64 (3 families, 3 draws), as theirs is.
  rounding = np.abs(logits - exact).max() / scale
  close = max(5e-6, 3 * rounding)
  assert close < 3e-5
  assert_close(ours(net, params, ids).logits, exact, relative=close)


@pytest.mark.parametrize("name", CASES)
def test_greedy_generation_token_for_token(name, tmp_path):
  theirs, _ = drawn(name, tmp_path)
  net, params = decoders.read(tmp_path)
  ids, mask = tokens(name, (3, 12)), np.ones((3, 12), int)
  mask[1, :5] = mask[2, :9] = 0  # padding on the left, as they want it
  ids = np.where(mask, ids, 0)
  found = generate(net, params, ids, max_new_tokens=NEW, mask=mask)
  np.testing.assert_array_equal(found.tokens, greedy(theirs, ids, mask))


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "llama_3", "qwen3"])
def test_bfloat16_is_no_worse_than_theirs(name, tmp_path):
  theirs, _ = drawn(name, tmp_path)
  ids = tokens(name, (8, 31))
  # Weights rounded, all else exact: what either would give with more digits.
  exact, _ = run(theirs.to(torch.bfloat16).float(), ids)
  with torch.no_grad():
    rounded = theirs.to(torch.bfloat16)(torch.tensor(ids)).logits
  net, params = decoders.read(tmp_path, dtype=jnp.bfloat16)
  found = ours(net, params, ids, dtype=jnp.bfloat16).logits
  error, bound = (
    np.square(np.asarray(x) - exact).mean() ** 0.5
    for x in (found, rounded.float().numpy())
  )
  assert error < 1.2 * bound


def configs(count=3):
  """Further configs of each family, drawn: other sizes, switches, patterns."""
  rng = np.random.default_rng(0)
  pick = lambda *of: of[rng.integers(len(of))]  # noqa: E731
  for n in range(count):
    heads, depth = int(pick(2, 4, 6)), int(rng.integers(1, 6))
    sizes = dict(
      vocab_size=int(rng.integers(30, 90)),
      hidden_size=heads * int(pick(2, 6, 10)),
      intermediate_size=int(rng.integers(5, 60)),
      num_hidden_layers=depth,
      num_attention_heads=heads,
      num_key_value_heads=int(pick(1, 2, heads)),
      max_position_embeddings=int(rng.integers(32, 99)),
      rms_norm_eps=float(pick(1e-6, 1e-5, 1e-2)),
      tie_word_embeddings=bool(pick(True, False)),
      bos_token_id=1,
      eos_token_id=2,
      pad_token_id=0,
    )
    kinds = [str(pick("sliding_attention", "full_attention"))] * depth
    kinds[0] = "sliding_attention"
    window = dict(sliding_window=int(rng.integers(1, 20)), layer_types=kinds)
    rope = dict(rope_type="default", rope_theta=float(pick(10.0, 1e4, 1e6)))
    dim = dict(head_dim=int(pick(2, 8, 14)))
    bias = dict(attention_bias=bool(pick(True, False)))
    act = str(pick("silu", "gelu", "relu", "gelu_pytorch_tanh"))
    plain = dict(rope_parameters=rope, hidden_act=act)
    gemma = {**sizes, **window, **dim, **bias, "hidden_activation": act}
    gemma["query_pre_attn_scalar"] = int(rng.integers(1, 64))
    caps = dict(
      attn_logit_softcapping=pick(None, 1.0, 20.0),
      final_logit_softcapping=pick(None, 2.0, 30.0),
    )
    both = {
      "full_attention": rope,
      "sliding_attention": {"rope_type": "default", "rope_theta": 77.0},
    }
    swa = dict(use_sliding_window=True, **window)
    yield from (
      (f"llama {n}", hub.LlamaConfig(**sizes, **plain, **dim, **bias)),
      (
        f"mistral {n}",
        hub.MistralConfig(
          **sizes, **plain, **dim, sliding_window=pick(None, 3)
        ),
      ),
      (f"qwen2 {n}", hub.Qwen2Config(**sizes, **plain, **swa)),
      (f"qwen3 {n}", hub.Qwen3Config(**sizes, **plain, **swa, **dim, **bias)),
      (f"gemma2 {n}", hub.Gemma2Config(**gemma, **caps, rope_parameters=rope)),
      (
        f"gemma3 {n}",
        hub.Gemma3TextConfig(**gemma, **caps, rope_parameters=both),
      ),
      (
        f"smollm3 {n}",
        hub.SmolLM3Config(
          **sizes,
          **plain,
          **swa,
          **bias,
          no_rope_layer_interval=int(pick(1, 3)),
        ),
      ),
      (
        f"gpt2 {n}",
        hub.GPT2Config(
          vocab_size=sizes["vocab_size"],
          n_embd=sizes["hidden_size"],
          n_layer=depth,
          n_head=heads,
          n_positions=32,
          n_inner=pick(None, 33),
          activation_function=act,
          scale_attn_weights=bool(pick(True, False)),
          scale_attn_by_inverse_layer_idx=bool(pick(True, False)),
          reorder_and_upcast_attn=bool(pick(True, False)),
          tie_word_embeddings=bool(pick(True, False)),
        ),
      ),
    )


@pytest.mark.parametrize(
  "config", [pytest.param(c, id=name) for name, c in configs()]
)
def test_drawn_configs(config, tmp_path):
  config.initializer_range = 0.2
  torch.manual_seed(0)
  theirs = module(config).eval()
  for parameter in theirs.parameters():  # norms and biases too
    parameter.data += 0.1 * torch.randn_like(parameter)
  theirs.save_pretrained(tmp_path / "theirs")
  ids = np.random.default_rng(1).integers(3, config.vocab_size, (2, 29))
  logits, taps = run(theirs, ids)
  net, params = decoders.read(tmp_path / "theirs")
  output = ours(net, params, ids, tuple(taps))
  # Unlike the cases above, these have scores of a hundred and more, and the
  # last digit of 300 is 3e-5 in an attention map, whose scale is 1.
  for tap, value in taps.items():
    relative = 1e-4 if tap.startswith("attention") else 2e-5
    assert_close(output.taps[tap], value, tap, relative)
  assert_close(output.logits, logits, "logits", 2e-5)
  decoders.write(tmp_path / "ours", params, net)
  assert_close(run(load(tmp_path / "ours"), ids)[0], logits, relative=1e-6)
