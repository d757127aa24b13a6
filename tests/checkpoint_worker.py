"""One process of several, for `test_checkpoint_processes.py`.

Prints one JSON: what the test asked of it.
"""

import json
import os
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXES = ("a", "b")


def whole(step):
  """The values of a state, as NumPy sees them."""
  draw = np.random.default_rng(step)
  return {
    "both": draw.normal(size=(64, 48)).astype(np.float32),
    "one": draw.normal(size=(40_000,)).astype(np.float32),
    "half": draw.normal(size=(6, 8)).astype(jnp.bfloat16),
    "every": np.arange(5) + step,
    "empty": np.zeros((0, 4), np.float32),
  }


SPECS = {
  "both": PartitionSpec("a", "b"),
  "one": PartitionSpec(AXES),
  "half": PartitionSpec(None, "b"),
  "every": PartitionSpec(),
  "empty": PartitionSpec(),
}


def state(step, mesh):
  from kdjax.types import TrainState

  def put(x, spec):
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])

  everywhere = NamedSharding(mesh, PartitionSpec())
  key = jax.jit(jax.random.key, out_shardings=everywhere)(step)
  number = put(np.asarray(step, np.int32), PartitionSpec())
  params = {name: put(x, SPECS[name]) for name, x in whole(step).items()}
  return TrainState(number, params, {}, (), key)


def check(state, step):
  for name, x in whole(step).items():
    for shard in state.params[name].addressable_shards:
      np.testing.assert_array_equal(np.asarray(shard.data), x[shard.index])
  key = jax.random.key_data(state.key).addressable_shards[0].data
  want = jax.random.key_data(jax.random.key(step))
  np.testing.assert_array_equal(np.asarray(key), np.asarray(want))


def save(folder, mesh):
  """Steps 1 and 2; each state is donated as soon as its save returns."""
  from kdjax import checkpoint

  spoil = jax.jit(
    lambda t: jax.tree.map(lambda x: x * 0 - 7, t), donate_argnums=0
  )
  with checkpoint.Checkpointer(folder) as saver:
    for step in (1, 2):
      now = state(step, mesh)
      found = checkpoint.fingerprint(now)
      saver.save(step, now, position={"at": step})
      jax.block_until_ready(spoil(now.params))
    saver.wait()
    return {"steps": saver.steps, "fingerprint": found}


def apart(folder, mesh):
  """Each process's input stands elsewhere."""
  from kdjax import checkpoint

  with checkpoint.Checkpointer(folder) as saver:
    saver.save(1, state(1, mesh), position={"at": jax.process_index()})
  return restore(folder, mesh)


def alone(folder, mesh):
  from kdjax import checkpoint, errors

  try:
    checkpoint.restore(folder, state(0, mesh))
  except errors.UserError as error:
    return {"told": str(error)}


def restore(folder, mesh, again=False):
  from kdjax import checkpoint

  notes = []
  like = state(0, mesh)
  with checkpoint.Checkpointer(folder) as saver:
    got = saver.restore(like, notes.append)
    check(got.state, got.step)
    for a, b in zip(jax.tree.leaves(got.state), jax.tree.leaves(like)):
      assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    print_ = checkpoint.fingerprint(got.state)
    if again:
      saver.save(got.step + 1, state(got.step + 1, mesh))
      saver.wait()
    return {
      "step": got.step,
      "position": got.position,
      "fingerprint": print_,
      "notes": notes,
      "steps": saver.steps,
    }


def cut(folder, mesh):
  """Process 1 reads of a copy; then all write the next step together."""
  from kdjax.checkpoint import newest

  read = newest._read
  if jax.process_index() == 1:
    newest._read = lambda path, *arguments: read(
      path.parent.parent / "cut" / path.name, *arguments
    )
  return restore(folder, mesh, again=True)


def full(folder, mesh):
  """Process 1 can write no file that is large."""
  from kdjax import checkpoint, errors

  with checkpoint.Checkpointer(folder) as saver:
    saver.save(1, state(1, mesh))
    saver.wait()
    if jax.process_index() == 1:
      _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
      resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    began, told = time.monotonic(), ""
    try:
      saver.save(2, state(2, mesh))
      saver.wait()
    except errors.UserError as error:
      told = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    return {
      "told": told,
      "steps": saver.steps,
      "seconds": time.monotonic() - began,
    }


def sigterm(folder, mesh):
  """Trains without end, and says so at the fifth step."""
  from kdjax import checkpoint, preemption

  step = jax.jit(
    lambda s: s.replace(
      step=s.step + 1, params=jax.tree.map(lambda x: x + 1, s.params)
    ),
    donate_argnums=0,
  )
  now, number = state(0, mesh), 0
  with preemption.watched() as told, checkpoint.Checkpointer(folder) as saver:
    while not told():
      now, number = step(now), number + 1
      if number == 5:
        print("running", flush=True)
      time.sleep(0.02 * jax.process_index())  # not in step with one another
    saver.save(number, now)
    saver.wait()
  print(json.dumps(number), flush=True)
  jax.distributed.shutdown()
  sys.exit(143)


def main():
  number, count, port, devices, job, folder, *shape = sys.argv[1:]
  jax.config.update("jax_num_cpu_devices", int(devices))
  if int(count) > 1:
    jax.distributed.initialize(
      f"localhost:{port}", num_processes=int(count), process_id=int(number)
    )
  sizes = tuple(map(int, shape))
  mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 2)
  print(json.dumps(globals()[job](folder, mesh)), flush=True)


if __name__ == "__main__":
  os.environ.pop("XLA_FLAGS", None)
  main()
