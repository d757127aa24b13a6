"""The KD step in kdjax and in plain PyTorch: the same networks, batch and SGD.

    pip install torch==2.13.0
    python benchmarks/torch_step.py
    python benchmarks/torch_step.py --pair resnet50_to_mobilenet_v2

Each contestant is a process of its own; they take one step in turn, A B A B,
so that what else the machine does hits all. Printed are the median seconds of
a step, and kdjax' time / the contestant's, round by round, the median and the
quartiles: below 1, kdjax (the first contestant) is the faster one. `cores`
is the same of the seconds of all cores together, which other work on the
machine moves less. Where there is such work, OMP_WAIT_POLICY=passive keeps
PyTorch's threads from spinning while they wait for one that does not run.

  kdjax           one device
  kdjax_split     one CPU device for each core, the batch split over them
  torch           channels-last, eager: a loop as other libraries have it
  torch_compiled  the same, both networks by torch.compile

On a GPU (jax[cuda12] and PyTorch with CUDA): the same commands. There the pair
is ResNet-50 and MobileNetV2 at 224 px and the computation in bfloat16, unless
told otherwise.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from step_flops import (
  PAIRS,
  RESULTS,
  make_pair,
  objective,
  put,
  save,
  step_and_arguments,
)

from kdjax import parallel

KDJAX = ("kdjax", "kdjax_split")
TORCH = ("torch", "torch_compiled")
# expansion (0: none), channels, blocks, stride
_MOBILENET_V2 = (
  (0, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)


def kdjax_step(
  pair_name: str, batch: int, dtype: str, *, num_devices: int | None
) -> Callable[[], None]:
  """A step that returns when it is done; None: over all devices."""
  pair = make_pair(pair_name, batch, jnp.dtype(dtype))
  mesh = parallel.make_mesh(num_devices)
  step, arguments = step_and_arguments(pair, objective(pair), mesh)
  state, *rest = put(arguments(), mesh)

  def run() -> None:
    nonlocal state
    state, _ = step(state, *rest)
    jax.block_until_ready(state)

  return run


def torch_step(
  pair_name: str, batch: int, dtype: str, *, compiled: bool
) -> Callable[[], None]:
  """The same step, as a PyTorch training loop has it."""
  import torch  # pyright: ignore[reportMissingImports]
  from torch.nn import functional  # pyright: ignore[reportMissingImports]

  torch.manual_seed(0)
  cuda = torch.cuda.is_available()
  device = "cuda" if cuda else "cpu"
  *networks, pixels = PAIRS[pair_name]
  classes = 1000 if pixels > 32 else 100
  teacher, student = (
    torch_network(name, classes, **sizes)
    .to(device, memory_format=torch.channels_last)
    .train(n == 1)
    for n, (name, sizes) in enumerate(networks)
  )
  teacher.requires_grad_(False)
  optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
  image = torch.randn(batch, 3, pixels, pixels, device=device)
  image = image.to(memory_format=torch.channels_last)
  label = torch.arange(batch, device=device) % 100
  if compiled:
    teacher, student = torch.compile(teacher), torch.compile(student)

  def precision() -> Any:
    if dtype == "float32":
      return contextlib.nullcontext()
    return torch.autocast(device, getattr(torch, dtype))

  def run() -> None:
    with precision():
      with torch.no_grad():
        target = teacher(image)
      logits = student(image)
    logits, target = logits.float(), target.float()
    soft = functional.kl_div(
      functional.log_softmax(logits / 4, 1),
      functional.softmax(target / 4, 1),
      reduction="batchmean",
    )
    loss = 0.1 * functional.cross_entropy(logits, label) + 0.9 * 16 * soft
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    if cuda:
      torch.cuda.synchronize()

  return run


def torch_network(
  name: str,
  classes: int,
  *,
  depth: int = 0,
  width: int = 16,
  stem_width: int = 0,
) -> Any:
  """The networks of `kdjax.models` that the pairs here have, in PyTorch."""
  from torch import nn  # pyright: ignore[reportMissingImports]

  class Sum(nn.Module):
    def __init__(self, main: nn.Module, beside: nn.Module):
      super().__init__()
      self.main, self.beside = main, beside

    def forward(self, x: Any) -> Any:
      return self.main(x) + self.beside(x)

  def conv(i: int, o: int, size: int, stride: int = 1, act: Any = nn.ReLU, g=1):
    layers = [
      nn.Conv2d(i, o, size, stride, size // 2, groups=g, bias=False),
      nn.BatchNorm2d(o),
    ]
    return nn.Sequential(*layers, *([act(inplace=True)] if act else []))

  def residual(i: int, width: int, stride: int, expansion: int) -> Any:
    if expansion:
      o = expansion * width
      main = [conv(i, width, 1), conv(width, width, 3, stride)]
      main.append(conv(width, o, 1, act=None))
    else:
      o = width
      main = [conv(i, o, 3, stride), conv(o, o, 3, act=None)]
    same = stride == 1 and i == o
    beside = nn.Identity() if same else conv(i, o, 1, stride, act=None)
    return nn.Sequential(Sum(nn.Sequential(*main), beside), nn.ReLU())

  def inverted(i: int, t: int, o: int, stride: int) -> Any:
    wide = max(t, 1) * i
    main = [conv(i, wide, 1, act=nn.ReLU6)] if t else []
    main.append(conv(wide, wide, 3, stride, act=nn.ReLU6, g=wide))
    main = nn.Sequential(*main, conv(wide, o, 1, act=None))
    return Sum(main, nn.Identity()) if stride == 1 and i == o else main

  def head(channels: int, *before: Any) -> list[Any]:
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), *before]
    return [*pool, nn.Linear(channels, classes)]

  if name == "mobilenet_v2":
    channels, layers = 32, [conv(3, 32, 3, 2, nn.ReLU6)]
    for t, o, count, stride in _MOBILENET_V2:
      for n in range(count):
        layers.append(inverted(channels, t, o, stride if n == 0 else 1))
        channels = o
    layers.append(conv(channels, 1280, 1, act=nn.ReLU6))
    return nn.Sequential(*layers, *head(1280, nn.Dropout(0.2)))
  if name == "resnet":
    counts, expansion, width, channels = (3, 4, 6, 3), 4, 64, 64
    assert depth == 50, depth
    layers = [conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
  else:
    counts, expansion, channels = (
      ((depth - 2) // 6,) * 3,
      0,
      stem_width or width,
    )
    assert name == "resnet_cifar", name
    layers = [conv(3, channels, 3)]
  for stage, count in enumerate(counts):
    own = width * 2**stage
    for n in range(count):
      stride = 2 if stage > 0 and n == 0 else 1
      layers.append(residual(channels, own, stride, expansion))
      channels = own * (expansion or 1)
  return nn.Sequential(*layers, *head(channels))


def make_step(name: str, *given: Any) -> Callable[[], None]:
  if name in KDJAX:
    return kdjax_step(*given, num_devices=1 if name == "kdjax" else None)
  return torch_step(*given, compiled=name == "torch_compiled")


def work(step: Callable[[], Any]) -> None:
  """A contestant: for each line that it reads, a step and its seconds."""
  for _ in range(3):
    step()
  print("ready", flush=True)
  for _ in sys.stdin:
    wall, cores = time.perf_counter(), time.process_time()
    step()
    wall, cores = time.perf_counter() - wall, time.process_time() - cores
    print(wall, cores, flush=True)


def start(
  name: str, *given: Any, script: str = __file__
) -> "subprocess.Popen[str]":
  environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  if name == "kdjax_split":
    flag = f"--xla_force_host_platform_device_count={os.cpu_count()}"
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
  process = subprocess.Popen(
    [sys.executable, script, "--work", name, *map(str, given)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    env=environment,
  )
  answer(process)
  return process


def answer(process: "subprocess.Popen[str]") -> str:
  assert process.stdout is not None
  line = process.stdout.readline()
  if not line:
    sys.exit(f"a contestant ended early: {process.args}")
  return line


def one_step(process: "subprocess.Popen[str]") -> tuple[float, ...]:
  """Its seconds, of the wall and of all cores."""
  assert process.stdin is not None
  process.stdin.write("\n")
  process.stdin.flush()
  return tuple(map(float, answer(process).split()))


def compare(
  names: Sequence[str],
  given: Sequence[Any],
  repeats: int,
  *,
  script: str = __file__,
) -> dict:
  """Steps in turn -> the median seconds of each, and the first's / its own."""
  processes = {name: start(name, *given, script=script) for name in names}
  try:
    rounds = [
      {name: one_step(p) for name, p in processes.items()}
      for _ in range(repeats)
    ]
  finally:
    for process in processes.values():
      process.kill()
      process.wait()
  rows = {}
  for name in names:
    rows[name] = {"seconds": statistics.median(r[name][0] for r in rounds)}
    for n, what in enumerate(("wall", "cores")):
      ratios = [r[names[0]][n] / r[name][n] for r in rounds]
      rows[name][what] = statistics.quantiles(ratios, n=4)
  return rows


def show(rows: dict) -> None:
  print(f"{'':16}{'seconds':>9}{'wall':>8}{'':14}{'cores':>8}")
  for name, row in rows.items():
    ratios = [
      f"{median:8.2f} {f'({low:.2f}-{high:.2f})':13}"
      for low, median, high in (row["wall"], row["cores"])
    ]
    print(f"{name:16}{row['seconds']:9.4f}{''.join(ratios)}")


def main(arguments: Sequence[str] | None = None) -> None:
  on_cpu = jax.default_backend() == "cpu"
  default = "resnet32x4_to_resnet8x4" if on_cpu else "resnet50_to_mobilenet_v2"
  names = ("kdjax", "kdjax_split", "torch") if on_cpu else ("kdjax", *TORCH)
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--pair", choices=PAIRS, default=default)
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
  parser.add_argument("--repeats", type=int, default=10)
  parser.add_argument(
    "--contestants", nargs="+", choices=(*KDJAX, *TORCH), default=names
  )
  parser.add_argument("--out", type=Path, default=RESULTS / "torch_step.json")
  given = parser.parse_args(arguments)
  names = given.contestants
  if {*names} & {*TORCH} and not importlib.util.find_spec("torch"):
    print("PyTorch is not installed: pip install torch==2.13.0")
    sys.exit(2)
  settings = (given.pair, given.batch, given.dtype)
  rows = compare(names, settings, given.repeats)
  print(f"{given.pair}, batch {given.batch}, {given.dtype}")
  show(rows)
  used = [n for n in names if n in TORCH]
  version = importlib.metadata.version("torch") if used else None
  save(given.out, torch=version, settings=settings, rows=rows)


if __name__ == "__main__":
  if sys.argv[1:2] == ["--work"]:
    name, pair_name, batch, dtype = sys.argv[2:]
    work(make_step(name, pair_name, int(batch), dtype))
  else:
    main()
