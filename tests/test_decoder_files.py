"""Checkpoints of decoders: in, out, and what is wrong with them."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden_decoders import NAMES, golden, save
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from kdjax.errors import UserError
from kdjax.models.decoder import architecture
from kdjax.models.decoder.parameters import nested, shapes
from kdjax.pretrained import decoders


def loaded(folder):
  """All tensors of a folder, and the files that they are in."""
  files = sorted(folder.glob("*.safetensors"))
  tensors = {}
  for file in files:
    tensors |= load_file(file)
  return tensors, [file.name for file in files]


@pytest.mark.parametrize("name", NAMES)
def test_what_was_read_is_written_bit_for_bit(name, tmp_path):
  stored = golden(name)
  decoders.write(tmp_path / "out", stored.params, stored.net)
  tensors, files = loaded(tmp_path / "out")
  assert files == ["model.safetensors"]
  assert set(tensors) == set(stored.tensors)
  for key, tensor in stored.tensors.items():
    np.testing.assert_array_equal(tensors[key], tensor, key)
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config.pop("torch_dtype") == "float32"
  expected = {**stored.config, "dtype": "float32"}
  assert config == expected


def test_shards_are_written_with_their_index(tmp_path):
  stored = golden("gpt2")
  (tmp_path / "tokenizer.json").write_text("{}")
  folder = decoders.write(
    tmp_path / "out",
    stored.params,
    stored.net,
    shard_bytes=9000,
    beside=[tmp_path / "tokenizer.json"],
  )
  tensors, files = loaded(folder)
  assert len(files) > 3
  assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
  index = json.loads((folder / "model.safetensors.index.json").read_text())
  size = sum(t.nbytes for t in stored.tensors.values())
  assert index["metadata"]["total_size"] == size
  assert set(index["weight_map"]) == set(tensors) == set(stored.tensors)
  for name, file in index["weight_map"].items():
    assert name in load_file(folder / file)
  for file in files:
    held = sum(t.nbytes for t in load_file(folder / file).values())
    assert held <= 9000 or len(load_file(folder / file)) == 1
  assert (folder / "tokenizer.json").read_text() == "{}"
  _, again = decoders.read(folder)
  jax.tree.map(np.testing.assert_array_equal, again, stored.params)


def test_dtypes_in_and_out(tmp_path):
  stored = golden("qwen2")
  half = {k: v.astype(ml_dtypes.bfloat16) for k, v in stored.tensors.items()}
  _, params = decoders.read(save(tmp_path / "half", stored.config, half))
  assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
  _, wide = decoders.read(tmp_path / "half", dtype=jnp.float32)
  up = np.asarray(wide["layers"]["up"]["kernel"])
  theirs = half["model.layers.1.mlp.up_proj.weight"].astype(np.float32)
  np.testing.assert_array_equal(up[1], theirs.T)
  decoders.write(tmp_path / "out", wide, stored.net, dtype=np.float16)
  tensors, _ = loaded(tmp_path / "out")
  assert {str(t.dtype) for t in tensors.values()} == {"float16"}
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["dtype"] == config["torch_dtype"] == "float16"


@pytest.mark.parametrize("name", ["gpt2", "llama_3"])
def test_sharded_arrays_get_their_parts(name, tmp_path, monkeypatch):
  stored = golden(name)
  folder = save(tmp_path / "model", stored.config, stored.tensors)
  mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
  specs = jax.tree.map(lambda x: P(), stored.params)
  specs["layers"]["query"]["kernel"] = P(None, "data", "model")
  specs["layers"]["output"]["kernel"] = P(None, "model")
  specs["embed"]["kernel"] = P(None, "model")
  layout = jax.tree.map(
    lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P)
  )
  each = Mesh(np.array(jax.devices()[:3]), ("layer",))
  layout["layers"]["down"]["kernel"] = NamedSharding(each, P("layer"))
  read, opened = [], decoders.open_tensors

  def watched(*arguments):
    tensors = opened(*arguments)

    def part(name, index):
      found = tensors.load_part(name, index)
      read.append((name, found.size / np.prod(tensors.shapes[name])))
      return found

    return tensors._replace(load_part=part, load=None)

  monkeypatch.setattr(decoders, "open_tensors", watched)
  _, params = decoders.read(folder, shardings=layout)
  jax.tree.map(np.testing.assert_array_equal, params, stored.params)
  query = params["layers"]["query"]["kernel"]
  assert query.sharding == layout["layers"]["query"]["kernel"]
  # No more of a tensor than the part is ever on the host.
  held = decoders.places(stored.net)["layers/query/kernel"]
  share = 1 / 8 if held.third is None else 1 / 24
  shares = {s for n, s in read if n == held.name.format(1) and s < 0.3}
  assert min(shares) == pytest.approx(share)
  decoders.write(tmp_path / "out", params, stored.net)
  tensors, _ = loaded(tmp_path / "out")
  for key, tensor in stored.tensors.items():
    np.testing.assert_array_equal(tensors[key], tensor, key)


def test_wide_arrays_come_back_whole(tmp_path):
  """They are turned in blocks of 128."""
  sizes = dict(hidden_size=8, intermediate_size=300, vocab_size=270)
  net = architecture({**golden("llama").config, **sizes, "head_dim": 2})
  rng = np.random.default_rng(0)
  params = nested({k: rng.normal(size=s) for k, s in shapes(net).items()})
  decoders.write(tmp_path / "out", params, net, dtype=np.float32)
  _, again = decoders.read(tmp_path / "out")
  same = lambda x, y: np.testing.assert_array_equal(x, y.astype(np.float32))  # noqa: E731
  jax.tree.map(same, again, params)


def test_names_that_vary_are_read(tmp_path):
  """Without a head's prefix, with old buffers, with the tied head's copy."""
  stored = golden("gpt2")
  tensors = {
    k.removeprefix("transformer."): v for k, v in stored.tensors.items()
  }
  tensors["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
  tensors["lm_head.weight"] = tensors["wte.weight"]
  _, params = decoders.read(save(tmp_path / "a", stored.config, tensors))
  jax.tree.map(np.testing.assert_array_equal, params, stored.params)
  tensors["lm_head.weight"] = tensors["wte.weight"] + 1
  with pytest.raises(
    UserError, match=r"another lm_head\.weight than wte\.weight"
  ):
    decoders.read(save(tmp_path / "b", stored.config, tensors))


def test_all_that_does_not_fit_is_told_at_once(tmp_path):
  stored = golden("llama")
  tensors = dict(stored.tensors)
  first = "model.layers.{}.mlp.up_proj.weight"
  tensors.pop(first.format(0))
  tensors["model.layers.3.extra"] = np.zeros(2, np.float32)
  tensors[first.format(1)] = np.zeros((24, 37), np.float32)
  tensors[first.format(2)] = np.zeros((37, 24), np.int8)
  with pytest.raises(UserError) as caught:
    decoders.read(save(tmp_path / "model", stored.config, tensors))
  message = str(caught.value)
  assert "\n" not in message
  for part in (
    f"1 missing: {first.format(0)};",
    "1 surplus: model.layers.3.extra;",
    f"1 misshaped: {first.format(1)} [24, 37] for [37, 24];",
    f"1 neither F32 nor F16 nor BF16: {first.format(2)} I8",
  ):
    assert part in message


def truncate(folder):
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-10])


def mislabel(folder):
  """The header claims another dtype than there are bytes for."""
  file = folder / "model.safetensors"
  content = file.read_bytes()
  assert b'"F32"' in content
  file.write_bytes(content.replace(b'"F32"', b'"F16"', 1))


def lose_shard(folder):
  tensors = load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
  save_file(tensors, folder / names[0])
  index = {"weight_map": dict.fromkeys(tensors, names[0]) | {"x": names[1]}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickle_it(folder):
  (folder / "model.safetensors").unlink()
  (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


DAMAGE = {
  truncate: "is truncated or no safetensors file",
  mislabel: "is truncated or no safetensors file",
  lose_shard: r"model-00002-of-00002.safetensors is missing: .* names it",
  pickle_it: "a pickle may run any code",
  lambda folder: (folder / "config.json").unlink(): "has no config.json",
  lambda folder: (folder / "config.json").write_text("{"): "is no JSON",
  lambda folder: (folder / "config.json").write_text(
    '{"model_type": "bert"}'
  ): "unknown model_type in config.json 'bert'",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_one_line(damage, tmp_path):
  stored = golden("gemma3")
  folder = save(tmp_path / "model", stored.config, stored.tensors)
  damage(folder)
  with pytest.raises(UserError, match=DAMAGE[damage]) as caught:
    decoders.read(folder)
  assert "\n" not in str(caught.value)


def test_nothing_half_written(tmp_path, monkeypatch):
  stored = golden("gpt2")
  write = lambda **more: decoders.write(  # noqa: E731
    tmp_path / "out", **{"params": stored.params, "net": stored.net, **more}
  )
  with pytest.raises(FileNotFoundError):
    write(beside=[tmp_path / "nothing"])
  assert list(tmp_path.iterdir()) == []
  with pytest.raises(UserError, match=r"1 missing: norm/scale"):
    write(params={**stored.params, "norm": {"bias": jnp.zeros(24)}})
  wider = architecture({**stored.config, "n_inner": 97})
  with pytest.raises(UserError, match=r"3 misshaped: layers/up/kernel \[3,"):
    write(net=wider)
  assert list(tmp_path.iterdir()) == []
  write()
  with pytest.raises(UserError, match="out is there: name a new folder"):
    write()


def test_shardings_of_another_tree_are_refused(tmp_path):
  stored = golden("gpt2")
  folder = save(tmp_path / "model", stored.config, stored.tensors)
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  layout = jax.tree.map(lambda _: one, stored.params)
  del layout["embed"]
  with pytest.raises(UserError, match=r"shardings differ .* in embed/kernel"):
    decoders.read(folder, shardings=layout)
