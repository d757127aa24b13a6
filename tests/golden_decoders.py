"""The decoders that `parity/make_golden_decoders.py` ran in transformers."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file
from tiny_networks import draw

from kdjax.models.decoder import Architecture
from kdjax.pretrained import decoders

DATA = Path(__file__).parent / "data"
NAMES = sorted(p.stem.removeprefix("decoder_") for p in DATA.glob("decoder_*"))


class Golden(NamedTuple):
  """A network read from a folder as transformers saves it, and its outputs."""

  net: Architecture
  params: Any
  config: dict[str, Any]
  tensors: dict[str, np.ndarray]
  tokens: np.ndarray
  logits: np.ndarray
  greedy: np.ndarray
  taps: dict[str, np.ndarray]


@functools.cache
def golden(name):
  with np.load(DATA / f"decoder_{name}.npz") as file:
    stored = dict(file)
  config = json.loads(str(stored["config"]))
  tensors = draw(json.loads(str(stored["shapes"])))
  with tempfile.TemporaryDirectory() as folder:
    net, params = decoders.read(save(folder, config, tensors))
  taps = {k[4:]: v for k, v in stored.items() if k.startswith("tap_")}
  arrays = (stored[k] for k in ("tokens", "logits", "greedy"))
  return Golden(net, params, config, tensors, *arrays, taps)


def save(folder, config, tensors):
  """A checkpoint's folder."""
  folder = Path(folder)
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  save_file(tensors, folder / "model.safetensors", {"format": "pt"})
  return folder


def assert_close(ours, theirs, what="", relative=5e-6):
  """Within 5e-6 of the array's scale.

  Three layers of float32 sums on both sides: single numbers near 0 carry the
  error of the large ones they came from, so no relative tolerance fits them.
  """
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape, what
  error = np.abs(ours - theirs).max() / np.abs(theirs).max()
  assert error < relative, f"{what}: {error:.1e} of the scale"
