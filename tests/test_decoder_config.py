"""config.json: what is read of it, and what is refused."""

import math

import numpy as np
import pytest
from golden_decoders import NAMES, golden

from kdjax.errors import UserError
from kdjax.models.decoder import architecture, rotary

LLAMA = dict(
  model_type="llama",
  vocab_size=61,
  hidden_size=24,
  intermediate_size=37,
  num_hidden_layers=4,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
)


def of(family, **more):
  return architecture({**LLAMA, "model_type": family, **more})


def theta(rotation, head_dim=6):
  """The base of an unscaled rotation."""
  return rotation.frequencies[1] ** (-head_dim / 2)


def test_both_forms_of_the_rotation_mean_the_same():
  scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
  trained = {"original_max_position_embeddings": 16}
  older = of(
    "llama",
    rope_theta=500.0,
    rope_scaling={"rope_type": "llama3", **scaling, **trained},
  )
  newer = of(
    "llama",
    rope_parameters={
      "rope_type": "llama3",
      "rope_theta": 500.0,
      **scaling,
      **trained,
    },
  )
  oldest = of(
    "llama", rope_theta=500.0, rope_scaling={"type": "linear", "factor": 2.0}
  )
  assert older == newer != oldest
  plain = of("llama", rope_theta=500.0)
  half = np.array(plain.rotations[0].frequencies) / 2
  np.testing.assert_allclose(oldest.rotations[0].frequencies, half, rtol=1e-6)


def test_bases_where_the_file_names_none():
  assert theta(of("llama").rotations[0]) == pytest.approx(1e4, rel=1e-5)
  smollm3 = of("smollm3", no_rope_layers=[1, 0, 1, 1])
  assert theta(smollm3.rotations[0]) == pytest.approx(2e6, rel=1e-5)
  assert smollm3.rotations[1] == rotary.none(6)
  gemma = of("gemma3_text", head_dim=6, sliding_window_pattern=2)
  local, full = (theta(gemma.rotations[n]) for n in (0, 1))
  assert (local, full) == pytest.approx((1e4, 1e6), rel=1e-5)
  older = of(
    "gemma3_text",
    head_dim=6,
    rope_theta=100.0,
    rope_local_base_freq=10.0,
    rope_scaling={"rope_type": "linear", "factor": 2.0},
    layer_types=["full_attention", "sliding_attention"] * 2,
  )
  full, local = (older.rotations[n].frequencies for n in (0, 1))
  assert local[1] ** -3 == pytest.approx(10.0, rel=1e-5)
  assert (2 * full[1]) ** -3 == pytest.approx(100.0, rel=1e-5)


def test_llama3_against_its_equation():
  """In float64; 8 and 32 positions are 64 over the two factors."""
  given = dict(rope_theta=500.0, rope_type="llama3", factor=8.0)
  given |= dict(low_freq_factor=2.0, high_freq_factor=8.0)
  given["original_max_position_embeddings"] = 64
  found = rotary.rotation(given, 32, 512).frequencies
  for n, frequency in enumerate(found):
    plain = 500.0 ** (-2 * n / 32)
    wavelength = 2 * math.pi / plain
    if wavelength < 8:
      expected = plain
    elif wavelength > 32:
      expected = plain / 8
    else:
      smooth = (64 / wavelength - 2) / (8 - 2)
      expected = (1 - smooth) * plain / 8 + smooth * plain
    assert frequency == pytest.approx(expected, rel=1e-5)


def test_yarn_against_its_equation():
  """Float64: a ramp from the pair of 32 turns to that of one, rounded out."""
  given = dict(rope_theta=1e4, rope_type="yarn", factor=4.0)
  given["original_max_position_embeddings"] = 2048
  found = rotary.rotation(given, 64, 2048)
  assert found.scale == pytest.approx(0.1 * math.log(4) + 1, rel=1e-6)

  def pair(turns):
    return 32 * math.log(2048 / (turns * 2 * math.pi)) / math.log(1e4)

  low, high = math.floor(pair(32)), math.ceil(pair(1))
  assert 0 < low < high < 32
  exact = rotary.rotation({**given, "truncate": False}, 64, 2048)
  for rotation, first, last in (
    (found, low, high),
    (exact, pair(32), pair(1)),
  ):
    for n, frequency in enumerate(rotation.frequencies):
      plain = 1e4 ** (-n / 32)
      ramp = min(max((n - first) / (last - first), 0), 1)
      expected = plain / 4 * ramp + plain * (1 - ramp)
      assert frequency == pytest.approx(expected, rel=1e-5)
  assert (
    rotary.rotation({**given, "attention_factor": 1.5}, 64, 2048).scale == 1.5
  )
  scaled = {**given, "mscale": 2.0, "mscale_all_dim": 1.0}
  ratio = (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)
  assert rotary.rotation(scaled, 64, 2048).scale == pytest.approx(ratio)
  net = of("qwen2", rope_scaling={**given, "type": "yarn"})
  assert net.context == 4 * 2048


def test_windows_of_each_layer():
  assert of("llama").windows == (None,) * 4
  assert of("mistral", sliding_window=None).windows == (None,) * 4
  assert of("mistral").windows == (4096,) * 4
  qwen = dict(use_sliding_window=True, sliding_window=8, max_window_layers=3)
  assert of("qwen2", **qwen).windows == (None, None, None, 8)
  qwen["use_sliding_window"] = False
  assert of("qwen2", **qwen).windows == (None,) * 4
  assert of("gemma2", sliding_window=8).windows == (8, None, 8, None)
  gemma3 = of("gemma3_text", sliding_window=8, sliding_window_pattern=3)
  assert gemma3.windows == (8, 8, None, 8)
  kinds = ["full_attention", "sliding_attention"] * 2
  gemma3 = of("gemma3_text", sliding_window=8, layer_types=kinds)
  assert gemma3.windows == (None, 8, None, 8)
  smollm3 = dict(no_rope_layer_interval=2, sliding_window=8)
  assert of("smollm3", **smollm3).windows == (None,) * 4
  smollm3["use_sliding_window"] = True
  assert of("smollm3", **smollm3).windows == (None, 8, None, 8)


def test_what_a_family_has_without_saying_so():
  gemma = of("gemma2")
  assert gemma.tied
  assert gemma.head_dim == 256
  assert gemma.post_norms
  assert (gemma.attention_softcap, gemma.final_softcap) == (50.0, 30.0)
  assert gemma.score_scale == 1 / 16
  assert of("gemma3_text").final_softcap is None
  assert of("qwen3").head_dim == 128
  assert of("qwen3").qk_norm
  assert of("qwen2").qkv_bias
  assert not of("qwen2").output_bias
  assert not of("llama").tied
  assert of("smollm3").tied
  one_each = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
  assert architecture(one_each).kv_heads == 4


REFUSED = {
  "family": (dict(model_type="mamba"), r"unknown model_type .*'mamba'"),
  "family, none": (dict(model_type=None), "unknown model_type"),
  "images": (
    dict(model_type="gemma3", text_config={}),
    "a model of text and images: take",
  ),
  "field": (
    dict(quantization_config={"bits": 4}, rope_interleaved=True),
    r"has quantization_config=\{'bits': 4\}, rope_interleaved=True that is not "
    "supported and lacks nothing",
  ),
  "field of another family": (
    dict(attn_logit_softcapping=5.0),
    "attn_logit_softcapping=5.0",
  ),
  "missing": (
    dict(hidden_size=None, vocab_size=None),
    "lacks vocab_size, hidden_size: mend",
  ),
  "activation": (dict(hidden_act="mish"), "unknown hidden_act 'mish'"),
  "rope type": (
    dict(rope_scaling={"rope_type": "longrope"}),
    "unknown rope_type 'longrope'",
  ),
  "rope fields": (
    dict(rope_scaling={"type": "linear", "beta_fast": 2}),
    "rope of type linear got beta_fast that it does not read and lacks factor",
  ),
  "part of a head": (
    dict(rope_parameters={"partial_rotary_factor": 0.5}),
    "partial_rotary_factor",
  ),
  "number": (dict(num_hidden_layers="4"), "num_hidden_layers='4', needs whole"),
  "none": (dict(vocab_size=0), "vocab_size=0, needs whole"),
  "heads": (dict(num_key_value_heads=3), "4 heads and 3 key/value heads"),
  "width": (
    dict(num_attention_heads=5, num_key_value_heads=5),
    "width 24 and 5 heads",
  ),
  "pairs": (dict(head_dim=7), "heads of 7 channels"),
  "layers": (
    dict(model_type="qwen2", layer_types=["full_attention", "chunked"]),
    r"layer_types has 2 entries \(chunked\)",
  ),
  "no window": (
    dict(
      model_type="gemma2",
      sliding_window=None,
      layer_types=["sliding_attention"] * 4,
    ),
    "sliding_window is null",
  ),
  "bases": (
    dict(model_type="gemma3_text", rope_parameters={"rope_theta": 1e4}),
    "gemma3_text has rope_theta, needs full_attention and sliding_attention",
  ),
  "positions": (
    dict(model_type="smollm3", no_rope_layers=[1, 0]),
    "no_rope_layers has 2 entries",
  ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_named(name):
  change, message = REFUSED[name]
  with pytest.raises(UserError, match=message) as caught:
    architecture({**LLAMA, **change})
  assert "\n" not in str(caught.value)


def test_what_changes_nothing_is_passed_by():
  plain = architecture(LLAMA)
  more = dict(_private=1, pretraining_tp=2, unknown=None, torch_dtype="float16")
  assert architecture({**LLAMA, **more}) == plain
  known = architecture({**LLAMA, "mine": 3}, ignore=("mine",))
  assert known == plain
  assert known.config["mine"] == 3


@pytest.mark.parametrize("name", NAMES)
def test_every_field_that_transformers_writes_is_known(name):
  """`golden` reads the whole config.json; a field less is noticed or unused."""
  config = golden(name).config
  assert architecture(config) == golden(name).net
