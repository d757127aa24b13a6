"""Language models of the model hub, in and out: `read` and `write`.

    net, params = decoders.read("Qwen/Qwen3-0.6B", dtype=jnp.bfloat16)
    model = decoder(net, dtype=jnp.bfloat16)
    decoders.write("student", params, net)

What is written, `AutoModelForCausalLM.from_pretrained` loads.
"""

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import PyTree

from kdjax.errors import UserError
from kdjax.models.decoder import Architecture, architecture
from kdjax.models.decoder.parameters import by_path, nested, shapes
from kdjax.pretrained import decoder_names
from kdjax.pretrained.decoder_names import Place, places, unprefixed
from kdjax.pretrained.files import (
  CONFIG,
  INDEX,
  WEIGHTS,
  Tensors,
  open_tensors,
)
from kdjax.types import Params

_CLASSES = {
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "gemma2": "Gemma2ForCausalLM",
  "gemma3_text": "Gemma3ForCausalLM",
  "smollm3": "SmolLM3ForCausalLM",
  "gpt2": "GPT2LMHeadModel",
}


def read(
  source: str | Path,
  *,
  dtype: Any = None,
  shardings: Sharding | PyTree | None = None,
  revision: str | None = None,
  ignore: Collection[str] = (),
) -> tuple[Architecture, Params]:
  """The architecture and the weights of a checkpoint.

  The layers' tensors go straight into the stacked arrays, and of a sharded
  array only the parts of this process are read: beside what is on the devices,
  the host holds one array at a time.

  Args:
    source: a folder with config.json and model.safetensors, or with the index
      of its shards; or a name on the model hub, downloaded once.
    dtype: of the arrays; None = as each is stored.
    shardings: one for all arrays, or a tree of them like `params`; None = the
      default device.
    revision: of the hub's repository.
    ignore: fields of config.json that you know to change nothing.

  Raises:
    UserError: no such checkpoint, a pickle, a truncated file, an architecture
      or field that is not supported; or, all in one, tensors that are missing,
      surplus or of another shape or dtype.
  """
  tensors = open_tensors(source, revision)
  net = _architecture(source, tensors.config, ignore)
  found = unprefixed(places(net), tensors)
  decoder_names.check(source, net, found, tensors)
  layout = _by_path(shardings, shapes(net))

  def array(path: str, shape: tuple[int, ...]) -> jax.Array:
    place = found[path]
    kind = decoder_names.DTYPES[tensors.dtypes[place.name.format(0)]][1]

    def part(index: Any) -> np.ndarray:
      return _part(place, shape, index, dtype or kind, tensors)

    return jax.make_array_from_callback(shape, layout[path], part)

  flat = {path: array(path, shape) for path, shape in shapes(net).items()}
  return net, nested(flat)


def read_architecture(
  source: str | Path,
  *,
  revision: str | None = None,
  ignore: Collection[str] = (),
) -> Architecture:
  """The architecture of a checkpoint, as `read` would find it."""
  tensors = open_tensors(source, revision)
  return _architecture(source, tensors.config, ignore)


def _architecture(
  source: str | Path, config: Mapping[str, Any], ignore: Collection[str]
) -> Architecture:
  if not config:
    raise UserError(
      f"{source} has no {CONFIG}, which says what the tensors compute: put it "
      "beside them"
    )
  return architecture(config, ignore=ignore)


def _part(
  place: Place,
  shape: tuple[int, ...],
  index: tuple[slice, ...],
  dtype: Any,
  tensors: Tensors,
) -> np.ndarray:
  """One part of an array, filled layer by layer."""
  spans = [range(*s.indices(n)) for s, n in zip(index, shape)]
  if "{}" not in place.name:
    return _stored(place, shape, spans, place.name, tensors).astype(dtype)
  out = np.empty([len(span) for span in spans], dtype)
  for n, layer in enumerate(spans[0]):
    name = place.name.format(layer)
    tensor = _stored(place, shape[1:], spans[1:], name, tensors)
    # In blocks: a turned copy as a whole misses the cache at every number, and
    # takes three times as long.
    for i in range(0, tensor.shape[-1], 128):
      out[n, ..., i : i + 128] = tensor[..., i : i + 128]
  return out


def _stored(
  place: Place,
  shape: Sequence[int],
  spans: Sequence[range],
  name: str,
  tensors: Tensors,
) -> np.ndarray:
  """The part of one tensor, turned to our axes."""
  part = [slice(span.start, span.stop) for span in spans]
  if place.third is not None:
    skip = place.third * shape[-1]
    part[-1] = slice(part[-1].start + skip, part[-1].stop + skip)
  if place.transposed:
    return tensors.load_part(name, tuple(part[::-1])).T
  return tensors.load_part(name, tuple(part))


def write(
  folder: str | Path,
  params: Params,
  net: Architecture,
  *,
  dtype: Any = None,
  shard_bytes: int = 5 * 2**30,
  beside: Collection[str | Path] = (),
) -> Path:
  """Writes config.json and safetensors, which transformers and vLLM load.

  The folder appears whole, by a renaming, or not at all.

  Args:
    folder: a new one, or one that is empty.
    params: those of `net`, on any devices of this process.
    net: its `config` is what config.json says.
    dtype: of the tensors; None = as the arrays are.
    shard_bytes: tensors are split into files of at most so many bytes, with an
      index; a larger tensor has a file of its own.
    beside: files to copy, such as the tokenizer's.

  Returns:
    The folder.

  Raises:
    UserError: the folder is there; arrays that are missing, surplus or of
      another shape.
  """
  folder = Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise UserError(f"{folder} is there: name a new folder, or remove it")
  arrays = by_path(params)
  decoder_names.check_params(net, arrays)
  tensors = _outgoing(net, arrays, dtype)
  temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
  temporary.mkdir(parents=True)
  try:
    kind = _write_weights(temporary, tensors, shard_bytes)
    config = {**net.config, "architectures": [_CLASSES[net.family]]}
    # transformers 5 reads the first, 4 and other programs the second.
    config |= {"dtype": kind, "torch_dtype": kind}
    (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    for file in beside:
      shutil.copy(file, temporary)
    if folder.exists():
      folder.rmdir()
    temporary.rename(folder)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return folder


class _Tensor(NamedTuple):
  """A tensor that is to be written: its size, and how to make it."""

  num_bytes: int
  make: Callable[[], np.ndarray]


def _outgoing(
  net: Architecture, arrays: Mapping[str, Any], dtype: Any
) -> dict[str, _Tensor]:
  """Every tensor of the file; none is brought to the host yet."""
  whole: dict[str, list[tuple[Place, str]]] = {}
  for path, place in places(net).items():
    whole.setdefault(place.name, []).append((place, path))

  def make(parts: list[tuple[Place, str]], n: int | None) -> np.ndarray:
    # Queries, keys and values lie side by side in one.
    parts = sorted(parts, key=lambda part: part[0].third or 0)
    hosted = [_host(arrays[path], n) for _, path in parts]
    joined = np.concatenate(hosted, axis=-1) if len(parts) > 1 else hosted[0]
    joined = joined.T if parts[0][0].transposed else joined
    return np.ascontiguousarray(joined.astype(dtype or joined.dtype))

  tensors = {}
  for name, parts in whole.items():
    size = sum(
      arrays[path].size * np.dtype(dtype or arrays[path].dtype).itemsize
      for _, path in parts
    )
    if "{}" not in name:
      tensors[name] = _Tensor(size, lambda p=parts: make(p, None))
      continue
    for n in range(net.depth):
      tensors[name.format(n)] = _Tensor(
        size // net.depth, lambda p=parts, n=n: make(p, n)
      )
  return tensors


def _host(array: Any, layer: int | None) -> np.ndarray:
  if layer is None:
    return np.asarray(array)
  if isinstance(array, np.ndarray):
    return array[layer]
  # One program for all layers, and one layer at a time on the host.
  return np.asarray(
    jax.lax.dynamic_index_in_dim(array, np.int32(layer), keepdims=False)
  )


def _write_weights(
  folder: Path, tensors: Mapping[str, _Tensor], shard_bytes: int
) -> str:
  """Writes the files; returns the dtype as config.json calls it."""
  from safetensors.numpy import save_file

  shards: list[list[str]] = [[]]
  room = shard_bytes
  for name, tensor in tensors.items():
    if tensor.num_bytes > room and shards[-1]:
      shards.append([])
      room = shard_bytes
    shards[-1].append(name)
    room -= tensor.num_bytes
  count, weight_map, kinds = len(shards), {}, set()
  for n, names in enumerate(shards, 1):
    numbered = f"model-{n:05}-of-{count:05}.safetensors"
    file = folder / (numbered if count > 1 else WEIGHTS)
    held = {name: tensors[name].make() for name in names}
    save_file(held, file, {"format": "pt"})
    # safetensors lets the owner alone read.
    file.chmod(0o666 & ~_umask())
    weight_map |= dict.fromkeys(names, file.name)
    kinds |= {str(tensor.dtype) for tensor in held.values()}
  if count > 1:
    total = sum(tensor.num_bytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
  return kinds.pop() if len(kinds) == 1 else "float32"


def _umask() -> int:
  umask = os.umask(0)
  os.umask(umask)
  return umask


def _by_path(
  shardings: Sharding | PyTree | None, paths: Collection[str]
) -> dict[str, Sharding]:
  if shardings is None:
    shardings = SingleDeviceSharding(jax.local_devices()[0])
  if isinstance(shardings, Sharding):
    return dict.fromkeys(paths, shardings)
  given = by_path(shardings)
  if wrong := set(paths) ^ set(given):
    raise UserError(
      f"shardings differ from the params in {', '.join(sorted(wrong))}: give "
      "one for all, or a tree of the same paths"
    )
  return given
