"""What a language model writes after the prompts of a config."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kdjax.config as configuration
from kdjax import parallel
from kdjax.generate import generate
from kdjax.types import Params


def written(
  config: Any, made: configuration.Decoders, side: str, params: Params
) -> list[list[str]]:
  """[prompt, what the network writes after it] of each prompt."""
  c, reads = config.sample, made.reads[side]
  found = []
  for n, prompt in enumerate(c.prompts):
    (encoded,) = reads.encode([prompt])
    ids = np.concatenate([reads.prefix, encoded.ids]).astype(int)
    more = generate(
      made.nets[side],
      params,
      jnp.asarray(ids)[None],
      max_new_tokens=c.max_new_tokens,
      key=jax.random.key(n) if c.temperature else None,
      sampling_temperature=c.temperature or 1.0,
      top_p=c.top_p,
      stop_tokens=() if reads.eos is None else (reads.eos,),
      pad_token=reads.pad,
      num_classes=made.num_classes[side],
      dtype=configuration.dtype(config[side].dtype),
    )
    tokens = parallel.on_host(more.tokens)[0][: int(more.lengths[0])]
    found.append([prompt, reads.decode(tokens.tolist())])
  return found
