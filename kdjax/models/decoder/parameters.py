"""The tree of a decoder's arrays, its layers stacked on a leading axis.

{
  "embed": {"kernel": [V, D]},
  "positions": {"kernel": [P, D]},               # GPT-2
  "layers": {                                    # all stacked: [L, ...]
    "attention_norm", "mlp_norm": {"scale": [D]},
    "query", "key", "value": {"kernel": [D, heads · d]},
    "query_norm", "key_norm": {"scale": [d]},    # Qwen 3, Gemma 3
    "output": {"kernel": [heads · d, D]},
    "gate", "up": {"kernel": [D, F]}, "down": {"kernel": [F, D]},
    "post_attention_norm", "post_mlp_norm": {"scale": [D]},  # Gemma 2, 3
  },
  "norm": {"scale": [D]},
  "head": {"kernel": [V, D]},                    # unless tied
}
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from kdjax.models.decoder.architecture import Architecture
from kdjax.types import Params


def shapes(net: Architecture) -> dict[str, tuple[int, ...]]:
  """The shape of every array, by its path in the tree."""
  width, mlp, norms = net.width, net.mlp_width, ["attention_norm", "mlp_norm"]
  queries, keys = net.heads * net.head_dim, net.kv_heads * net.head_dim
  linear = {  # (inputs, outputs, bias)
    "query": (width, queries, net.qkv_bias),
    "key": (width, keys, net.qkv_bias),
    "value": (width, keys, net.qkv_bias),
    "output": (queries, width, net.output_bias),
    "gate": (width, mlp, net.mlp_bias),
    "up": (width, mlp, net.mlp_bias),
    "down": (mlp, width, net.mlp_bias),
  }
  if not net.gated:
    del linear["gate"]
  if net.post_norms:
    norms += ["post_attention_norm", "post_mlp_norm"]
  layer: dict[str, tuple[int, ...]] = {}
  for name, (inputs, outputs, bias) in linear.items():
    layer[f"{name}/kernel"] = (inputs, outputs)
    if bias:
      layer[f"{name}/bias"] = (outputs,)
  for name in norms:
    layer |= _norm_shapes(net, name)
  if net.qk_norm:
    layer |= {f"{n}/scale": (net.head_dim,) for n in ("query_norm", "key_norm")}
  found: dict[str, tuple[int, ...]] = {
    "embed/kernel": (net.vocab_size, width),
    **{f"layers/{path}": (net.depth, *shape) for path, shape in layer.items()},
    **_norm_shapes(net, "norm"),
  }
  if not net.rotations:
    found["positions/kernel"] = (net.context, width)
  if not net.tied:
    found["head/kernel"] = (net.vocab_size, width)
  return found


def _norm_shapes(net: Architecture, name: str) -> dict[str, tuple[int, ...]]:
  parts = ("scale", "bias") if net.norm == "layer" else ("scale",)
  return {f"{name}/{part}": (net.width,) for part in parts}


def by_path(tree: PyTree) -> dict[str, Any]:
  """{"a": {"b": x}} -> {"a/b": x}; what `nested` takes."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {"/".join(str(k.key) for k in path): leaf for path, leaf in leaves}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
  """{"a/b": x} -> {"a": {"b": x}}."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = value
  return tree


def init(net: Architecture, key: Array, dtype: Any = jnp.float32) -> Params:
  """Normal weights, norms that scale by one, no biases.

  What is added to the residual stream is drawn 1 / √(2 L) smaller, as GPT-2 is,
  so that its variance does not grow with the depth.
  """

  def draw(n: int, path: str, shape: tuple[int, ...]) -> Array:
    if path.endswith("bias"):
      return jnp.zeros(shape, dtype)
    if path.endswith("scale"):
      return jnp.full(shape, 0 if net.norm == "rms_plus_one" else 1, dtype)
    std = net.init_std
    if path in ("layers/output/kernel", "layers/down/kernel"):
      std /= (2 * net.depth) ** 0.5
    drawn = jax.random.normal(jax.random.fold_in(key, n), shape)
    return (std * drawn).astype(dtype)

  named = sorted(shapes(net).items())
  return nested({p: draw(n, p, shape) for n, (p, shape) in enumerate(named)})
