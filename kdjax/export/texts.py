"""A run's language model as a folder that transformers and vLLM load."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import kdjax.config as configuration
from kdjax import evaluate, lora, parallel, pretrained
from kdjax.data import text
from kdjax.export import serving
from kdjax.export.finished import Located, newest
from kdjax.export.rows import TOKEN, Exported
from kdjax.generate import generate
from kdjax.pretrained import decoders, files
from kdjax.types import Params

_TOKENS = 32


def export(run: Located, output: Path, network: str) -> list[Exported]:
  """config.json, safetensors and the tokenizer, whole or not at all.

  Returns:
    What was measured: the teacher first, if it can be read, then the network.
  """
  made = configuration.decoders_of(run.config)
  side = "teacher" if network == "teacher" else "student"
  params = _params(run, made, network)
  stored = configuration.dtype(run.config[side].dtype)
  with tempfile.TemporaryDirectory() as folder:
    text.save(made.tokenizers[side], folder)
    beside = [*sorted(Path(folder).iterdir()), *_generation(run, side)]
    decoders.write(
      output, params, made.nets[side], dtype=np.dtype(stored), beside=beside
    )
  named = [network]
  # A teacher from elsewhere may not fit where its student is exported.
  if side == "student" and not run.config.teacher.path:
    named.insert(0, "teacher")
  return [_measured(run, made, name) for name in named]


def _generation(run: Located, side: str) -> list[Path]:
  """What the network's own checkpoint says of how it is to generate."""
  path = run.config[side].path
  if not path or not pretrained.is_weights(path):
    return []
  file = pretrained.local(path) / files.GENERATION
  return [file] if file.exists() else []


def _params(run: Located, made: configuration.Decoders, network: str) -> Params:
  side = "teacher" if network == "teacher" else "student"
  c = run.config[side]
  model = configuration.causal_lm(
    made.nets[side], c, run.config.head, made.num_classes[side]
  )
  adapted = side == "student" and c.lora.rank
  whole = jax.eval_shape(model.init, jax.random.key(0), {})
  if not (adapted or (side == "teacher" and c.path)):
    return newest(run, network, whole)[0]
  stored = configuration.dtype(c.dtype)
  mesh = parallel.make_mesh()
  base = configuration.decoder_params(c, model, stored, mesh)
  assert base is not None  # adapters have a path, as the config was checked
  if not adapted:
    return base
  like = jax.eval_shape(
    lambda base: configuration.adapters(run.config, base, 0), base
  )
  trained, _ = newest(run, network, (like, {}))
  scale = configuration.adapter_scale(run.config)
  return lora.merge(base, trained, scale)


def _measured(
  run: Located, made: configuration.Decoders, network: str
) -> Exported:
  side = "teacher" if network == "teacher" else "student"
  params = _params(run, made, network)

  def write() -> None:
    generate(
      made.nets[side],
      params,
      jnp.zeros((1, 1), jnp.int32),
      max_new_tokens=_TOKENS,
      num_classes=made.num_classes[side],
    ).tokens.block_until_ready()

  took = serving.timed(write, warm_up=1, fewest=3)
  return Exported(
    network,
    evaluate.num_parameters(params),
    sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params)),
    serving.Latency(took.median / _TOKENS, took.calls),
    TOKEN,
  )
