"""Saving and resuming, through damage, donation and kill -9."""

import collections
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kdjax import checkpoint
from kdjax.checkpoint import Checkpointer
from kdjax.errors import UserError
from kdjax.types import TrainState

LARGE = 40_000  # floats; Orbax does not notice a flipped byte among so many


def make(seed=0, step=0, width=4, tx=None, size=3):
  key = jax.random.key(seed)
  params = {
    "dense": {"kernel": jax.random.normal(key, (size, width)), "bias": None},
    "layers": [jnp.full(2, seed, jnp.bfloat16), jnp.arange(3) + seed],
  }
  tx = tx or optax.sgd(0.1, momentum=0.9)
  return TrainState(
    step=jnp.asarray(step),
    params=params,
    stats={"mean": jnp.ones(width)},
    opt_state=tx.init(params),
    key=jax.random.fold_in(key, 1),
  )


def bits(tree):
  """Every leaf as (dtype, shape, bytes), beside the structure."""
  leaves, structure = jax.tree.flatten(tree)

  def one(x):
    data = np.asarray(
      jax.random.key_data(x)
      if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
      else x
    )
    return str(x.dtype), data.shape, data.tobytes()

  return structure, [one(x) for x in leaves]


def write(folder, *steps, **kwargs):
  with Checkpointer(folder, **kwargs) as saver:
    for step in steps:
      saver.save(step, make(step, step, size=LARGE))


def files(folder):
  """The checkpoint's files, largest (the arrays' bytes) first."""
  found = [p for p in Path(folder).rglob("*") if p.is_file()]
  return sorted(found, key=lambda p: -p.stat().st_size)


def test_everything_comes_back_bit_for_bit(tmp_path):
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.masked(
      optax.adamw(optax.linear_schedule(1, 0, 9)), {"w": True, "b": False}
    ),
    optax.inject_hyperparams(optax.sgd)(0.1),
    optax.identity(),
  )
  params = {"w": jnp.asarray([1e-42, -0.0, jnp.nan]), "b": jnp.zeros((0, 2))}
  opt_state = tx.init(params)
  _, opt_state = tx.update(
    jax.tree.map(jnp.ones_like, params), opt_state, params
  )
  state = TrainState(
    step=jnp.asarray(7),
    params=params,
    stats={},
    opt_state=opt_state,
    key=jax.random.key(3, impl="rbg"),
    term_params={"hint": {"w": jnp.ones((2, 2), jnp.bfloat16)}},
    term_state={"bank": {"key": jax.random.split(jax.random.key(1), 2)}},
  )
  facts = {"teacher": "abc", "nested": {"a": [1, 2.5, None]}}
  with Checkpointer(tmp_path / "run") as saver:
    saver.save(7, state, position={"next_index": 70}, facts=facts)
    saver.save(8, state, position=b"\x00\xff", facts=facts)
    saver.save(9, state)
    last = saver.restore(state)
    assert saver.steps == [8, 9]
  assert last is not None
  assert bits(last.state) == bits(state)
  assert (last.step, last.position, last.facts) == (9, None, {})
  (tmp_path / "run" / "9").rename(tmp_path / "away")
  second = checkpoint.restore(tmp_path / "run", state)
  assert (second.step, second.position, second.facts) == (8, b"\x00\xff", facts)


def test_position_of_a_mapping(tmp_path):
  with Checkpointer(tmp_path) as saver:
    saver.save(1, make(), position={"next_index": 70})
    assert saver.restore(make()).position == {"next_index": 70}


def test_a_metric_that_is_not_finite_is_no_damage(tmp_path):
  notes = []
  with Checkpointer(tmp_path, metric="eval/nll") as saver:
    saver.save(1, make(), metrics={"eval/nll": 1.0})
    saver.save(2, make(), metrics={"eval/nll": float("nan")})
    assert saver.restore(make(), notes.append).step == 2
  assert notes == []


def test_a_save_in_flight_holds_the_values_of_its_moment(tmp_path):
  update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  params = {f"w{n}": jnp.zeros(50_000) for n in range(8)}
  state = TrainState(jnp.asarray(0), params, {}, (), jnp.asarray(0))
  with Checkpointer(tmp_path, keep_last=9) as saver:
    for step in range(6):
      saver.save(step, state)
      for _ in range(5):
        state = update(state)
    like = jax.eval_shape(lambda: state)
    for step in range(5, -1, -1):
      saver.wait()
      restored = checkpoint.restore(tmp_path, like)
      assert restored.step == step
      for leaf in jax.tree.leaves(restored.state):
        np.testing.assert_array_equal(leaf, 5 * step)
      (tmp_path / str(step)).rename(tmp_path / f"seen_{step}")


def test_what_is_written_shares_no_memory_with_the_state(tmp_path, monkeypatch):
  handed = []
  keep = checkpoint.folder.ocp.args.PyTreeSave
  monkeypatch.setattr(
    checkpoint.folder.ocp.args,
    "PyTreeSave",
    lambda item: handed.append(item) or keep(item),
  )
  state = make(size=LARGE)
  with Checkpointer(tmp_path) as saver:
    saver.save(1, state)
  ours = np.asarray(state.params["dense"]["kernel"])
  theirs = handed[0]["params/dense/kernel"]
  np.testing.assert_array_equal(ours, theirs)
  assert not np.shares_memory(ours, theirs)


def test_eight_devices_and_donation_after_restoring(tmp_path):
  mesh = Mesh(np.array(jax.devices()), ("data",))
  whole = NamedSharding(mesh, PartitionSpec())
  split = NamedSharding(mesh, PartitionSpec("data"))
  state = TrainState(
    jax.device_put(0, whole),
    {"w": jax.device_put(jnp.arange(4096.0), whole)},
    {"m": jax.device_put(jnp.arange(16.0), split)},
    (),
    jax.device_put(jax.random.key(0), whole),
  )
  with Checkpointer(tmp_path) as saver:
    saver.save(1, state)
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  for target in (state, like):
    got = checkpoint.restore(tmp_path, target).state
    assert bits(got) == bits(state)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(state)):
      assert a.sharding == b.sharding
    # Were the eight copies one buffer, an update in place would count 8 times.
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    w = add(add(got.params["w"]))
    for shard in w.addressable_shards:
      np.testing.assert_array_equal(shard.data, np.arange(4096.0) + 2)


def test_what_lay_nowhere_in_particular_still_does(tmp_path):
  state = make()
  assert not state.step.committed
  with Checkpointer(tmp_path) as saver:
    saver.save(1, state)
  restored = checkpoint.restore(tmp_path, state).state
  assert not any(x.committed for x in jax.tree.leaves(restored))


@pytest.mark.parametrize("higher", [False, True])
def test_keeps_the_newest_and_the_best(tmp_path, higher):
  sign = -1 if higher else 1
  options = {"metric": "eval/nll", "keep_last": 2, "higher_is_better": higher}
  values = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 4.0}
  with Checkpointer(tmp_path, **options) as saver:
    for step, value in values.items():
      saver.save(step, make(), metrics={"eval/nll": sign * value})
    saver.wait()
    assert saver.steps == [2, 4, 5]
  # The score outlives the process, and a worse or unmeasured step is no best.
  with Checkpointer(tmp_path, **options) as saver:
    saver.restore(make())
    saver.save(6, make())
    saver.save(7, make(), metrics={"eval/nll": sign * 1.5})
    saver.wait()
    assert saver.steps == [2, 6, 7]
    saver.save(8, make(), metrics={"eval/nll": sign * 0.5})
    saver.wait()
    assert saver.steps == [7, 8]
  with pytest.raises(UserError, match="eval/nll"):
    saver.save(9, make(), metrics={"eval/nlll": 1.0})


def test_a_copy_beside_them_is_no_checkpoint(tmp_path):
  write(tmp_path, 1)
  (tmp_path / "1").rename(tmp_path / "best_1")
  assert checkpoint.steps(tmp_path) == []
  assert checkpoint.restore(tmp_path, make(size=LARGE)) is None


def test_the_newest_alone_when_no_metric_is_named(tmp_path):
  write(tmp_path, 1, 2, 3, keep_last=1)
  assert checkpoint.steps(tmp_path) == [3]
  with pytest.raises(UserError, match="keep_last=0"):
    Checkpointer(tmp_path, keep_last=0)


def flip(folder):
  path = files(folder / "state")[0]
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def truncate(folder):
  path = files(folder / "state")[0]
  path.write_bytes(path.read_bytes()[:-1000])


def delete(folder):
  files(folder / "state")[0].unlink()


def flip_meta(folder):
  path = folder / "meta" / "metadata"
  path.write_text(path.read_text().replace('"position"', '"positiom"'))


def no_manifest(folder):
  (folder / "state" / "manifest.ocdbt").unlink()


def mesh_of(*shape):
  devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
  return Mesh(devices, ("a", "b"))


def sharded(step, mesh):
  """A state over both axes of a mesh: arrays, a key, keys, a number."""

  def put(x, *spec):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

  key = jax.random.key(step)
  params = {
    "first": put(jax.random.normal(key, (64, LARGE // 16)), "a", "b"),
    "second": put(-jax.random.normal(key, (64, LARGE // 16)), "a", "b"),
    "half": put(jnp.arange(16.0, dtype=jnp.bfloat16) + step, ("b", "a")),
    "every": put(jnp.arange(5) + step),
  }
  return TrainState(
    step=put(jnp.asarray(step)),
    params=params,
    stats={},
    opt_state=(),
    key=put(jax.random.key(step, impl="rbg")),
    term_state={"keys": put(jax.random.split(key, 8), "a")},
  )


def shapes(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def test_from_mesh_to_mesh(tmp_path):
  state, meshes = sharded(1, mesh_of(8, 1)), [(2, 4), (1, 1), (4, 2)]
  for n, shape in enumerate(meshes):
    with Checkpointer(tmp_path / str(n)) as saver:
      saver.save(1, state)
    like = sharded(0, mesh_of(*shape))
    got = checkpoint.restore(tmp_path / str(n), like).state
    again = checkpoint.restore(tmp_path / str(n), shapes(like)).state
    for found in (got, again):
      assert bits(found) == bits(sharded(1, mesh_of(1, 1)))
      for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(like)):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    assert checkpoint.fingerprint(got) == checkpoint.fingerprint(state)
    state = got


def swap(folder):
  """Two arrays of one shape change places."""
  state = sharded(50, mesh_of(2, 4))
  params = dict(state.params)
  params["first"], params["second"] = params["second"], params["first"]
  other = folder.parent.parent / "swapped"
  with Checkpointer(other) as saver:
    saver.save(50, state.replace(params=params))
  shutil.rmtree(folder / "state")
  shutil.copytree(other / "50" / "state", folder / "state")


@pytest.mark.parametrize("damage", [flip, truncate, swap])
def test_falls_back_from_damage_to_what_is_sharded(tmp_path, damage):
  with Checkpointer(tmp_path / "run") as saver:
    for step in (40, 50):
      saver.save(step, sharded(step, mesh_of(4, 2)))
  damage(tmp_path / "run" / "50")
  notes = []
  like = sharded(0, mesh_of(2, 4))
  restored = checkpoint.restore(tmp_path / "run", like, notes.append)
  assert restored.step == 40
  assert bits(restored.state) == bits(sharded(40, mesh_of(1, 1)))
  assert "step 50 is damaged" in notes[0]
  if damage is swap:
    assert "params/first, params/second" in notes[0]


def test_what_is_saved_survives_the_next_steps_donation(tmp_path):
  """Of sharded and of replicated arrays, over and over."""
  spoil = jax.jit(
    lambda t: jax.tree.map(lambda x: x * 0 - 7, t), donate_argnums=0
  )
  with Checkpointer(tmp_path, keep_last=9) as saver:
    for step in range(1, 6):
      state = sharded(step, mesh_of(2, 4))
      saver.save(step, state)
      jax.block_until_ready(spoil(state.params))
  like = sharded(0, mesh_of(2, 4))
  for step in range(5, 0, -1):
    restored = checkpoint.restore(tmp_path, like)
    assert restored.step == step
    assert bits(restored.state) == bits(sharded(step, mesh_of(1, 1)))
    (tmp_path / str(step)).rename(tmp_path / f"seen_{step}")


DAMAGE = [flip, truncate, delete, flip_meta, no_manifest]


@pytest.mark.parametrize("damage", DAMAGE)
def test_falls_back_from_damage_and_goes_on(tmp_path, damage, capfd):
  write(tmp_path, 40, 50)
  damage(tmp_path / "50")
  like = make(size=LARGE)
  notes = []
  with Checkpointer(tmp_path) as saver:
    restored = saver.restore(like, notes.append)
    assert restored.step == 40
    assert bits(restored.state) == bits(make(40, 40, size=LARGE))
    assert len(notes) == 1
    assert "\n" not in notes[0]
    assert "step 50 is damaged" in notes[0]
    assert "using step 40" in notes[0]
    assert saver.steps == [40, 50]
    # An earlier step than the damaged one must become the newest.
    saver.save(45, make(45, size=LARGE))
    saver.wait()
    assert saver.steps == [40, 45]
    saver.save(50, make(51, size=LARGE))
    again = saver.restore(like, notes.append)
    assert again.step == 50
    assert bits(again.state) == bits(make(51, size=LARGE))
  assert len(notes) == 1
  assert capfd.readouterr().err == ""


def test_damage_to_many_arrays_is_told_in_one_line(
  tmp_path, monkeypatch, caplog
):
  params = {f"w{n}": jnp.ones(1000) * n for n in range(200)}
  state = TrainState(jnp.asarray(0), params, {}, (), jax.random.key(0))
  with Checkpointer(tmp_path) as saver:
    saver.save(1, state)
    saver.save(2, state)
  no_manifest(tmp_path / "2")
  stray, notes = [], []
  monkeypatch.setattr(sys, "unraisablehook", stray.append)
  for _ in range(8):
    assert checkpoint.restore(tmp_path, state, notes.append).step == 1
  assert len(notes) == 8
  assert stray == []
  assert caplog.records == []


def test_the_step_found_damaged_is_written_anew(tmp_path):
  write(tmp_path, 40, 50)
  flip(tmp_path / "50")
  like, notes = make(size=LARGE), []
  with Checkpointer(tmp_path) as saver:
    saver.restore(like, notes.append)
    saver.save(50, make(50, size=LARGE))
    assert saver.restore(like, notes.append).step == 50
    assert saver.steps == [40, 50]


def test_flipped_byte_names_the_array(tmp_path):
  write(tmp_path, 1, 2)
  flip(tmp_path / "2")
  notes = []
  checkpoint.restore(tmp_path, make(size=LARGE), notes.append)
  assert "checksum differs: " in notes[0]
  assert "dense/kernel" in notes[0]


def test_nothing_readable_and_nothing_there(tmp_path):
  like = make(size=LARGE)
  assert checkpoint.restore(tmp_path / "none", like) is None
  assert Checkpointer(tmp_path / "none").restore(like) is None
  assert checkpoint.steps(tmp_path / "none") == []
  with pytest.raises(UserError, match=r"no checkpoint in .*none"):
    checkpoint.load_params(tmp_path / "none", (like.params, like.stats))
  assert not (tmp_path / "none").exists()

  write(tmp_path / "run", 1, 2)
  flip(tmp_path / "run" / "1")
  truncate(tmp_path / "run" / "2")
  with pytest.raises(UserError, match=r"step 2 is damaged.*step 1 is damaged"):
    checkpoint.restore(tmp_path / "run", like)
  assert checkpoint.steps(tmp_path / "run") == [1, 2]


def test_another_network_is_refused_with_all_names(tmp_path):
  write(tmp_path, 1)
  before = files(tmp_path)
  other = make(width=5, size=LARGE, tx=optax.sgd(0.1))
  params = {**other.params, "extra": jnp.ones(1, jnp.int32)}
  params["layers"] = [jnp.ones(2), params["layers"][1]]
  with pytest.raises(UserError) as error:
    checkpoint.restore(tmp_path, other.replace(params=params))
  for line in (
    "missing params/extra int32[1]",
    "surplus opt_state/0/trace/dense/kernel float32[40000,4]",
    "surplus opt_state/0/trace/layers/0 bfloat16[2]",
    "params/dense/kernel is float32[40000,4], needs to be float32[40000,5]",
    "params/layers/0 is bfloat16[2], needs to be float32[2]",
    "stats/mean is float32[4], needs to be float32[5]",
  ):
    assert line in str(error.value)
  assert "\n" not in str(error.value)
  assert files(tmp_path) == before


def test_another_kind_of_key_is_refused(tmp_path):
  write(tmp_path, 1)
  like = make(size=LARGE).replace(key=jax.random.key(0, impl="rbg"))
  with pytest.raises(UserError, match=r"key is key<fry>\[2\]"):
    checkpoint.restore(tmp_path, like)


def test_load_params_reads_the_network_alone(tmp_path):
  write(tmp_path, 1, 2)
  state = make(2, size=LARGE)
  like = jax.eval_shape(lambda: (state.params, state.stats))
  assert bits(checkpoint.load_params(tmp_path, like)) == bits(
    (state.params, state.stats)
  )
  with pytest.raises(UserError) as error:
    checkpoint.load_params(
      tmp_path, ({"layers": like[0]["layers"]}, {"n": 0.0})
    )
  assert "missing stats/n" in str(error.value)
  assert "surplus params/dense/kernel" in str(error.value)
  assert "surplus stats/mean" in str(error.value)
  assert "opt_state" not in str(error.value)
  flip(tmp_path / "2")
  notes = []
  params, _ = checkpoint.load_params(tmp_path, like, notes.append)
  assert bits(params) == bits(make(1, size=LARGE).params)
  assert "using step 1" in notes[0]


def test_a_step_saved_twice(tmp_path):
  like = make()
  with Checkpointer(tmp_path) as saver:
    saver.save(1, make(1))
    saver.save(2, make(2))
    saver.save(1, make(3))
    saver.save(2, make(3))
    assert bits(saver.restore(like).state) == bits(make(2))
    saver.save(2, make(3))
    assert bits(saver.restore(like).state) == bits(make(2))
  # Of unknown origin: this run never looked at it.
  with Checkpointer(tmp_path) as saver:
    saver.save(2, make(4))
    assert bits(saver.restore(like).state) == bits(make(4))


def test_a_run_that_did_not_resume_overwrites_nothing_newer(tmp_path):
  write(tmp_path, 10, 20)
  with Checkpointer(tmp_path) as saver:
    for step in (10, 15):
      with pytest.raises(UserError, match="holds step 20"):
        saver.save(step, make())
  assert checkpoint.steps(tmp_path) == [10, 20]


# Orbax's other tasks are not heard of: neither through Python's hook for what
# nobody catches, nor in asyncio's log.
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_failed_write_is_raised_and_costs_nothing(tmp_path, caplog):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  state = make(size=LARGE)
  with Checkpointer(tmp_path, keep_last=1) as saver:
    saver.save(1, state)
    saver.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
      saver.save(2, state)
      with pytest.raises(UserError) as error:
        saver.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot save step 2" in str(error.value)
    assert "File too large" in str(error.value)
    assert "MB are free" in str(error.value)
    assert "step 1 is the last good checkpoint" in str(error.value)
    assert "\n" not in str(error.value)
    assert saver.steps == [1]
    saver.save(2, state)
    saver.wait()
    assert saver.steps == [2]
  assert not [r for r in caplog.records if r.name == "asyncio"]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_fills_up(tmp_path):
  small = tmp_path / "small"
  small.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(small)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("no file system can be mounted here")
  try:
    state = make(size=4 * LARGE)
    with Checkpointer(small / "run", keep_last=1) as saver:
      saver.save(1, make(1))
      saver.save(2, state)
      with pytest.raises(UserError, match=r"No space left on .*step 1 is the"):
        saver.wait()
    # What was half-written is gone once the folder is opened again.
    with Checkpointer(small / "run", keep_last=1) as saver:
      assert saver.restore(make()).step == 1
      saver.save(2, make(2))
    assert checkpoint.steps(small / "run") == [2]
  finally:
    subprocess.run(["umount", str(small)], check=True)


def test_a_folder_that_cannot_be_written_into_is_told(tmp_path):
  (tmp_path / "file").write_text("")
  for folder in (tmp_path / "file", tmp_path / "file" / "run"):
    with pytest.raises(UserError, match=r"cannot write into .*file"):
      Checkpointer(folder).save(1, make())


WRITER = """
import sys
import jax, jax.numpy as jnp
from kdjax.checkpoint import Checkpointer
from kdjax.types import TrainState

def state(n):
  w = jax.random.normal(jax.random.key(n), (1_000_000,))
  return TrainState(jnp.asarray(n), {"w": w}, {}, (), jax.random.key(n))

with Checkpointer(sys.argv[1], keep_last=3) as saver:
  restored = saver.restore(state(0))
  step = restored.step if restored else 0
  while True:
    step += 1
    saver.save(step, state(step))
    saver.wait()
    print(step, flush=True)
"""


def killed_in_mid_save(folder, delay):
  """Kills a writer while it writes; the last step that it called complete."""
  writer = subprocess.Popen(
    [sys.executable, "-c", WRITER, str(folder)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  assert writer.stdout is not None
  done = [int(writer.stdout.readline()) for _ in range(2)][-1]
  deadline = time.monotonic() + 30
  while not list(folder.glob("*tmp*")) and time.monotonic() < deadline:
    time.sleep(0.001)
  time.sleep(delay)
  os.kill(writer.pid, signal.SIGKILL)
  out, err = writer.communicate()
  assert err == ""
  return int(out.split()[-1]) if out.split() else done


def check_after_kill(folder, done):
  like = TrainState(
    jnp.asarray(0), {"w": jnp.zeros(1_000_000)}, {}, (), jax.random.key(0)
  )
  notes = []
  with Checkpointer(folder, keep_last=3) as saver:
    restored = saver.restore(like, notes.append)
    assert restored is not None
    # The kill may fall between the commit and the word of it.
    assert restored.step in (done, done + 1)
    key = jax.random.key(restored.step)
    expected = jax.random.normal(key, (1_000_000,))
    np.testing.assert_array_equal(restored.state.params["w"], expected)
    saver.save(restored.step + 1, restored.state)
  assert notes == []
  assert not list(folder.glob("*tmp*"))
  assert checkpoint.steps(folder)[-1] == restored.step + 1


def test_kill_in_mid_save(tmp_path):
  check_after_kill(tmp_path, killed_in_mid_save(tmp_path, delay=0.0))


@pytest.mark.slow
def test_kill_in_mid_save_again_and_again(tmp_path):
  for delay in np.linspace(0.0, 0.12, 6):
    check_after_kill(tmp_path, killed_in_mid_save(tmp_path, delay))


def test_litter_of_a_killed_run_goes_when_it_is_opened_for_writing(tmp_path):
  write(tmp_path, 1)
  litter = tmp_path / "3.orbax-checkpoint-tmp" / "state"
  litter.mkdir(parents=True)
  like = make(size=LARGE)
  assert checkpoint.restore(tmp_path, like).step == 1
  checkpoint.load_params(tmp_path, (like.params, like.stats))
  assert litter.exists()  # a reader must not disturb a run that is alive
  with Checkpointer(tmp_path) as saver:
    saver.save(2, like)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_meta_is_readable_by_anyone_and_holds_no_teacher(tmp_path):
  with Checkpointer(tmp_path) as saver:
    saver.save(3, make(), facts={"teacher": "f00"}, metrics={"eval/nll": 1.5})
  meta = json.loads((tmp_path / "3" / "meta" / "metadata").read_text())
  assert meta["facts"] == {"teacher": "f00"}
  assert meta["metrics"] == {"eval/nll": 1.5}
  fields = {name.split("/")[0] for name in meta["arrays"]}
  assert fields == {"step", "params", "stats", "opt_state", "key"}


def test_fingerprint_sees_names_dtypes_shapes_and_bytes():
  a = {"x": np.arange(6, dtype=np.float32), "y": {"z": np.ones(2, np.int32)}}
  same = checkpoint.fingerprint(a)
  assert len(same) == 32
  assert checkpoint.fingerprint({"y": a["y"], "x": jnp.asarray(a["x"])}) == same
  mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
  split = NamedSharding(mesh, PartitionSpec("data"))
  assert (
    checkpoint.fingerprint({**a, "x": jax.device_put(a["x"], split)}) == same
  )
  others = [
    {**a, "x": a["x"].reshape(2, 3)},
    {**a, "x": a["x"].view(np.int32)},
    {**a, "x": np.nextafter(a["x"], np.float32(9))},
    {"x": a["x"], "y": {"w": a["y"]["z"]}},
    {"x": a["x"]},
    {"x": a["x"].reshape(3, 2).T, "y": a["y"]},
  ]
  prints = [checkpoint.fingerprint(t) for t in others]
  assert len({same, *prints}) == 1 + len(others)
  # By value, whatever the layout in memory.
  assert checkpoint.fingerprint(a["x"].reshape(2, 3).T) == (
    checkpoint.fingerprint(np.ascontiguousarray(a["x"].reshape(2, 3).T))
  )
  assert checkpoint.fingerprint(jax.random.key(0)) != (
    checkpoint.fingerprint(jax.random.key_data(jax.random.key(0)))
  )


def test_fingerprint_does_not_depend_on_the_order_of_insertion():
  ab = collections.OrderedDict(a=np.zeros(1), b=np.ones(1))
  ba = collections.OrderedDict(b=np.ones(1), a=np.zeros(1))
  assert checkpoint.fingerprint(ab) == checkpoint.fingerprint(ba)


def test_two_arrays_of_one_name_are_refused():
  with pytest.raises(UserError, match="2 arrays share 1 names"):
    checkpoint.fingerprint({"a/b": np.ones(1), "a": {"b": np.ones(1)}})
