"""A student that begins as a part of its teacher: `inherit`.

    net, params = inherit(teacher_net, teacher_params, layers=12, width=1024)
    model = decoder(net)

It has the teacher's family, so that what is exported loads as any other.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kdjax import parallel
from kdjax.errors import UserError
from kdjax.importance import Importance, of_weights
from kdjax.layer_map import MAPS
from kdjax.models.decoder import Architecture
from kdjax.models.decoder.parameters import by_path, nested
from kdjax.models.decoder.smaller import smaller
from kdjax.types import Params

# What the axes of an array are; of a layer's, after the layer itself.
_KERNELS = {
  "embed": (None, "channels"),
  "positions": (None, "channels"),
  "head": (None, "channels"),
  "query": ("channels", "queries"),
  "key": ("channels", "keys"),
  "value": ("channels", "keys"),
  "output": ("queries", "channels"),
  "gate": ("channels", "neurons"),
  "up": ("channels", "neurons"),
  "down": ("neurons", "channels"),
}


def inherit(
  net: Architecture,
  params: Params,
  *,
  layers: int | Sequence[int] | None = None,
  width: int | None = None,
  mlp_width: int | None = None,
  kv_heads: int | None = None,
  importance: Importance | None = None,
) -> tuple[Architecture, Params]:
  """A decoder of some of the layers, channels, neurons and heads of another.

  What is kept keeps its order. Where the student's own numbers enter the
  computation, the weights make up for it:

  - Norms divide by the root mean square of fewer channels, and their weights
    are multiplied by √(share of the energy that stays · D / D'). What they
    return is then as large as before, exactly so where the other channels
    were 0 and ε is (LayerNorm: the mean, and its bias on those channels).
  - Gemma multiplies embeddings with √D': they grow by √(D / D'), and where
    the head is tied the last norm shrinks by as much.
  - GPT-2 may divide the scores of layer n by n: queries of what was layer n
    and is now m are multiplied by m / n.

  Args:
    net, params: the teacher; not changed, and no array is shared.
    layers: how many, by `layer_map.MAPS["spread"]`: the first, the last, and
      others at equal distances between; or which, from 1 as in the tap
      `block_1`, in order. None keeps all, as for the rest.
    width: channels of the residual stream.
    mlp_width: neurons of each MLP; each layer keeps its own.
    kv_heads: key/value heads, each with the query heads that read it; each
      layer keeps its own. Heads keep their size, so that GPT-2, which has no
      field for it, needs width = heads · size.
    importance: of `kdjax.importance`; default, `of_weights`.

  Returns:
    The student's architecture, its config.json rewritten, and its params.

  Raises:
    UserError: sizes out of range, a layer that is not there, an importance of
      another network.

  Sources: layers, Sanh et al. 2019, arXiv 1910.01108, section 3, and, first and
    last included, Gandhi et al. 2023, arXiv 2311.00430, section 4.1; width,
    Muralidharan et al. 2024, arXiv 2407.14679, section 2, which leaves the
    norms as they are.
  """
  sizes = dict(width=width, mlp_width=mlp_width, kv_heads=kv_heads)
  made = cut(net, layers=layers, **sizes)
  chosen = _layers(net.depth, layers)
  score: Any = of_weights(net, params) if importance is None else importance
  score = parallel.on_host(score)
  _check_importance(net, score)
  groups = _best(score.groups[chosen], kv_heads)
  per_group = net.heads // net.kv_heads * net.head_dim
  kept = {
    "layers": chosen,
    "channels": _best(score.channels, width),
    "neurons": _best(score.neurons[chosen], mlp_width),
    "keys": _columns(groups, net.head_dim),
    "queries": _columns(groups, per_group),
  }
  flat = {
    path: _cut(x, _axes(path), kept) for path, x in by_path(params).items()
  }
  energy = 1.0
  if kept["channels"] is not None:
    energy = score.energy[kept["channels"]].sum() / score.energy.sum()
  return made, nested(_made_up(net, made, flat, chosen, float(energy)))


def cut(
  net: Architecture,
  *,
  layers: int | Sequence[int] | None = None,
  width: int | None = None,
  mlp_width: int | None = None,
  kv_heads: int | None = None,
) -> Architecture:
  """The architecture of what `inherit` returns, which needs no weights."""
  sizes = {
    "width": (width, net.width),
    "mlp_width": (mlp_width, net.mlp_width),
    "kv_heads": (kv_heads, net.kv_heads),
  }
  for name, (got, most) in sizes.items():
    if got is not None and not 1 <= got <= most:
      raise UserError(
        f"inherit got {name}={got}, needs 1 to {most}, which the teacher has: "
        "change it"
      )
  return smaller(
    net,
    layers=_layers(net.depth, layers).tolist(),
    **{name: got or most for name, (got, most) in sizes.items()},
  )


def copy_embeddings(params: Params, teacher_params: Params) -> Params:
  """`params` with the teacher's embeddings, for a student of another family.

  Rows that both have are copied, the student's further ones (a vocabulary
  padded further) stay. A head of its own gets the teacher's head, or, where
  that is tied, its embeddings. Numbers are copied as they are: Gemma alone
  multiplies its embeddings with √D.

  Raises:
    UserError: the widths differ.
  """
  source = teacher_params["embed"]["kernel"]
  heads = teacher_params.get("head", teacher_params["embed"])["kernel"]
  copied = dict(params)
  for name, theirs in (("embed", source), ("head", heads)):
    if name not in params:
      continue
    ours = params[name]["kernel"]
    if ours.shape[1] != theirs.shape[1]:
      raise UserError(
        f"the student's {name} is {ours.shape[1]} wide, the teacher's "
        f"{theirs.shape[1]}: embeddings are copied between equal widths; cut "
        "the teacher's with inherit(width=...)"
      )
    rows = min(ours.shape[0], theirs.shape[0])
    joined = jnp.concatenate([theirs[:rows].astype(ours.dtype), ours[rows:]])
    copied[name] = {**params[name], "kernel": joined}
  return copied


def _layers(depth: int, layers: int | Sequence[int] | None) -> np.ndarray:
  """The numbers of the layers, from 0."""
  if layers is None:
    return np.arange(depth)
  if isinstance(layers, int):
    if not 1 <= layers <= depth:
      raise UserError(
        f"inherit got layers={layers}, needs 1 to {depth}, which the teacher "
        "has: change it"
      )
    spread = MAPS["spread"]
    return np.array([spread(i, layers, depth) for i in range(layers)])
  numbers = list(layers)
  inside = all(1 <= n <= depth for n in numbers)
  if not numbers or not inside or sorted(set(numbers)) != numbers:
    raise UserError(
      f"inherit got layers={numbers}, needs numbers from 1 to {depth}, each "
      "once and in order: mend the list"
    )
  return np.array(numbers) - 1


def _check_importance(net: Architecture, score: Importance) -> None:
  depth, width = net.depth, net.width
  per_layer = (depth, net.mlp_width), (depth, net.kv_heads)
  needed = [(width,), (width,), *per_layer]
  found = [x.shape for x in score]
  if found != needed:
    raise UserError(
      f"the importance has the shapes {found}, the teacher's are {needed}: "
      "measure it on this teacher"
    )


def _best(score: np.ndarray, count: int | None) -> np.ndarray | None:
  """The numbers of the highest scores along the last axis, in order."""
  if count is None or count == score.shape[-1]:
    return None
  order = np.argsort(-score, axis=-1, kind="stable")
  return np.sort(order[..., :count], axis=-1)


def _columns(groups: np.ndarray | None, size: int) -> np.ndarray | None:
  if groups is None:
    return None
  columns = groups[..., None] * size + np.arange(size)
  return columns.reshape(len(groups), -1)


def _axes(path: str) -> tuple[str | None, ...]:
  """What each axis of an array is."""
  *above, module, part = path.split("/")
  if module in _KERNELS:
    axes = _KERNELS[module]
    axes = axes if part == "kernel" else axes[-1:]
  else:
    axes = (None,) if module in ("query_norm", "key_norm") else ("channels",)
  return ("layers", *axes) if above else axes


def _cut(
  x: Array,
  axes: tuple[str | None, ...],
  kept: Mapping[str, np.ndarray | None],
) -> Array:
  """A copy of what is kept of an array."""
  x = jnp.array(x)
  for axis, name in enumerate(axes):
    index = None if name is None else kept[name]
    if index is None:
      continue
    if index.ndim == 1:
      x = jnp.take(x, index, axis=axis)
    else:  # each layer its own
      x = jax.vmap(functools.partial(jnp.take, axis=axis - 1))(x, index)
  return x


def _made_up(
  net: Architecture,
  made: Architecture,
  flat: dict[str, Array],
  chosen: np.ndarray,
  energy: float,
) -> dict[str, Array]:
  """The weights, changed where the student's numbers would change a result."""
  flat = dict(flat)

  def scale(path: str, by: Any, plus: float = 0.0) -> None:
    wide = flat[path].astype(jnp.float32)
    flat[path] = ((wide + plus) * by - plus).astype(flat[path].dtype)

  if made.width != net.width:
    grown = (energy * net.width / made.width) ** 0.5
    plus = 1.0 if net.norm == "rms_plus_one" else 0.0
    again = net.embed_scale / made.embed_scale
    for path in flat:
      *_, module, part = path.split("/")
      if part == "scale" and module not in ("query_norm", "key_norm"):
        last = path == "norm/scale" and net.tied
        scale(path, grown / again if last else grown, plus)
    scale("embed/kernel", again)
  if net.score_scale_by_layer:
    ratio = np.arange(1, 1 + len(chosen)) / (chosen + 1)
    scale("layers/query/kernel", ratio[:, None, None].astype(np.float32))
    scale("layers/query/bias", ratio[:, None].astype(np.float32))
  return flat
