"""Pretrained weights in and out, by safetensors: `read` and `write`.

`layouts` lists what a family can be read from; `is_weights` tells a name for
`read` from that of a run's folder, and `local` gives the path of what a name
means. Language models are in `decoders`.
"""

from kdjax.pretrained.files import is_weights, local
from kdjax.pretrained.weights import layouts, read, write

__all__ = ["is_weights", "layouts", "local", "read", "write"]
