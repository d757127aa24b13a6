"""Networks of other libraries as a `Model`: `from_nnx`, `from_linen`.

Both return the same kind of `Model`: plain nested dicts of arrays in, no hidden
state. A module may return logits alone, or an `Output` with its own taps; the
outputs of its submodules can be tapped by their path (`"blocks/0"`) either way.

A teacher that ran elsewhere is a `Model` too: `from_batch` reads its logits.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jaxtyping import Array

from kdjax import errors
from kdjax.types import (
  Batch,
  Model,
  Output,
  Params,
  Stats,
  Variables,
  run_once,
)

Inputs = Callable[[Batch], Array]

# Asked for as `taps`, a network returns all that it names.
ALL_TAPS = ("*",)


def _image(batch: Batch) -> Array:
  return batch["image"]


def from_nnx(
  make: Callable[[nnx.Rngs], nnx.Module] | nnx.Module,
  *,
  inputs: Inputs = _image,
  stats: tuple[type[nnx.Variable], ...] = (nnx.BatchStat,),
) -> Model:
  """A `Model` from an NNX module, split once; its steps run under `jax.jit`.

  A module that scans its layers says so by an attribute `pinned = True`, and by
  `kdjax.pins` where on a mesh its activations lie: `Model.pinned`.

  Args:
    make: `rngs -> module`, or a module, whose values `init` then returns
      whatever the key.
    inputs: picks the module's argument out of the batch.
    stats: the kinds of variable that training changes without a gradient.

  Raises:
    UserError: names the variables that are neither parameters, nor `stats`, nor
      random-number state: the step would lose them.
  """
  if isinstance(make, nnx.Module):
    module = make
    build = lambda rngs: module  # noqa: E731
    # Compiled, the values that are there would become the program's constants.
    compiled = lambda init: init  # noqa: E731
  else:
    build, compiled = make, run_once
  abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
  kinds = (nnx.Param, nnx.Any(*stats), nnx.RngState)
  graphdef, *groups, rest = nnx.split(abstract, *kinds, ...)
  left = [_path(p) for p, _ in nnx.to_flat_state(rest)]
  if left:
    kept = ", ".join(k.__name__ for k in (nnx.Param, *stats))
    raise errors.UserError(
      f"the module also holds {', '.join(left)}; a step carries only {kept}: "
      "name their types in `stats`, or remove them"
    )
  flat_params, flat_stats, flat_random = (
    list(nnx.to_flat_state(g)) for g in groups
  )

  def init(key: Array, batch: Batch) -> tuple[Params, Stats]:
    params, others, _, _ = nnx.split(build(nnx.Rngs(key)), *kinds, ...)[1:]
    return _to_dict(params), _to_dict(others)

  def apply(
    params: Params,
    stats: Stats,
    batch: Batch,
    *,
    train: bool,
    key: Array | None = None,
    taps: tuple[str, ...] = (),
  ) -> tuple[Output, Stats]:
    module = nnx.merge(
      graphdef,
      _from_dict(flat_params, params),
      _from_dict(flat_stats, stats),
      _seeded(flat_random, key),
    )
    mode = {"deterministic": not train, "use_running_average": not train}
    module = nnx.view(module, **mode, raise_if_not_found=False)
    if taps:
      returned, inner = nnx.capture(
        module, nnx.Intermediate, method_outputs=nnx.Intermediate
      )(inputs(batch))
    else:
      returned, inner = module(inputs(batch)), None
    output = _output(returned, _nnx_taps(inner) if inner else {}, taps)
    if not train:
      return output, stats
    return output, _to_dict(nnx.split(module, *kinds, ...)[2])

  pinned = getattr(abstract, "pinned", False)
  return Model(compiled(init), apply, pinned)


def from_linen(
  module: nn.Module,
  *,
  inputs: Inputs = _image,
  stats: tuple[str, ...] = ("batch_stats",),
) -> Model:
  """A `Model` from a Linen module.

  The module learns of training by the argument that its `__call__` has for it:
  `train`, `training`, or `deterministic` and `use_running_average` (inverted).
  Its random streams, whatever their names, draw from the step's key.

  Args:
    module: the module.
    inputs: picks its argument out of the batch.
    stats: the collections that training changes without a gradient.

  Raises:
    UserError: from `init`, naming collections beside "params" and `stats`.
  """
  parameters = inspect.signature(module.__call__).parameters

  def mode(train: bool) -> dict[str, Any]:
    told = {
      "train": train,
      "training": train,
      "deterministic": not train,
      "use_running_average": not train,
    }
    return {name: told[name] for name in told if name in parameters}

  def streams(key: Array | None) -> dict[str, Array]:
    # Linen takes "params" for whatever stream it is not given.
    if key is None:
      return {}
    return {"dropout": key, "params": jax.random.fold_in(key, 1)}

  def init(key: Array, batch: Batch) -> tuple[Params, Stats]:
    variables = dict(nn.unbox(module.init(key, inputs(batch), **mode(False))))
    params = variables.pop("params", {})
    variables.pop("intermediates", None)
    left = sorted(set(variables) - set(stats))
    if left:
      raise errors.UserError(
        f"the module also holds the collections {', '.join(left)}; a step "
        f"carries only params, {', '.join(stats)}: name them in `stats`, or "
        "remove them"
      )
    return params, variables

  def apply(
    params: Params,
    stats: Stats,
    batch: Batch,
    *,
    train: bool,
    key: Array | None = None,
    taps: tuple[str, ...] = (),
  ) -> tuple[Output, Stats]:
    mutable = (["intermediates"] if taps else []) + (
      list(stats) if train else []
    )
    returned, changed = module.apply(
      {"params": params, **stats},
      inputs(batch),
      **mode(train),
      rngs=streams(key),
      mutable=mutable,
      capture_intermediates=bool(taps),
    )
    inner = _linen_taps(dict(changed.get("intermediates") or {}))
    changed = {k: v for k, v in changed.items() if k != "intermediates"}
    return _output(returned, inner, taps), {**stats, **changed}

  return Model(run_once(init), apply)


def from_batch(name: str = "teacher_logits") -> Model:
  """A teacher without a network: its logits z stand in the batch.

      z = batch[name]                                      [*batch, classes]

  It has no variables, so no `teacher_variables` need be given. Whatever runs
  with a network runs with it: terms on logits, masks, microbatches, meshes.
  z must be of the very input that the student sees: it knows nothing of an
  `augment` or a `transform`. `data.with_logits` lays z beside the images.

  Args:
    name: of the array.

  Raises:
    UserError: from `apply`, if the batch has no such array, or one that is no
      table of logits, or a term asks for taps.
  """

  def apply(
    params: Params,
    stats: Stats,
    batch: Batch,
    *,
    train: bool,
    key: Array | None = None,
    taps: tuple[str, ...] = (),
  ) -> tuple[Output, Stats]:
    del params, train, key
    if name not in batch:
      raise errors.UserError(
        f"the teacher's logits are to be {name!r} of the batch, which has "
        f"{', '.join(sorted(batch))}: add them (data.with_logits), to the "
        "batches that are evaluated on too"
      )
    logits = batch[name]
    rows = jnp.shape(batch["mask"])
    if jnp.ndim(logits) != len(rows) + 1 or jnp.shape(logits)[:-1] != rows:
      raise errors.UserError(
        f"{name!r} of the batch has the shape {jnp.shape(logits)}, needs "
        f"({', '.join(map(str, rows))}, classes): one row an example"
      )
    return _output(logits, {}, taps), stats

  return Model(lambda key, batch: ({}, {}), apply)


def reading(model: Model, prefix: str) -> Model:
  """The model on arrays of the batch that another's stand beside.

  `reading(teacher, "teacher_")` reads `teacher_tokens` as its `tokens`, and so
  on: a teacher whose tokenizer is another than the student's. It sees no array
  without the prefix, which would be of other tokens.

  Raises:
    UserError: from `init` and `apply`, if the batch has no such array.
  """

  def own(batch: Batch) -> Batch:
    found = {
      name.removeprefix(prefix): x
      for name, x in batch.items()
      if name.startswith(prefix)
    }
    if not found:
      raise errors.UserError(
        f"a model reads the arrays {prefix}*, and the batch has "
        f"{', '.join(sorted(batch))}: give batches that have them"
      )
    return found

  def apply(
    params: Params, stats: Stats, batch: Batch, **options: Any
  ) -> tuple[Output, Stats]:
    return model.apply(params, stats, own(batch), **options)

  return model._replace(
    init=lambda key, batch: model.init(key, own(batch)), apply=apply
  )


def tap_specs(
  model: Model, variables: Any, batch: Batch
) -> Mapping[str, jax.ShapeDtypeStruct]:
  """The taps of a model and their shapes; nothing is computed.

  Args:
    model: one of `from_nnx` or `from_linen`.
    variables: `(params, stats)`, or their shapes.
    batch: an example batch, or its shapes.
  """

  def all_taps(variables: Variables, batch: Batch) -> Mapping[str, Array]:
    output, _ = model.apply(*variables, batch, train=False, taps=ALL_TAPS)
    return output.taps

  return jax.eval_shape(all_taps, variables, batch)


def cast(tree: Any, dtype: Any) -> Any:
  """`tree` with its floating arrays in `dtype`: halves a bfloat16 teacher."""

  def one(x: Any) -> Any:
    floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
    return jnp.asarray(x, dtype) if floating else x

  return jax.tree.map(one, tree)


def _output(
  returned: Any, inner: Mapping[str, Array], taps: tuple[str, ...]
) -> Output:
  own = returned if isinstance(returned, Output) else Output(returned)
  if taps == ALL_TAPS:
    # What submodules return is too long a list to choose from where the network
    # names taps of its own.
    return Output(own.logits, own.taps or inner)
  there = {**inner, **own.taps}
  for name in taps:
    if name not in there:
      raise errors.unknown("tap", name, own.taps or inner)
  return Output(own.logits, {name: there[name] for name in taps})


def _path(keys: tuple[Any, ...]) -> str:
  return "/".join(str(k) for k in keys)


def _to_dict(state: Any) -> dict[str, Any]:
  """Nested dicts with string keys: a list's integers do not survive files."""
  tree: dict[str, Any] = {}
  for path, variable in nnx.to_flat_state(state):
    *parents, name = map(str, path)
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = variable.get_value()
  return tree


def _from_dict(flat: list[tuple[Any, Any]], tree: Any) -> Any:
  def value(path: tuple[Any, ...]) -> Any:
    node = tree
    for name in path:
      node = node[str(name)]
    return node

  return nnx.from_flat_state([(p, v.replace(value(p))) for p, v in flat])


def _seeded(flat: list[tuple[Any, Any]], key: Array | None) -> Any:
  """The streams of a module's Rngs: their n-th key is `fold_in(key, n)`."""
  key = jax.random.key(0) if key is None else key
  values = []
  for n, (path, variable) in enumerate(flat):
    shape = variable.get_value().shape
    if isinstance(variable, nnx.RngKey):
      stream = jax.random.fold_in(key, n)
      value = stream if shape == () else jax.random.split(stream, shape)
    else:
      value = jnp.zeros(shape, jnp.uint32)
    values.append((path, variable.replace(value)))
  return nnx.from_flat_state(values)


def _nnx_taps(inner: Any) -> dict[str, Array]:
  taps = {}
  for path, variable in nnx.to_flat_state(inner):
    value = variable.get_value()
    value = value[0] if isinstance(value, tuple) else value
    *parents, name = map(str, path)
    named = parents if name == "__call__" else [*parents, name]
    if named and isinstance(value, jax.Array):
      taps["/".join(named)] = value
  return taps


def _linen_taps(inner: Mapping[str, Any]) -> dict[str, Array]:
  taps = {}
  for path, value in jax.tree_util.tree_flatten_with_path(dict(inner))[0]:
    names = [str(p.key) for p in path if hasattr(p, "key")]
    if names[-1] == "__call__":
      names.pop()
    if names:
      taps["/".join(names)] = value
  return taps
