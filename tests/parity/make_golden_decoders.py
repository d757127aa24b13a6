"""Writes tests/data/decoder_*.npz: what transformers' decoders compute.

    cd tests/parity && PYTHONPATH=.. python make_golden_decoders.py

Each file has the names and shapes of a network's tensors, its config.json, a
batch of tokens, its logits and hidden states for the weights that
`tiny_networks.draw` draws, and the tokens that follow greedily.
"""

from pathlib import Path

import numpy as np
from hub_decoders import CASES, golden

DATA = Path(__file__).parents[1] / "data"

for name in CASES:
  np.savez_compressed(DATA / f"decoder_{name}.npz", **golden(name))
