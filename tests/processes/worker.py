"""One process of a run, for the tests: `python tests/process_worker.py TASK`.

meet   ends once all agree
loop   adds up over all devices, for as long as it may
own    process 1 alone finds a mistake, while the others compute
all    every process finds the same mistake
curve  distils a tiny network; writes losses and the rows that were read
"""

import argparse
import functools
import hashlib
import json
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kdjax import adapters, data, distill, parallel, processes
from kdjax.errors import UserError

STEPS = 12


def main(argv=None):
  parser = argparse.ArgumentParser()
  parser.add_argument("task", choices=TASKS)
  parser.add_argument("--out", type=Path)
  parser.add_argument("--facts", type=json.loads, default={})
  parser.add_argument("--steps", type=int, default=STEPS)
  parser.add_argument("--coordinator")
  parser.add_argument("--processes", type=int)
  parser.add_argument("--process", type=int)
  parser.add_argument("--lost_seconds", type=float, default=60)
  parser.add_argument("--start_seconds", type=float, default=60)
  given = parser.parse_args(argv)

  def body():
    place = processes.find(given.coordinator, given.processes, given.process)
    processes.initialize(
      place,
      given.facts,
      start_seconds=given.start_seconds,
      lost_seconds=given.lost_seconds,
    )
    return TASKS[given.task](given)

  return processes.run(body, {UserError: 2})


def meet(given):
  return 0


def loop(given):
  mesh = parallel.make_mesh()
  add = jax.jit(jnp.sum, out_shardings=parallel.replicated(mesh))
  rows = np.ones(jax.local_device_count(), np.float32)
  x = parallel.put_batch({"x": rows}, mesh)["x"]
  index = jax.process_index()
  (given.out / f"pid_{index}").write_text(str(os.getpid()))
  for step in range(1_000_000):
    assert float(add(x)) == mesh.size
    (given.out / f"step_{index}").write_text(str(step))
    if step == 3 and given.task == "own" and index == 1:
      raise UserError("process 1 alone does not like this")
    time.sleep(0.01)
  return 0


def wait(given):
  """As where a GPU waits for another's: no collective fails."""
  index = jax.process_index()
  for step in range(1_000_000):
    (given.out / f"step_{index}").write_text(str(step))
    time.sleep(0.01)
  return 0


def all_refuse(given):
  raise UserError("all find the same mistake")


class Net(nnx.Module):
  def __init__(self, width, rngs):
    self.hidden = nnx.Linear(64, width, rngs=rngs)
    self.classifier = nnx.Linear(width, 10, rngs=rngs)

  def __call__(self, image):
    return self.classifier(nnx.relu(self.hidden(image.reshape(-1, 64))))


class Recorded:
  """Batches, and what this process read of each."""

  def __init__(self, batches):
    self.batches, self.read = batches, []

  def __iter__(self):
    for batch in self.batches:
      pixels = [hashlib.sha256(x.tobytes()).hexdigest() for x in batch["image"]]
      self.read.append([batch["index"].tolist(), pixels])
      yield batch


def curve(given):
  """Replicated, or "split": parameters over pairs of processes and devices."""
  split = dict(data=1, fsdp=2, model=4) if given.task == "split" else {}
  rules = [(r"hidden/kernel$", ("fsdp", "model"))]
  mesh = parallel.make_mesh(**split)
  student, teacher = (
    adapters.from_nnx(functools.partial(Net, width)) for width in (32, 64)
  )
  block, blocks = parallel.data_share(mesh)
  share = dict(process_index=block, process_count=blocks)
  pixels = dict(mean=0.3, std=0.35, **share)
  source, test = (
    data.load("digits", split, data_dir=given.out / "data")
    for split in ("train", "test")
  )
  batches = Recorded(
    data.train_batches(
      source,
      batch_size=16,
      seed=3,
      augment=functools.partial(data.crop_and_flip, padding=1, flip=False),
      num_threads=0,
      **pixels,
    )
  )
  distill(
    student=student,
    teacher=teacher,
    teacher_variables=teacher.init(jax.random.key(1), next(iter(batches))),
    train=batches,
    evaluate_on=data.eval_batches(test, batch_size=80, **pixels),
    steps=given.steps,
    save_every=STEPS // 2,
    optimizer=optax.sgd(0.1, momentum=0.5),
    mesh=mesh,
    partition=rules,
    teacher_partition=rules,
    folder=given.out / "run",
  )
  # The first two were read to trace the networks.
  order = json.dumps(batches.read[-STEPS:])
  (given.out / f"order_{jax.process_index()}").write_text(order)
  return 0


TASKS = {
  "meet": meet,
  "loop": loop,
  "wait": wait,
  "own": loop,
  "all": all_refuse,
  "curve": curve,
  "split": curve,
}


if __name__ == "__main__":
  raise SystemExit(main())
