"""Pretrained weights in and out, by safetensors: `read` and `write`.

`layouts` lists what a family can be read from; `is_weights` tells a name for
`read` from that of a run's folder.
"""

from kdjax.pretrained.files import is_weights
from kdjax.pretrained.weights import layouts, read, write

__all__ = ["is_weights", "layouts", "read", "write"]
