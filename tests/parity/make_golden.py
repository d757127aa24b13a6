"""Writes tests/data/pretrained_*.npz: what PyTorch's networks compute.

    cd tests/parity && PYTHONPATH=.. python make_golden.py

Each file has the names and shapes of a network's tensors, its config.json where
it has one, and its logits for the weights that `tiny_networks.draw` draws.
"""

import json
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tiny_networks import NETWORKS, draw
from torch_models import CASES

DATA = Path(__file__).parents[1] / "data"
# Their networks are large, and their layouts those of smaller ones.
LEFT_OUT = ("torchvision resnet", "timm resnet", "timm mobilenet_v3, large")


def from_files(module):
  """Names as the hub's files have them: transformers changes them in memory."""
  with tempfile.TemporaryDirectory() as folder:
    module.save_pretrained(folder)
    path = Path(folder) / "model.safetensors"
    tensors = draw({k: v.shape for k, v in load_file(path).items()})
    save_file(tensors, path, {"format": "pt"})
    config = (Path(folder) / "config.json").read_text()
    return type(module).from_pretrained(folder), tensors, config


def from_state(module):
  state = module.state_dict()
  tensors = draw({k: tuple(v.shape) for k, v in state.items()})
  module.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()})
  return module, tensors, "{}"


def main():
  for name, case in CASES.items():
    if name in LEFT_OUT:
      continue
    prepare = from_files if case.layout == "hub" else from_state
    module, tensors, config = prepare(case.build())
    image = NETWORKS[case.network].batch["image"].transpose(0, 3, 1, 2)
    with torch.no_grad():
      output = module.eval()(torch.tensor(image))
    logits = output if torch.is_tensor(output) else output.logits
    slug = re.sub(r"\W+", "_", name)
    np.savez_compressed(
      DATA / f"pretrained_{slug}.npz",
      network=case.network,
      layout=case.layout,
      shapes=json.dumps({k: v.shape for k, v in sorted(tensors.items())}),
      config=config,
      logits=logits.numpy(),
    )


if __name__ == "__main__":
  main()
