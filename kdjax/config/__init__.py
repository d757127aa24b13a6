"""A config file's values -> the objects that `distill` takes.

Every key must be there and no other: nothing happens by a default that the
config does not show. What an open mapping (`...`) holds is checked against the
function that it names.
"""

from kdjax.config.arguments import arguments
from kdjax.config.decoders import (
  Decoders,
  blank_decoders,
  by_spans,
  causal_lm,
  decoder_params,
  decoders_of,
)
from kdjax.config.goal import goal
from kdjax.config.inputs import augment, eval_transform, mixup
from kdjax.config.keys import KEYS, check_keys
from kdjax.config.network import dtype, loaded, model, partition
from kdjax.config.optimizers import Optimizer, optimizer
from kdjax.config.students import (
  adapter_scale,
  adapters,
  inherited,
  inherited_sizes,
)
from kdjax.config.texts import documents, token_folder
from kdjax.config.values import flat

__all__ = [
  "KEYS",
  "Decoders",
  "Optimizer",
  "adapter_scale",
  "adapters",
  "arguments",
  "augment",
  "blank_decoders",
  "by_spans",
  "causal_lm",
  "check_keys",
  "decoder_params",
  "decoders_of",
  "documents",
  "dtype",
  "eval_transform",
  "flat",
  "goal",
  "inherited",
  "inherited_sizes",
  "loaded",
  "mixup",
  "model",
  "optimizer",
  "partition",
  "token_folder",
]
