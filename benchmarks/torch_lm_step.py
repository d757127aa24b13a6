"""The step of a language model, and its head, in kdjax and in plain PyTorch.

    pip install torch==2.13.0
    OMP_WAIT_POLICY=passive python benchmarks/torch_lm_step.py
    OMP_WAIT_POLICY=passive python benchmarks/torch_lm_step.py --parts head

Each contestant is a process of its own; they take one step in turn, A B A B.
Printed are the median seconds of a step and kdjax' time / the contestant's,
round by round, the median and the quartiles: below 1, kdjax is faster. `cores`
is the same of the seconds of all cores together, which other work on the
machine moves less.

  step   0.1 · cross-entropy + 0.9 · T² · KL and AdamW, on the networks of
         `lm_step.py` and from the same weights. PyTorch multiplies the logits
         out; torch_compiled compiles both networks with the loss
  head   the loss alone, with the gradients of hidden states and kernel, at the
         sizes of `fused_head.py`. torch_chunks takes 256 tokens at a time, as
         kdjax does, by `torch.func.grad_and_value` of the compiled chunk, and
         adds to the kernel's gradient in its own dtype: the way of Liger's
         chunked losses. Goals, of cores: float32 0.95, bfloat16 1.05
"""

import argparse
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fused_head
import jax
import lm_step
import numpy as np
from step_flops import RESULTS, save
from torch_step import compare, show, work

from kdjax.models.decoder import architecture

STEP = ("kdjax", "torch", "torch_compiled")
HEAD = ("kdjax_head", "torch_chunks")
GOALS = {"float32": 0.95, "bfloat16": 1.05}
CHUNK = 256


def kdjax_step(size: lm_step.Size) -> Callable[[], float]:
  """A step that returns its loss when it is done."""
  run = lm_step.Running(lm_step.models(size), size)
  return lambda: float(run()["loss/total"])


def torch_step(size: lm_step.Size, *, compiled: bool) -> Callable[[], float]:
  """The same step from the same weights, as a PyTorch training loop has it."""
  import torch  # pyright: ignore[reportMissingImports]
  from torch.nn import functional  # pyright: ignore[reportMissingImports]

  _, arguments = lm_step.step_and_arguments(lm_step.models(size), size)
  state, frozen, batch = jax.device_get(jax.jit(arguments)())
  tokens, label = (torch.tensor(batch[k]).long() for k in ("tokens", "label"))
  student = torch_decoder(size.student, state.params)
  teacher = torch_decoder(size.teacher, frozen[0]).requires_grad_(False)
  optimizer = torch.optim.AdamW(
    student.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-4
  )
  alpha, t = lm_step.ALPHA, lm_step.T

  def loss_of() -> Any:
    with torch.no_grad():
      target = teacher(tokens).flatten(0, 1)
    logits = student(tokens).flatten(0, 1)
    soft = functional.kl_div(
      functional.log_softmax(logits / t, 1),
      functional.log_softmax(target / t, 1),
      reduction="batchmean",
      log_target=True,
    )
    hard = functional.cross_entropy(logits, label.flatten())
    return alpha * hard + (1 - alpha) * t**2 * soft

  forward = torch.compile(loss_of) if compiled else loss_of

  def run() -> float:
    loss = forward()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item()

  return run


def torch_decoder(config: Any, params: Any) -> Any:
  """A Llama of these weights, in plain PyTorch."""
  import torch  # pyright: ignore[reportMissingImports]
  from torch import nn  # pyright: ignore[reportMissingImports]
  from torch.nn import functional  # pyright: ignore[reportMissingImports]

  net = architecture(config)
  assert net.family == "llama", net.family
  assert net.tied, config
  shape = net.heads, net.head_dim

  def weight(x: np.ndarray) -> Any:
    return nn.Parameter(torch.tensor(np.ascontiguousarray(x)))

  def norm(x: Any, scale: Any) -> Any:
    return functional.rms_norm(x, (net.width,), scale, net.epsilon)

  def rotate(x: Any, angles: Any) -> Any:
    a, b = x.chunk(2, -1)
    return torch.cat(
      [a * angles[0] - b * angles[1], b * angles[0] + a * angles[1]], -1
    )

  class Block(nn.Module):
    def __init__(self, n: int):
      super().__init__()
      one = params["layers"]
      self.norms = nn.ParameterList(
        weight(one[k]["scale"][n]) for k in ("attention_norm", "mlp_norm")
      )
      names = ("query", "key", "value", "output", "gate", "up", "down")
      self.maps = nn.ParameterDict(
        {k: weight(one[k]["kernel"][n].T) for k in names}
      )

    def forward(self, x: Any, angles: Any) -> Any:
      w, linear = self.maps, functional.linear
      y = norm(x, self.norms[0])
      q, k, v = (
        linear(y, w[name]).unflatten(-1, shape).transpose(1, 2)
        for name in ("query", "key", "value")
      )
      y = functional.scaled_dot_product_attention(
        rotate(q, angles), rotate(k, angles), v, is_causal=True
      )
      x = x + linear(y.transpose(1, 2).flatten(2), w["output"])
      y = norm(x, self.norms[1])
      y = functional.silu(linear(y, w["gate"])) * linear(y, w["up"])
      return x + linear(y, w["down"])

  class Decoder(nn.Module):
    def __init__(self):
      super().__init__()
      self.embed = weight(params["embed"]["kernel"])
      self.blocks = nn.ModuleList(Block(n) for n in range(net.depth))
      self.norm = weight(params["norm"]["scale"])
      self.frequencies = torch.tensor(net.rotations[0].frequencies)

    def forward(self, tokens: Any) -> Any:
      x = functional.embedding(tokens, self.embed)
      turned = torch.arange(tokens.shape[1])[:, None] * self.frequencies
      angles = turned.cos(), turned.sin()
      for block in self.blocks:
        x = block(x, angles)
      return functional.linear(norm(x, self.norm), self.embed)

  return Decoder()


def kdjax_head(sizes: fused_head.Sizes, dtype: str) -> Callable[[], float]:
  given = fused_head.arguments(sizes, dtype)
  run = fused_head.compiled(fused_head.both()[1], given)
  return lambda: float(jax.block_until_ready(run(*given))[0][0])


def torch_head(sizes: fused_head.Sizes, dtype: str) -> Callable[[], float]:
  """A chunk of tokens at a time, its gradient taken in the forward pass."""
  import torch  # pyright: ignore[reportMissingImports]
  from torch.nn import functional  # pyright: ignore[reportMissingImports]

  given = jax.device_get(fused_head.arguments(sizes, "float32"))
  (x, kernel), (theirs, other) = (
    [torch.tensor(a).to(getattr(torch, dtype)) for a in side]
    for side in given[:2]
  )
  label = torch.tensor(given[2]).long()
  alpha, t = fused_head.ALPHA, fused_head.T

  def chunk_loss(x: Any, kernel: Any, theirs: Any, label: Any) -> Any:
    z = functional.linear(x, kernel).float()
    log_p = functional.log_softmax(
      functional.linear(theirs, other).float() / t, -1
    )
    soft = functional.kl_div(
      functional.log_softmax(z / t, -1),
      log_p,
      reduction="sum",
      log_target=True,
    )
    hard = functional.cross_entropy(z, label, reduction="sum")
    return (alpha * hard + (1 - alpha) * t**2 * soft) / sizes.tokens

  one = torch.compile(torch.func.grad_and_value(chunk_loss, argnums=(0, 1)))

  def run() -> float:
    by_x, by_kernel = torch.empty_like(x), torch.zeros_like(kernel)
    total = torch.zeros(())
    for n in range(0, sizes.tokens, CHUNK):
      at = slice(n, n + CHUNK)
      (dx, dw), loss = one(x[at], kernel, theirs[at], label[at])
      by_x[at] = dx
      by_kernel += dw
      total += loss
    return float(total)

  return run


def make_step(name: str, size: str, dtype: str) -> Callable[[], float]:
  if name in HEAD:
    sizes = fused_head.Sizes(64, 96, 8, 8) if size == "tiny" else None
    make = kdjax_head if name == "kdjax_head" else torch_head
    return make(sizes or fused_head.SMALL, dtype)
  if name == "kdjax":
    return kdjax_step(lm_step.SIZES[size])
  return torch_step(lm_step.SIZES[size], compiled=name == "torch_compiled")


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--parts", nargs="+", default=["step", "head"])
  parser.add_argument("--size", choices=("tiny", "5m-25m"), default="5m-25m")
  parser.add_argument("--repeats", type=int, default=10)
  parser.add_argument(
    "--out", type=Path, default=RESULTS / "torch_lm_step.json"
  )
  given = parser.parse_args(arguments)
  if not importlib.util.find_spec("torch"):
    print("PyTorch is not installed: pip install torch==2.13.0")
    sys.exit(2)
  parts = {"step": {"step": (STEP, "float32")}}
  parts["head"] = {f"head, {dtype}": (HEAD, dtype) for dtype in GOALS}
  found = {}
  for part in given.parts:
    for name, (names, dtype) in parts[part].items():
      settings = (given.size, dtype)
      rows = compare(names, settings, given.repeats, script=__file__)
      print(f"{name}, {given.size if part == 'step' else fused_head.SMALL}")
      show(rows)
      if part == "head":
        cores = rows[HEAD[1]]["cores"][1]
        told = "" if cores <= GOALS[dtype] else ": missed"
        print(f"goal {GOALS[dtype]}{told}")
      found[name] = rows
  version = importlib.metadata.version("torch")
  save(given.out, torch=version, size=given.size, rows=found, goals=GOALS)


if __name__ == "__main__":
  if sys.argv[1:2] == ["--work"]:
    work(make_step(*sys.argv[2:]))
  else:
    main()
