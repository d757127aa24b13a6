"""Causal language models of the families that the model hub is full of.

`decoder` makes a `Model` of a checkpoint's config.json; `architecture` reads
it. Everything is a pure function of a tree of arrays.
"""

from kdjax.models.decoder.architecture import Architecture, architecture
from kdjax.models.decoder.cost import flops_per_token
from kdjax.models.decoder.network import decoder
from kdjax.models.decoder.partition import PARTITION

__all__ = [
  "PARTITION",
  "Architecture",
  "architecture",
  "decoder",
  "flops_per_token",
]
