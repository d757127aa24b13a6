"""What PyTorch's networks computed, as `parity/make_golden.py` stored it.

The weights are drawn again by name; the logits are PyTorch's.
"""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_networks import NETWORKS, draw

from kdjax import pretrained

FILES = sorted((Path(__file__).parents[1] / "data").glob("pretrained_*.npz"))
ids = [path.stem.removeprefix("pretrained_") for path in FILES]


class Golden:
  def __init__(self, path, folder):
    with np.load(path) as stored:
      self.network = NETWORKS[str(stored["network"])]
      self.name, self.layout = str(stored["network"]), str(stored["layout"])
      self.config = json.loads(str(stored["config"]))
      self.tensors = draw(json.loads(str(stored["shapes"])))
      self.logits = stored["logits"]
    self.folder = folder
    save_file(self.tensors, folder / "model.safetensors")
    if self.config:
      (folder / "config.json").write_text(json.dumps(self.config))

  def read(self, **more):
    network = self.network
    return pretrained.read(
      self.folder,
      network.shapes,
      family=network.family,
      arguments=network.arguments,
      **more,
    )

  def write(self, folder, variables, **more):
    return pretrained.write(
      folder,
      variables,
      family=self.network.family,
      layout=self.layout,
      arguments=self.network.arguments,
      **more,
    )


@functools.cache
def compiled(name):
  apply = NETWORKS[name].model.apply
  return jax.jit(lambda v, batch: apply(*v, batch, train=False)[0].logits)


@pytest.fixture(params=FILES, ids=ids)
def golden(request, tmp_path):
  return Golden(request.param, tmp_path)


def test_the_logits_are_those_of_pytorch(golden):
  logits = compiled(golden.name)(golden.read(), golden.network.batch)
  scale = np.abs(golden.logits).max()
  # Float32 sums in another order, layer after layer.
  np.testing.assert_allclose(logits, golden.logits, rtol=0, atol=1e-5 * scale)


def test_what_was_read_is_written_bit_for_bit(golden, tmp_path):
  path = golden.write(tmp_path / "out", golden.read())
  written = load_file(path)
  assert set(written) == set(golden.tensors)
  for name, tensor in golden.tensors.items():
    np.testing.assert_array_equal(written[name], tensor, err_msg=name)


def test_the_config_is_the_one_that_transformers_wrote(golden, tmp_path):
  golden.write(tmp_path / "out", golden.read(), extra_config={"extra": 1})
  path = tmp_path / "out" / "config.json"
  assert path.exists() == bool(golden.config)
  if golden.config:
    ours = json.loads(path.read_text())
    assert ours.pop("extra") == 1
    assert ours.pop("architectures") == golden.config["architectures"]
    missing = {k: v for k, v in ours.items() if golden.config.get(k) != v}
    assert not missing
