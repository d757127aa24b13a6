"""Tiny networks and batches that several tests share."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from kdjax.adapters import from_linen, from_nnx
from kdjax.types import Model, Output

CLASSES, FEATURES = 5, 3


def batch(size=32, seed=0, **more):
  rng = np.random.default_rng(seed)
  return {
    "image": rng.normal(size=(size, FEATURES)).astype(np.float32),
    "label": rng.integers(0, CLASSES, size).astype(np.int32),
    "mask": np.ones(size, np.float32),
    **more,
  }


def bare(width=8):
  """A pair of functions, as a user without any library would write it."""

  def init(key, batch):
    a, b = jax.random.split(key)
    inputs = batch["image"].shape[-1]
    params = {
      "first": jax.random.normal(a, (inputs, width)) / inputs**0.5,
      "last": jax.random.normal(b, (width, CLASSES)) / width**0.5,
    }
    return params, {}

  def apply(params, stats, batch, *, train, key=None, taps=()):
    hidden = jnp.tanh(batch["image"] @ params["first"])
    known = {"hidden": hidden}
    output = Output(hidden @ params["last"], {t: known[t] for t in taps})
    return output, stats

  return Model(init, apply)


class NnxNet(nnx.Module):
  def __init__(self, rngs, norm=False, axis_name=None, dropout=0.0):
    self.first = nnx.Linear(FEATURES, 8, rngs=rngs)
    self.norm = (
      nnx.BatchNorm(8, axis_name=axis_name, rngs=rngs) if norm else None
    )
    self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None
    self.last = nnx.Linear(8, CLASSES, rngs=rngs)

  def __call__(self, x):
    x = self.first(x)
    x = x if self.dropout is None else self.dropout(x)
    x = x if self.norm is None else self.norm(x)
    return self.last(jnp.tanh(x))


class LinenNet(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = jnp.tanh(nn.Dense(8, name="first")(x))
    return nn.Dense(CLASSES, name="last")(x)


def nnx_net(**kwargs):
  return from_nnx(lambda rngs: NnxNet(rngs, **kwargs))


STUDENTS = {
  "bare": bare,
  "nnx": nnx_net,
  "linen": lambda: from_linen(LinenNet()),
}


def teacher(seed=9):
  """A wider bare network and its variables."""
  model = bare(16)
  return model, model.init(jax.random.key(seed), batch(1))


def softmax(z):
  """In NumPy, of the last axis: the oracle's."""
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)
