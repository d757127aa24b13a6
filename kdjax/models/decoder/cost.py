"""What a decoder's forward pass costs, counted by hand.

XLA counts the body of a scan once, whatever its trip count.
"""

import math

from kdjax.models.decoder.architecture import Architecture
from kdjax.models.decoder.parameters import shapes


def flops_per_token(net: Architecture, length: int) -> float:
  """Of products of matrices, mean over the tokens of a row of `length`.

      2 · (weights of the layers and of the head) + 4 · heads · d · visible

  summed over the layers; visible is the mean number of keys that a token sees.
  A multiplication and an addition are two. Norms, rotations and softmax, which
  are no products, are left out, as is looking up embeddings.
  """
  weights = net.vocab_size * net.width + sum(
    math.prod(shape)
    for path, shape in shapes(net).items()
    if path.startswith("layers/") and path.endswith("kernel")
  )
  keys = sum(_visible(window, length) for window in net.windows)
  return 2.0 * weights + 4.0 * net.heads * net.head_dim * keys


def _visible(window: int | None, length: int) -> float:
  """Mean over t < length of min(t + 1, window)."""
  full = min(window or length, length)
  return (full * (full + 1) / 2 + (length - full) * full) / length
