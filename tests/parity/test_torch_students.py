"""Students cut out of a teacher, and merged adapters, in transformers."""

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from golden_decoders import assert_close  # noqa: E402
from hub_decoders import CASES, drawn, load, run, tokens  # noqa: E402

from kdjax import lora  # noqa: E402
from kdjax.importance import of_activations  # noqa: E402
from kdjax.inherit import inherit  # noqa: E402
from kdjax.models.decoder import decoder  # noqa: E402
from kdjax.pretrained import decoders  # noqa: E402

CUT = dict(layers=[1, 3], width=14, mlp_width=20, kv_heads=1)
GPT2 = {**CUT, "width": 18, "kv_heads": 3}


def ours(net, params, ids):
  model = decoder(net)
  apply = lambda p, t: model.apply(p, {}, {"tokens": t}, train=False)  # noqa: E731
  return jax.jit(apply)(params, ids)[0].logits


@pytest.mark.parametrize("name", CASES)
def test_a_student_is_loaded_and_computes_the_same(name, tmp_path):
  drawn(name, tmp_path / "teacher")
  net, params = decoders.read(tmp_path / "teacher")
  ids = tokens(name, (3, 31))
  score = of_activations(net, params, [{"tokens": ids}])
  size = GPT2 if net.family == "gpt2" else CUT
  made, student = inherit(net, params, importance=score, **size)
  adapters = lora.init(jax.random.key(0), student, rank=2)
  rng = np.random.default_rng(0)
  draw = lambda x: 0.2 * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
  adapters = jax.tree.map(lambda x: x + draw(x), adapters)
  found = ours(made, lora.attach(student, adapters, 0.5), ids)
  merged = lora.merge(student, adapters, 0.5)
  decoders.write(tmp_path / "student", merged, made)
  theirs, taps = run(load(tmp_path / "student"), ids)
  assert len([t for t in taps if t.startswith("attention")]) == 2
  assert_close(found, theirs, relative=2e-5)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt2_scaled"])
def test_dropping_layers_is_removing_theirs(name, tmp_path):
  """Their own list of layers, without one, in their own forward pass."""
  theirs, _ = drawn(name, tmp_path / "teacher")
  net, params = decoders.read(tmp_path / "teacher")
  ids = tokens(name, (3, 31))
  made, student = inherit(net, params, layers=[1, 2])
  body = getattr(theirs, "model", None) or theirs.transformer
  layers = "layers" if hasattr(body, "layers") else "h"
  setattr(body, layers, getattr(body, layers)[:2])
  theirs.config.num_hidden_layers = 2
  logits, _ = run(theirs, ids)
  assert_close(ours(made, student, ids), logits)
