"""A config file's values -> the objects that `distill` takes.

Every key must be there and no other: nothing happens by a default that the
config does not show. What an open mapping (`...`) holds is checked against the
function that it names.
"""

from kdjax.config.goal import goal
from kdjax.config.inputs import augment, eval_transform, mixup
from kdjax.config.keys import KEYS, check_keys
from kdjax.config.network import dtype, loaded, model
from kdjax.config.optimizers import Optimizer, optimizer
from kdjax.config.texts import (
  Decoders,
  by_spans,
  causal_lm,
  decoder_params,
  decoders_of,
  documents,
  token_folder,
)

__all__ = [
  "KEYS",
  "Decoders",
  "Optimizer",
  "augment",
  "by_spans",
  "causal_lm",
  "check_keys",
  "decoder_params",
  "decoders_of",
  "documents",
  "dtype",
  "eval_transform",
  "goal",
  "loaded",
  "mixup",
  "model",
  "optimizer",
  "token_folder",
]
