"""Networks of torchvision, timm and the model hub beside ours, run here."""

import json

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402
from tiny_networks import NETWORKS  # noqa: E402
from torch_models import CASES, hub, run  # noqa: E402

from kdjax import pretrained  # noqa: E402


def assert_close(ours, theirs, what):
  """Within 1e-5 of the array's scale, float32 on both sides."""
  assert ours.shape == theirs.shape, what
  scale = np.abs(theirs).max()
  error = np.abs(np.asarray(ours) - theirs).max() / scale
  assert error < 1e-5, f"{what}: {error:.1e} of its scale {scale:.1e}"


def case_of(name):
  case = CASES[name]
  if not case.available:
    pytest.skip("the library is not here")
  return case, NETWORKS[case.network]


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_computes_what_they_compute(name, tmp_path):
  case, network = case_of(name)
  theirs = run(case, network.batch["image"])
  if case.layout == "hub":
    theirs.module.save_pretrained(tmp_path)
  else:
    tensors = theirs.module.state_dict()
    save_file(tensors, tmp_path / "model.safetensors")
  variables = pretrained.read(
    tmp_path,
    network.shapes,
    family=network.family,
    arguments=network.arguments,
    layout="timm" if case.layout == "timm" else None,
  )
  taps = tuple(case.taps)
  apply = jax.jit(
    lambda v, b: network.model.apply(*v, b, train=False, taps=taps)[0]
  )
  ours = apply(variables, network.batch)
  for tap in taps:
    assert_close(ours.taps[tap], theirs.taps[tap], tap)
  assert_close(ours.logits, theirs.logits, "logits")


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_they_load_and_compute_the_same(name, tmp_path):
  case, network = case_of(name)
  model, batch = network.model, network.batch
  variables = drawn_variables(network)
  pretrained.write(
    tmp_path,
    variables,
    family=network.family,
    layout=case.layout,
    arguments=network.arguments,
  )
  if case.layout == "hub":
    loaded, told = load_hub(tmp_path, case)
    assert not any(told.values()), told
  else:
    from safetensors.torch import load_file

    loaded = case.build()
    loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))
  with torch.no_grad():
    image = torch.tensor(batch["image"].transpose(0, 3, 1, 2))
    theirs = loaded.eval()(image)
  theirs = theirs if torch.is_tensor(theirs) else theirs.logits
  apply = jax.jit(lambda v, b: model.apply(*v, b, train=False)[0].logits)
  assert_close(apply(variables, batch), theirs.numpy(), "logits")


def drawn_variables(network):
  """Ours, drawn so that activations stay near 1."""
  rng = np.random.default_rng(3)

  def one(path, x):
    if path[-1].key in ("scale", "var"):
      return rng.uniform(0.5, 1.5, x.shape).astype("f")
    high = (4 / np.prod(x.shape[:-1])) ** 0.5 if x.ndim > 1 else 0.3
    return rng.uniform(-high, high, x.shape).astype("f")

  return jax.tree_util.tree_map_with_path(one, network.shapes)


def load_hub(folder, case):
  """The network that the hub builds from the folder, and what was amiss."""
  config = json.loads((folder / "config.json").read_text())
  (kind,) = config["architectures"]
  assert kind == type(case.build()).__name__
  loaded, told = hub.AutoModelForImageClassification.from_pretrained(
    folder, output_loading_info=True
  )
  assert type(loaded).__name__ == kind
  return loaded, told


@pytest.mark.parametrize("name", ["hub vit", "hub deit", "hub deit, one head"])
def test_names_in_the_hubs_memory_are_read_too(name, tmp_path):
  case, network = case_of(name)
  theirs = run(case, network.batch["image"])
  save_file(theirs.module.state_dict(), tmp_path / "a.safetensors")
  params, stats = pretrained.read(
    tmp_path / "a.safetensors", network.shapes, family="vit"
  )
  ours, _ = network.model.apply(params, stats, network.batch, train=False)
  assert_close(ours.logits, theirs.logits, "logits")
