"""SimKD: the student's projected features under the teacher's classifier."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kdjax import losses, parallel
from kdjax.adapters import ALL_TAPS, from_nnx, tap_specs
from kdjax.errors import UserError
from kdjax.objective import Objective, Term
from kdjax.simkd import deployed, simkd
from kdjax.train_step import init_state, jit_step, make_train_step
from kdjax.types import Output

CLASSES, KEY = 5, jax.random.key(0)
RNG = np.random.default_rng(0)
BATCH = {
  "image": RNG.normal(size=(8, 4, 4, 2)).astype(np.float32),
  "label": RNG.integers(0, CLASSES, 8).astype(np.int32),
  "mask": np.ones(8, np.float32),
}


class Net(nnx.Module):
  """Two stages; the second halves the map, unless its stride is 1."""

  def __init__(self, width, rngs, stride=2, bias=True, head="classifier"):
    def conv(inputs, outputs, stride):
      return nnx.Conv(inputs, outputs, (3, 3), strides=stride, rngs=rngs)

    self.first = conv(2, width, 1)
    self.norm = nnx.BatchNorm(width, rngs=rngs)
    self.second = conv(width, 2 * width, stride)
    self.head = head
    setattr(
      self, head, nnx.Linear(2 * width, CLASSES, use_bias=bias, rngs=rngs)
    )

  def __call__(self, x):
    x = nnx.relu(self.norm(self.first(x)))
    y = nnx.relu(self.second(x))
    pooled = jnp.mean(y, axis=(1, 2))
    taps = {"stage_1": x, "stage_2": y, "pooled": pooled}
    return Output(getattr(self, self.head)(pooled), taps)


def network(width, **kwargs):
  return from_nnx(lambda rngs: Net(width, rngs, **kwargs))


@functools.cache
def teacher():
  model = network(6)
  params, stats = jax.jit(model.init)(jax.random.key(9), BATCH)
  bias = jnp.asarray(RNG.normal(size=CLASSES), jnp.float32)
  classifier = params["classifier"] | {"bias": bias}
  return model, (params | {"classifier": classifier}, stats)


@functools.cache
def student():
  return simkd(network(3), *teacher(), BATCH)


@functools.cache
def variables():
  return jax.jit(student().init)(KEY, BATCH)


def applied(model, variables, *taps, train=False):
  apply = functools.partial(model.apply, train=train, taps=taps)
  return jax.jit(apply)(*variables, BATCH)


def under_classifier(features, classifier):
  kernel = np.float64(classifier["kernel"])
  return np.float64(features) @ kernel + np.float64(classifier.get("bias", 0.0))


def test_logits_are_the_teachers_classifier_of_the_mean_projection():
  output, _ = applied(student(), variables(), "projected")
  projected = np.float64(output.taps["projected"])
  np.testing.assert_allclose(
    output.logits,
    under_classifier(projected.mean((1, 2)), teacher()[1][0]["classifier"]),
    rtol=1e-5,
    atol=1e-6,
  )
  assert np.abs(output.logits).max() > 1e-2


def test_the_projection_has_the_shape_of_the_teachers_map():
  specs = tap_specs(student(), variables(), BATCH)
  theirs = tap_specs(*teacher(), BATCH)
  assert specs["projected"].shape == theirs["stage_2"].shape == (8, 2, 2, 12)
  assert set(specs) == {"stage_1", "stage_2", "pooled", "projected"}
  assert specs["stage_2"].shape == (8, 2, 2, 6)


def test_a_larger_map_is_averaged_to_the_teachers_size():
  larger = simkd(network(3, stride=1), *teacher(), BATCH)
  specs = tap_specs(larger, jax.eval_shape(larger.init, KEY, BATCH), BATCH)
  assert specs["stage_2"].shape == (8, 4, 4, 6)
  assert specs["projected"].shape == (8, 2, 2, 12)


def test_only_the_taps_asked_for_come_back():
  for taps in ((), ("stage_1",), ("projected",), ("stage_2", "projected")):
    apply = functools.partial(student().apply, train=False, taps=taps)
    output, _ = jax.eval_shape(apply, *variables(), BATCH)
    assert set(output.taps) == set(taps)
  with pytest.raises(UserError, match="unknown tap 'stage_9'"):
    applied(student(), variables(), "stage_9")


def test_the_classifier_is_the_teachers_and_the_students_is_gone():
  params, stats = student().init(KEY, BATCH)
  assert set(params) == {"student", "projector"}
  assert set(params["student"]) == {"first", "norm", "second"}
  theirs = teacher()[1][0]["classifier"]
  jax.tree.map(np.testing.assert_array_equal, stats["classifier"], theirs)
  # Copies: the state is donated, the teacher's variables are not.
  for ours, own in zip(
    jax.tree.leaves(stats["classifier"]), jax.tree.leaves(theirs)
  ):
    assert ours.unsafe_buffer_pointer() != own.unsafe_buffer_pointer()
  served = deployed(variables())
  assert set(served) == {"student", "projector", "classifier"}
  plain = teacher()[1]
  assert deployed(plain) is plain[0]


def test_a_classifier_without_bias_is_inherited_as_it_is():
  model = network(6, bias=False)
  given = jax.jit(model.init)(jax.random.key(9), BATCH)
  inheriting = simkd(network(3), model, given, BATCH)
  own = jax.jit(inheriting.init)(KEY, BATCH)
  assert set(own[1]["classifier"]) == {"kernel"}
  output, _ = applied(inheriting, own, "projected")
  np.testing.assert_allclose(
    output.logits,
    under_classifier(
      np.float64(output.taps["projected"]).mean((1, 2)),
      given[0]["classifier"],
    ),
    rtol=1e-5,
    atol=1e-6,
  )


def test_a_perfect_projection_gives_the_teachers_logits():
  model, given = teacher()
  twin = simkd(model, model, given, BATCH, factor=1)
  params, stats = jax.jit(twin.init)(KEY, BATCH)
  trunk = {k: v for k, v in given[0].items() if k != "classifier"}
  # The identity, on a map that is not negative: BN divides by √(1 + 1e-5).
  same = {
    name: {
      "conv": {"kernel": np.zeros((size, size, 12, 12), np.float32)},
      "norm": {
        "scale": np.full(12, (1 + 1e-5) ** 0.5, np.float32),
        "bias": np.zeros(12, np.float32),
      },
    }
    for name, size in (("reduce", 1), ("mix", 3), ("expand", 1))
  }
  for name, layer in same.items():
    middle = 1 if name == "mix" else 0
    layer["conv"]["kernel"][middle, middle] = np.eye(12)
  params = {"student": trunk, "projector": same}
  output, _ = applied(twin, (params, stats), "projected")
  want, _ = applied(*teacher(), "stage_2")
  np.testing.assert_allclose(
    output.taps["projected"], want.taps["stage_2"], rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(output.logits, want.logits, rtol=1e-5, atol=1e-6)


GOAL = Objective(
  (Term("features", losses.hint, taps=("projected", "stage_2")),)
)


@functools.cache
def trained(devices, steps):
  """Variables before, after each step, and the losses."""
  tx = optax.sgd(0.2, momentum=0.9)
  mesh = parallel.make_mesh(devices)
  frozen = teacher()[1]
  args = student(), teacher()[0], GOAL, tx
  init = jax.jit(lambda key: init_state(*args, key, BATCH, frozen=frozen))
  state = init(KEY)
  before = jax.device_get((state.params, state.stats))
  state = parallel.put(state, mesh)
  step = jit_step(make_train_step(*args), mesh)
  frozen, batch = parallel.put(frozen, mesh), parallel.put_batch(BATCH, mesh)
  after, seen = [], []
  for _ in range(steps):
    state, metrics = step(state, frozen, batch)
    seen.append(float(metrics["loss/features"]))
    after.append(jax.device_get((state.params, state.stats)))
  return before, after, seen


def test_training_moves_trunk_and_projector_and_never_the_classifier():
  (params, stats), after, seen = trained(1, 25)
  new_params, new_stats = after[-1]
  assert seen[-1] < 0.5 * seen[0]

  def moved(a, b):
    assert not np.allclose(a, b, rtol=0, atol=1e-5)

  for part in ("student", "projector"):
    kernels = [
      dict(jax.tree_util.tree_leaves_with_path(tree[part]))
      for tree in (params, new_params)
    ]
    for path, kernel in kernels[0].items():
      if "kernel" in str(path):
        moved(kernel, kernels[1][path])
    jax.tree.map(moved, stats[part], new_stats[part])
  jax.tree.map(
    np.testing.assert_array_equal,
    new_stats["classifier"],
    jax.device_get(teacher()[1][0]["classifier"]),
  )


def test_no_gradient_reaches_the_classifier():
  params, stats = variables()

  def total(params, stats):
    output, _ = student().apply(params, stats, BATCH, train=True)
    return jnp.sum(output.logits**2)

  ours, _ = jax.tree_util.tree_flatten_with_path(
    jax.jit(jax.grad(total))(params, stats)
  )
  assert not [path for path, _ in ours if "classifier" in str(path)]
  assert any(np.abs(g).max() > 1e-3 for _, g in ours)


def test_evaluation_changes_no_statistics():
  _, new = applied(student(), variables())
  jax.tree.map(np.testing.assert_array_equal, new, variables()[1])


def test_eight_devices_are_one():
  one, eight = trained(1, 25), trained(8, 3)
  np.testing.assert_allclose(one[2][:3], eight[2], rtol=1e-5)
  # Batch norms divide by deviations whose means are summed in another order.
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5),
    one[1][2],
    eight[1][2],
  )


def test_what_simkd_cannot_use_is_refused():
  theirs, given = teacher()
  headless = network(6, head="top")
  no_head = jax.eval_shape(headless.init, KEY, BATCH)
  with pytest.raises(UserError, match=r"teacher has .*'top'.*'classifier'"):
    simkd(network(3), headless, no_head, BATCH)
  with pytest.raises(UserError, match=r"student has .*'top'.*'classifier'"):
    simkd(network(3, head="top"), theirs, given, BATCH)
  with pytest.raises(UserError, match="unknown student tap 'stag_2': did you"):
    simkd(network(3), theirs, given, BATCH, tap="stag_2")
  with pytest.raises(UserError, match=r"unknown teacher tap 'layer_\*"):
    simkd(network(3), theirs, given, BATCH, teacher_tap="layer_*")
  with pytest.raises(UserError, match="unknown student tap 'pooled'"):
    simkd(network(3), theirs, given, BATCH, tap="pooled")  # no map


def test_a_smaller_map_of_the_student_keeps_its_size():
  theirs = network(6, stride=1)
  given = jax.eval_shape(theirs.init, KEY, BATCH)
  model = simkd(network(3), theirs, given, BATCH)
  assert tap_specs(theirs, given, BATCH)["stage_2"].shape == (8, 4, 4, 12)
  shapes = jax.eval_shape(
    lambda given: simkd(network(3), theirs, given, BATCH).init(KEY, BATCH),
    given,
  )
  specs = tap_specs(model, shapes, BATCH)
  assert specs["projected"].shape == (8, 2, 2, 12)


def test_other_taps_than_the_last_can_be_named():
  model = simkd(
    network(3), *teacher(), BATCH, tap="stage_1", teacher_tap="stage_2"
  )
  shapes = jax.eval_shape(model.init, KEY, BATCH)
  reduce = shapes[0]["projector"]["reduce"]["conv"]["kernel"]
  assert reduce.shape == (1, 1, 3, 6)  # stage_1's channels, 12 / factor
  assert tap_specs(model, shapes, BATCH)["projected"].shape == (8, 2, 2, 12)
  apply = functools.partial(model.apply, train=True, taps=ALL_TAPS)
  output, stats = jax.eval_shape(apply, *shapes, BATCH)
  assert output.logits.shape == (8, CLASSES)
  assert set(stats) == {"student", "projector", "classifier"}
