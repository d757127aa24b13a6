"""Layouts, shards and every mistake that reading and writing tell."""

import dataclasses
import json
import re
import weakref

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_networks import CLASSES, NETWORKS, Network

from kdjax import models, pretrained
from kdjax.errors import UserError
from kdjax.pretrained import weights

VIT = NETWORKS["vit_timm"]
RESNET = NETWORKS["resnet_basic"]


def variables(network=VIT):
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype("f"), network.shapes
  )


def written(folder, network=VIT, layout="timm", **more):
  more = {"arguments": network.arguments, **more}
  return pretrained.write(
    folder, variables(network), family=network.family, layout=layout, **more
  )


def read(path, network=VIT, like=None, **more):
  more = {"family": network.family, "arguments": network.arguments, **more}
  return pretrained.read(path, like or network.shapes, **more)


def edit(path, change):
  """The file again, after `change` has had its tensors."""
  tensors = load_file(path)
  change(tensors)
  save_file(tensors, path)


def edit_json(path, **more):
  path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


def assert_equal(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def message(function, *arguments, **more):
  """What a mistake is told as: one line."""
  with pytest.raises(UserError) as caught:
    function(*arguments, **more)
  assert "\n" not in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize(
  ("network", "layout"),
  [
    (name, layout)
    for name in ("vit_timm", "deit_timm", "resnet_basic")
    for layout in pretrained.layouts(NETWORKS[name].family)
    if (name, layout) != ("deit_timm", "torchvision")
  ],
)
def test_each_layout_is_found_by_its_names(network, layout, tmp_path):
  network = NETWORKS[network]
  path = written(tmp_path, network, layout)
  assert_equal(read(path, network), variables(network))
  assert_equal(read(tmp_path, network, layout=layout), variables(network))


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_every_network_has_the_layout_of_its_own_names(name):
  assert pretrained.layouts(name)[-1] == "kdjax"


def test_a_cifar_network_is_written_by_its_own_paths(tmp_path):
  network = Network(
    "resnet_cifar", models.resnet_cifar, (8, 8), {"depth": 8, "width": 3}
  )
  path = written(tmp_path, network, "kdjax")
  assert "stages.1.0.layers.0.conv.kernel" in load_file(path)
  assert_equal(read(path, network), variables(network))
  assert_equal(read(path, network, family=""), variables(network))


def test_what_is_written_can_be_read_by_all_who_read_other_files(tmp_path):
  other = tmp_path / "other"
  other.touch()
  assert written(tmp_path).stat().st_mode == other.stat().st_mode


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_is_read_into_the_dtype_of_like(dtype, tmp_path):
  path = written(tmp_path)
  edit(path, lambda t: t.update({k: v.astype(dtype) for k, v in t.items()}))
  params, _ = read(path)
  rounded = jax.tree.map(lambda x: x.astype(dtype).astype("f"), variables()[0])
  assert_equal(params, rounded)
  assert params["positions"].dtype == jnp.float32
  half = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), VIT.shapes
  )
  assert read(path, like=half)[0]["positions"].dtype == jnp.bfloat16


def test_dtypes_are_written_as_they_are(tmp_path):
  stored = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), variables())
  path = pretrained.write(tmp_path, stored, family="vit", layout="timm")
  assert {x.dtype for x in load_file(path).values()} == {
    np.dtype(ml_dtypes.bfloat16)
  }


def sharded(folder, tensors):
  names = sorted(tensors)
  files = {}
  for n, part in enumerate((names[::2], names[1::2])):
    file = f"model-{n}.safetensors"
    save_file({name: tensors[name] for name in part}, folder / file)
    files |= dict.fromkeys(part, file)
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": files}))
  return index


@pytest.fixture
def shards(tmp_path):
  path = written(tmp_path)
  sharded(tmp_path, load_file(path))
  path.unlink()
  return tmp_path


def test_shards_are_read_one_tensor_at_a_time(shards, monkeypatch):
  before = []

  def opened(*arguments):
    tensors = weights_open(*arguments)

    def load(name):
      assert all(array() is None for array in before), name
      array = tensors.load(name)
      before.append(weakref.ref(array))
      return array

    return tensors._replace(load=load)

  weights_open = weights.open_tensors
  monkeypatch.setattr(weights, "open_tensors", opened)
  assert_equal(read(shards), variables())
  assert len(before) > 30


def test_a_missing_shard_is_named(shards):
  (shards / "model-1.safetensors").unlink()
  assert "model-1.safetensors is missing" in message(read, shards)


def test_an_index_that_promises_more_is_refused(shards):
  index = shards / "model.safetensors.index.json"
  files = json.loads(index.read_text())["weight_map"]
  edit_json(index, weight_map={**files, "new": "model-0.safetensors"})
  assert "names new, which no shard has" in message(read, shards)
  edit_json(index, weight_map={"a": "../other.safetensors"})
  assert "needs files of its own folder" in message(read, shards)
  index.write_text("{}")
  assert "has no weight_map" in message(read, shards)
  index.write_text("{")
  assert "is no JSON" in message(read, shards)


def test_all_that_does_not_fit_is_told_at_once(tmp_path):
  path = written(tmp_path)

  def change(tensors):
    del tensors["cls_token"], tensors["blocks.1.norm1.bias"]
    tensors["blocks.0.ls1.gamma"] = np.zeros(3, "f")
    tensors["bn.num_batches_tracked"] = np.zeros((), np.int64)
    tensors["blocks.0.mlp.fc1.weight"] = np.zeros((12, 20), "f")
    tensors["norm.bias"] = np.zeros(12, np.int32)
    tensors["head.weight"] = np.zeros((9, 12), "f")
    tensors["head.bias"] = np.zeros(9, "f")

  edit(path, change)
  told = message(read, path, arguments={})  # epsilon alone is the constructor's
  assert "layout timm" in told
  assert "2 missing: blocks.1.norm1.bias, cls_token" in told
  assert "1 surplus: blocks.0.ls1.gamma;" in told
  assert "1 misshaped: blocks.0.mlp.fc1.weight [12, 20] for [20, 12]" in told
  assert "1 neither F32 nor F16 nor BF16: norm.bias I32" in told
  assert f"it has 9 classes, the network {CLASSES}" in told
  assert "num_batches_tracked" not in told


def test_another_number_of_classes_offers_both_ways_out(tmp_path):
  path = written(tmp_path)
  edit(path, lambda t: t.update({"head.bias": np.zeros(9, "f")}))
  edit(path, lambda t: t.update({"head.weight": np.zeros((9, 12), "f")}))
  told = message(read, path)
  assert "--config.student.num_classes=9" in told
  assert "--config.teacher.num_classes=9" in told
  assert "drop_head=True" in told
  assert "misshaped" not in told


@pytest.mark.parametrize("layout", ["timm", "kdjax"])
def test_a_dropped_head_keeps_the_values_given(layout, tmp_path):
  other = dataclasses.replace(
    VIT, arguments={**VIT.arguments, "num_classes": 9}
  )
  path = written(tmp_path, other, layout)
  like = jax.tree.map(jnp.ones_like, variables())
  params, _ = read(path, like=like, drop_head=True)
  want = variables(other)[0]
  want["classifier"] = like[0]["classifier"]
  assert_equal(params, want)
  told = message(read, path)
  assert f"9 classes, the network {CLASSES}" in told
  assert "misshaped" not in told


def test_a_dropped_head_needs_values(tmp_path):
  path = written(tmp_path)
  told = message(read, path, drop_head=True)
  assert "give the variables of init" in told


def test_without_its_head_a_file_fits_when_the_head_is_dropped(tmp_path):
  path = written(tmp_path)
  edit(path, lambda t: [t.pop("head.weight"), t.pop("head.bias")])
  assert "2 missing: head.bias, head.weight" in message(read, path)
  assert_equal(read(path, like=variables(), drop_head=True), variables())


@pytest.mark.parametrize(
  ("name", "start"),
  [
    ("a.bin", b""),
    ("a.pt", b""),
    ("a.pth", b""),
    ("a.safetensors", b"PK\x03\x04"),
    ("a.safetensors", b"\x80\x02\x8a"),
  ],
)
def test_a_pickle_is_never_read(name, start, tmp_path):
  path = tmp_path / name
  path.write_bytes(start + bytes(100))
  assert "no safetensors file; a pickle may run" in message(read, path)


def test_a_folder_without_safetensors_tells_what_it_has(tmp_path):
  assert "only nothing" in message(read, tmp_path)
  (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
  told = message(read, tmp_path)
  assert "only pytorch_model.bin; a pickle may run" in told


@pytest.mark.parametrize("keep", [0, 5, -1])
def test_a_truncated_file_is_told(keep, tmp_path):
  path = written(tmp_path)
  path.write_bytes(path.read_bytes()[:keep])
  told = message(read, path)
  assert str(path) in told
  assert "truncated or no safetensors file" in told


def test_a_file_of_another_network_shows_what_it_has(tmp_path):
  path = tmp_path / "a.safetensors"
  save_file({"wte.weight": np.zeros((2, 2), "f")}, path)
  told = message(read, path)
  assert "no name of a vit" in told
  assert "wte.weight" in told


def test_unknown_families_and_layouts_offer_the_nearest(tmp_path):
  path = written(tmp_path)
  assert "did you mean 'vit'" in message(read, path, family="vitt")
  assert "did you mean 'timm'" in message(read, path, layout="tim")
  told = message(written, tmp_path, NETWORKS["deit_timm"], "torchvision")
  assert "no name for distillation_classifier" in told


def test_a_runs_folder_is_no_weights(tmp_path):
  (tmp_path / "run" / "checkpoints").mkdir(parents=True)
  (tmp_path / "run" / "config.json").write_text("{}")
  (tmp_path / "pickled").mkdir()
  (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"PK")
  path = written(tmp_path / "weights")
  sharded(tmp_path, load_file(path))
  for name in (path, path.parent, tmp_path, tmp_path / "pickled"):
    assert pretrained.is_weights(name), name
  for name in ("owner/name", "typo.safetensors", "/no/such/model.pth"):
    assert pretrained.is_weights(name), name
  for name in (tmp_path / "run", "/no/such/folder", "folder", "a/b/c"):
    assert not pretrained.is_weights(name), name


def test_a_name_on_the_hub_is_downloaded_once(tmp_path, monkeypatch):
  written(tmp_path)
  asked = []

  def download(name, *, revision, allow_patterns):
    asked.append((name, revision, allow_patterns))
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  assert_equal(read("owner/name", revision="v1"), variables())
  ((name, revision, patterns),) = asked
  assert (name, revision) == ("owner/name", "v1")
  kinds = (".safetensors", ".json", ".jinja")  # no pickle, no code
  assert all(p.endswith(kinds) for p in patterns)


def test_without_a_connection_it_says_what_was_tried(monkeypatch):
  def download(name, **_):
    raise ConnectionError("no route\nto host")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  told = message(read, "owner/name", revision="v1")
  assert "owner/name is no file or folder here" in told
  assert "snapshot_download('owner/name', revision='v1')" in told
  assert "(no route): mend the name" in told
  for path in ("/no/such/folder", "typo.safetensors", "typo.pth"):
    assert f"{path} does not exist" in message(read, path)


@pytest.mark.parametrize(
  ("network", "change", "told"),
  [
    ("vit", {"layer_norm_eps": 1e-12}, "layer_norm_eps is 1e-12 in config"),
    ("vit", {"num_attention_heads": 4}, "num_attention_heads is 4 in config"),
    ("vit", {"hidden_act": "relu"}, "hidden_act is relu in config"),
    ("vit", {"qkv_bias": False}, "qkv_bias is False in config"),
    ("vit", {"image_size": [12, 8]}, "image_size is [12, 8] in config"),
    ("vit", {"patch_size": 8}, "patch_size is 8 in config"),
    ("vit", {"model_type": "deit"}, "model_type is deit in config"),
    (
      "resnet_bottleneck",
      {"downsample_in_bottleneck": True},
      "downsample_in_bottleneck is True in config.json, False in the network",
    ),
    ("resnet_bottleneck", {"layer_type": "basic"}, "layer_type is basic in"),
    ("resnet_bottleneck", {"depths": [2, 2]}, "depths is [2, 2] in"),
    ("resnet_bottleneck", {"hidden_act": "gelu"}, "hidden_act is gelu in"),
    (
      "mobilenet_v2",
      {"tf_padding": True},
      "tf_padding is True in config.json, False in the network (its argument "
      'padding="same")',
    ),
    (
      "mobilenet_v2_tensorflow",
      {"tf_padding": False},
      "tf_padding is False in config.json, True in the network",
    ),
    ("mobilenet_v2", {"output_stride": 16}, "output_stride is 16 in config"),
  ],
)
def test_a_config_that_computes_otherwise_is_refused(
  network, change, told, tmp_path
):
  network = NETWORKS[network]
  written(tmp_path, network, "hub")
  edit_json(tmp_path / "config.json", **change)
  assert told in message(read, tmp_path, network)


def test_a_config_is_taken_with_the_defaults_of_transformers(tmp_path):
  network = NETWORKS["vit"]  # its epsilon is 1e-3
  written(tmp_path, network, "hub")
  config = {"model_type": "vit"}
  (tmp_path / "config.json").write_text(json.dumps(config))
  told = message(read, tmp_path, network)
  assert "layer_norm_eps is 1e-12 in config.json, 0.001 in the network" in told
  assert "its argument epsilon" in told
  assert "num_attention_heads is 12" in told
  assert "hidden_act" not in told


def test_an_epsilon_that_nobody_named_must_be_the_layouts(tmp_path):
  mobile = NETWORKS["mobilenet_v3"]
  path = written(tmp_path / "mobile", mobile)
  told = message(read, path, mobile, arguments={"size": "small"})
  assert "epsilon is 1e-05 in weights of timm, 0.001 in the network" in told
  path = written(tmp_path)
  read(path, arguments={**VIT.arguments, "epsilon": 1e-6})
  read(path, arguments={**VIT.arguments, "epsilon": 1e-3})  # named
  (tmp_path / "config.json").write_text('{"architecture": "tf_vit"}')
  told = message(read, path, arguments={**VIT.arguments, "epsilon": 1e-6})
  assert "epsilon is 0.001 in weights of timm, 1e-06 in the network" in told


def test_the_network_decides_its_config(tmp_path):
  told = message(written, tmp_path, RESNET, "hub", extra_config={"depths": [9]})
  assert "extra_config has depths" in told


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
  path = written(tmp_path)
  before = path.read_bytes()

  def fail(tensors, file, metadata):
    file.write_bytes(b"half")
    raise OSError("disk full")

  monkeypatch.setattr("safetensors.numpy.save_file", fail)
  with pytest.raises(OSError, match="disk full"):
    written(tmp_path)
  assert path.read_bytes() == before
  assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_heads_that_no_shape_tells_are_asked_for(tmp_path):
  told = message(written, tmp_path, VIT, "hub", arguments={})
  assert re.search("width 12 may have any number of heads", told)
