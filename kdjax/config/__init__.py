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
  causal_lm,
  checkpoint_folder,
  decoder_params,
  documents,
  net,
  token_folder,
  tokenizer,
)

__all__ = [
  "KEYS",
  "Optimizer",
  "augment",
  "causal_lm",
  "check_keys",
  "checkpoint_folder",
  "decoder_params",
  "documents",
  "dtype",
  "eval_transform",
  "goal",
  "loaded",
  "mixup",
  "model",
  "net",
  "optimizer",
  "token_folder",
  "tokenizer",
]
