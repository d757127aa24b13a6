"""Two networks of two tokenizers, from texts to the trained student."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import adapters, config, losses, objective, parallel, preflight
from kdjax.data import text
from kdjax.data.text import corpus
from kdjax.data.text.tokenizer import byte_level, wrap
from kdjax.errors import UserError
from kdjax.loop import distill
from kdjax.models.decoder import decoder
from kdjax.objective import Objective, Term, hinton
from kdjax.train_step import init_state, make_train_step

TEXTS = ["def f(x): return x", "naïve story of x"]
TAU = 20.0


def network(classes, head="dense"):
  net = dict(
    model_type="llama",
    vocab_size=classes,
    hidden_size=12,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=64,
  )
  return decoder(net, head=head)


OURS = byte_level()
THEIRS = wrap("bpe", corpus.train_bpe(iter(TEXTS * 2), 290))
STUDENT, TEACHER = network(260), network(290)
READER = adapters.reading(TEACHER, "teacher_")
# Some chance for every token, and far from the same.
FROZEN = jax.jit(TEACHER.init)(jax.random.key(1), {})
FROZEN = jax.tree.map(lambda x: 4 * np.asarray(x), FROZEN)
ALM = hinton(alpha=0.25, temperature=TAU, soft=losses.likelihood_matching)
ULD = hinton(alpha=0.25, temperature=2.0, soft=losses.universal_logits)
ADAM = optax.adam(1e-2)


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
  pairs = text.tokenize_pair(
    text.from_list(TEXTS), OURS, THEIRS, folder=tmp_path_factory.mktemp("pairs")
  )
  made = text.pair_batches(
    pairs,
    batch_size=2,
    sequence_length=24,
    teacher_length=22,
    seed=0,
    num_threads=0,
  )
  return next(iter(made))


def step_of(goal):
  return jax.jit(make_train_step(STUDENT, READER, goal, ADAM))


GOALS = {"alm": ALM, "uld": ULD}
STEPS = {name: step_of(goal) for name, goal in GOALS.items()}


# No term here has variables: the state is that of every goal.
BEGIN = jax.jit(functools.partial(init_state, STUDENT, READER, ALM, ADAM))


def start(batch):
  return BEGIN(jax.random.key(0), batch, frozen=FROZEN)


def measured(name, batch):
  return STEPS[name](start(batch), FROZEN, batch)[1]


@functools.cache
def log_softmax_of(model):
  @jax.jit
  def run(variables, tokens):
    output, _ = model.apply(*variables, {"tokens": tokens}, train=False)
    return jax.nn.log_softmax(output.logits)

  return run


def predicted(model, variables, tokenizer, sample):
  """log softmax at each token but the first, and the ends of their bytes."""
  (encoded,) = tokenizer.encode([sample])
  ids = [*tokenizer.prefix, *encoded.ids.tolist(), tokenizer.eos]
  # No token sees what comes after it: all texts may have one length.
  tokens = np.array([ids + [0] * (24 - len(ids))])
  log_p = log_softmax_of(model)(variables, tokens)[0]
  log_p = np.float64(log_p)[: len(ids)]
  # What ends a text comes after its last byte.
  ends = [*encoded.ends.tolist(), encoded.ends.max() + 1]
  # The logits at the token before, and the token that they predict.
  return log_p[:-1], np.array(ids[1:]), np.array(ends)


def spans(student_variables):
  """Of each span of each text: both sides' log p and labels, by its bytes."""
  for sample in TEXTS:
    sides = (
      predicted(STUDENT, student_variables, OURS, sample),
      predicted(TEACHER, FROZEN, THEIRS, sample),
    )
    common = sorted(set(sides[0][2].tolist()) & set(sides[1][2].tolist()))
    for after, until in itertools.pairwise([0, *common]):
      yield [
        (log_p[inside], label[inside])
        for log_p, label, ends in sides
        for inside in [(ends > after) & (ends <= until)]
      ]


def test_the_loss_is_that_of_the_texts(batch):
  """From the texts and the networks alone: a shift anywhere would show."""
  variables = start(batch).params, {}
  alm, uld = [], []
  of_text = list(spans(variables))
  for sides in of_text:
    (q, p) = (
      np.exp(sum(x[n, t] for n, t in enumerate(label)) / TAU)
      for x, label in sides
    )
    alm.append(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    tempered = [np.exp(x[0] / 2) / np.exp(x[0] / 2).sum() for x, _ in sides]
    b, a = (np.sort(np.pad(x, (0, 290 - len(x)))) for x in tempered)
    uld.append(np.abs(a - b).sum())
  assert max(len(sides[0][1]) for sides in of_text) > 1
  assert len(alm) == batch["span_mask"].sum()
  for name, temperature, want in (("alm", TAU, alm), ("uld", 2.0, uld)):
    got = measured(name, batch)
    # Times T to the power 1 that both declare.
    soft = temperature * np.mean(want)
    np.testing.assert_allclose(got["loss/soft"], soft, rtol=2e-5)
    total = 0.25 * got["loss/hard"] + 0.75 * soft
    np.testing.assert_allclose(got["loss/total"], total, rtol=2e-5)
    # One class is not the other's.
    assert "kl_at_1" not in got


def test_the_hard_loss_counts_the_students_tokens(batch):
  variables = start(batch).params, {}
  nll = []
  for sample in TEXTS:
    log_p, label, _ = predicted(STUDENT, variables, OURS, sample)
    nll.extend(-log_p[np.arange(len(label)), label])
  got = measured("alm", batch)["loss/hard"]
  np.testing.assert_allclose(got, np.mean(nll), rtol=1e-5)


@pytest.mark.parametrize("name", GOALS)
def test_a_student_learns_from_a_teacher_of_another_tokenizer(name, batch):
  state, seen = start(batch), []
  for _ in range(12):
    state, metrics = STEPS[name](state, FROZEN, batch)
    seen.append(float(metrics["loss/soft"]))
  assert seen[-1] < 0.75 * seen[0]


def test_a_config_names_the_losses(batch):
  settings = dict(
    alpha=0.25,
    hard_weight=None,
    soft_weight=None,
    temperature=TAU,
    hard=dict(name="cross_entropy"),
    soft=dict(name="likelihood_matching"),
    terms={},
  )
  want = measured("alm", batch)
  got = config.goal(settings)
  assert not got.comparable
  assert [t.group for t in got.terms] == ["hard", "soft"]
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6),
    step_of(got)(start(batch), FROZEN, batch)[1],
    want,
  )
  named = config.goal(
    settings
    | dict(
      soft=dict(name="likelihood_matching", divergence="total_variation"),
      terms=dict(uld=dict(name="universal_logits", weight=2.0, temperature=2)),
    )
  )
  values = jax.eval_shape(step_of(named), start(batch), FROZEN, batch)
  assert {"loss/soft", "loss/uld"} <= set(values[1])
  for wrong, says in (
    (dict(divergence="dkd"), "unknown divergence of soft 'dkd'"),
    (dict(span=1), "unknown argument of soft 'span'"),
    (dict(zscore=True), "zscore got likelihood_matching, which compares spans"),
    (dict(teacher_temperature=1.0), "which compares spans"),
  ):
    with pytest.raises(UserError, match=says):
      config.goal(settings | dict(soft=settings["soft"] | wrong))


@pytest.mark.slow
def test_the_loop_compares_nothing_class_by_class(batch):
  mesh = parallel.make_mesh(1)
  done = distill(
    student=STUDENT,
    teacher=READER,
    teacher_variables=FROZEN,
    train=itertools.repeat(batch),
    steps=1,
    evaluate_on=[batch],
    terms=ALM,
    optimizer=ADAM,
    mesh=mesh,
    quiet=True,
  )
  assert "eval/nll" in done.metrics
  assert not {"eval/kl", "kl_at_1"} & set(done.metrics)
  variables = done.variables
  preflight.check_outputs(
    STUDENT, READER, variables, FROZEN, batch, comparable=False
  )
  with pytest.raises(UserError, match="teacher has 290 classes, student 260"):
    preflight.check_outputs(STUDENT, READER, variables, FROZEN, batch)


def test_a_teacher_reads_its_own_arrays_alone(batch):
  own = {k: v for k, v in batch.items() if k.startswith("teacher_")}
  bare = {k.removeprefix("teacher_"): v for k, v in own.items()}
  taps = ("block_1",)
  want, _ = TEACHER.apply(*FROZEN, bare, train=False, taps=taps)
  for given in (own, batch):
    got, _ = READER.apply(*FROZEN, given, train=False, taps=taps)
    jax.tree.map(np.testing.assert_array_equal, got, want)
  shapes = jax.eval_shape(READER.init, jax.random.key(0), batch)
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, FROZEN)
  specs = adapters.tap_specs(READER, FROZEN, batch)
  assert specs["block_1"].shape == (2, 22, 12)
  with pytest.raises(UserError, match=r"reads the arrays teacher_\*, and the"):
    READER.apply(*FROZEN, bare, train=False)


def test_what_the_losses_lack_is_named(batch):
  fewer = {k: v for k, v in batch.items() if k != "teacher_span"}
  with pytest.raises(UserError, match=r"'soft' reads batch\['teacher_span'\]"):
    jax.eval_shape(STEPS["alm"], start(batch), FROZEN, fewer)
  fewer = {k: v for k, v in batch.items() if k != "span_mask"}
  with pytest.raises(UserError, match=r"batch\['span_mask'\].*pair_batches"):
    jax.eval_shape(STEPS["alm"], start(batch), FROZEN, fewer)
  linear = make_train_step(network(260, "linear"), READER, ALM, ADAM)
  with pytest.raises(UserError, match=r"'soft' reads many .*head=.dense"):
    jax.eval_shape(linear, start(batch), FROZEN, batch)


def test_a_term_on_the_logits_by_name_is_not_comparable_either():
  term = Term("t", losses.universal_logits, taps=("logits", "logits"))
  assert not Objective((term,)).comparable
  assert hinton(alpha=0.5).comparable


def test_no_term_beside_them_compares_token_by_token():
  objective.check(ALM, 1, has_teacher=True)
  for name, taps in (("kl", None), ("hint", ("block_1", "block_1"))):
    other = Term("other", getattr(losses, name), taps=taps)
    with pytest.raises(UserError, match=r"'other' compares .* token by token"):
      objective.check(ALM + [other], 1, has_teacher=True)
