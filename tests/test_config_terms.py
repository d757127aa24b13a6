"""A config's terms: which loss on which taps, by which map and projector."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from kdjax import config, losses, term_inputs, terms, totals
from kdjax.errors import UserError
from kdjax.types import Output

BATCH, CLASSES = 6, 5
RNG = np.random.default_rng(0)
SHAPES = {
  "student": {
    "stage_1": (4, 4, 3),
    "stage_2": (2, 2, 6),
    "pooled": (6,),
    "distillation_logits": (CLASSES,),
    "block_1": (3, 6),
    "block_2": (3, 6),
  },
  "teacher": {
    "stage_1": (4, 4, 3),
    "stage_2": (2, 2, 8),
    "stage_3": (1, 1, 8),
    "pooled": (8,),
    "block_1": (3, 8),
    "block_2": (3, 8),
  },
}


def output(side):
  taps = {
    name: RNG.normal(size=(BATCH, *shape)).astype(np.float32)
    for name, shape in SHAPES[side].items()
  }
  logits = 2 * RNG.normal(size=(BATCH, CLASSES)).astype(np.float32)
  return Output(logits, taps)


STUDENT, TEACHER = output("student"), output("teacher")
ROWS = {
  "label": jnp.arange(BATCH) % CLASSES,
  "mask": jnp.asarray([1, 1, 0, 1, 1, 1.0]),
  "index": jnp.arange(BATCH),
}
KEEP = np.asarray(ROWS["mask"]) > 0
SETTINGS = dict(
  alpha=0.25,
  hard_weight=None,
  soft_weight=None,
  temperature=2.0,
  hard=dict(name="cross_entropy", label_smoothing=0.0),
  soft=dict(name="kl"),
)


def made(num_examples=0, **entries):
  """The further terms of a config that holds these entries, sorted by it."""
  goal = config.goal(
    ConfigDict(SETTINGS | dict(terms=entries)),
    SHAPES["student"],
    SHAPES["teacher"],
    num_examples,
  )
  return goal.terms[2:]


def initial(term):
  def init(key):
    return term_inputs.init_term(term, key, STUDENT, TEACHER, ROWS)

  return jax.jit(init)(jax.random.key(0))


def loss(term, step=0):
  """`loss/<name>` and its share of the total, by the step's own way."""

  @jax.jit
  def run(student, teacher, rows, step):
    divide_by = totals.denominators([term], rows)
    if term.reads_logits:
      args = [term], student.logits, teacher.logits, rows, divide_by
      shares, sums = totals.logit_terms(*args, step)
    else:
      variables = ({}, {})
      if term.init is not None:
        variables = initial(term)
      shares, sums, _ = totals.other_terms(
        [term],
        student,
        teacher,
        rows,
        divide_by,
        step,
        {term.name: variables[0]},
        {term.name: variables[1]},
        jax.random.key(1),
      )
    value, weight = sums[term.name]
    return value / weight, shares[term.group]

  return run(STUDENT, TEACHER, ROWS, step)


def hint(student, teacher, **more):
  return dict(name="hint", weight=1.0, student=student, teacher=teacher) | more


def test_one_pair_of_taps_is_one_term_of_that_name():
  (term,) = made(near=hint("stage_1", "stage_1", weight=3.0))
  assert term.name == "near"
  assert term.taps == ("stage_1", "stage_1")
  assert term.group == "extra"
  gap = np.float64(STUDENT.taps["stage_1"]) - TEACHER.taps["stage_1"]
  want = (gap[KEEP] ** 2).mean()
  np.testing.assert_allclose(loss(term), (want, 3 * want), rtol=1e-5)


def test_arguments_reach_a_loss_on_taps_and_may_be_schedules():
  power = dict(
    schedule="linear_schedule",
    init_value=1.0,
    end_value=3.0,
    transition_steps=2,
  )
  far, near = made(
    near=hint("stage_1", "stage_1", distance="l1"),
    far=dict(
      name="attention_transfer",
      weight=dict(
        schedule="linear_schedule",
        init_value=0.0,
        end_value=4.0,
        transition_steps=4,
      ),
      student="stage_1",
      teacher="stage_1",
      power=power,
    ),
  )
  gap = np.float64(STUDENT.taps["stage_1"]) - TEACHER.taps["stage_1"]
  np.testing.assert_allclose(loss(near)[0], np.abs(gap[KEEP]).mean(), rtol=1e-5)
  value, share = loss(far, step=1)
  maps = [
    (np.float64(x.taps["stage_1"]) ** 2).sum(-1).reshape(BATCH, -1)
    for x in (STUDENT, TEACHER)
  ]
  ours, theirs = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in maps)
  want = ((ours - theirs) ** 2).mean(-1)[KEEP].mean()
  np.testing.assert_allclose(value, want, rtol=1e-5)
  np.testing.assert_allclose(share, 1.0 * want, rtol=1e-5)


def test_a_pattern_makes_a_term_of_each_pair_of_its_map():
  got = made(
    each=hint("stage_[12]", "stage_[12]"),
    evenly=hint("stage_[12]", "stage_[123]", map="evenly"),
    last=hint("stage_[12]", "stage_[123]", map="last"),
  )
  assert [(t.name, *t.taps) for t in got] == [
    ("each/stage_1", "stage_1", "stage_1"),
    ("each/stage_2", "stage_2", "stage_2"),
    ("evenly/stage_1", "stage_1", "stage_2"),
    ("evenly/stage_2", "stage_2", "stage_3"),
    ("last/stage_1", "stage_1", "stage_2"),
    ("last/stage_2", "stage_2", "stage_3"),
  ]


def test_taps_may_be_listed_one_by_one():
  got = made(h=hint(["stage_1", "pooled"], ["stage_3", "pooled"]))
  assert [(t.name, *t.taps) for t in got] == [
    ("h/stage_1", "stage_1", "stage_3"),
    ("h/pooled", "pooled", "pooled"),
  ]
  (one,) = made(h=hint(["pooled"], "pooled"))
  assert (one.name, one.taps) == ("h", ("pooled", "pooled"))


def test_a_projector_is_made_for_each_pair():
  got = made(
    h=hint(
      "stage_[12]",
      "stage_[12]",
      projector=dict(name="mlp", num_hidden=1, hidden=7, norm=True),
    )
  )
  assert [t.name for t in got] == ["h/stage_1", "h/stage_2"]
  for term, (inputs, outputs) in zip(got, ((3, 3), (6, 8))):
    assert term.init is not None
    assert term.coupled
    params, _ = jax.eval_shape(functools.partial(initial, term))
    layers = params["projector"]["0"]
    assert layers["layer_0"]["kernel"].shape == (inputs, 7)
    assert layers["layer_1"]["kernel"].shape == (7, outputs)
    assert np.isfinite(loss(term)[0])
  (plain,) = made(h=hint("stage_1", "stage_1", projector=None))
  assert plain.init is None


def test_stages_that_a_loss_reads_together_are_one_term():
  (review,) = made(
    r=dict(
      name="review",
      weight=1.0,
      student="stage_[12]",
      teacher="stage_[123]",
      map="last",
      mid_channels=4,
    )
  )
  assert review.name == "r"
  assert review.taps == (("stage_1", "stage_2"), ("stage_2", "stage_3"))
  flow = made(
    f=dict(
      name="flow",
      weight=1.0,
      student=["stage_1", "stage_2", "stage_1"],
      teacher=["stage_1", "stage_2", "stage_3"],
    )
  )
  assert [(t.name, t.taps) for t in flow] == [
    ("f/stage_1+stage_2", (("stage_1", "stage_2"), ("stage_1", "stage_2"))),
    ("f/stage_2+stage_1", (("stage_2", "stage_1"), ("stage_2", "stage_3"))),
  ]


def test_a_loss_of_logits_on_taps_keeps_its_scale():
  settings = dict(name="kl", weight=1.0, temperature=3.0)
  head, named, plain = made(
    plain=settings,
    named=settings | dict(student="logits", teacher="logits"),
    head=settings | dict(student="distillation_logits", teacher="logits"),
  )
  assert plain.taps is None
  assert named.taps == ("logits", "logits")
  np.testing.assert_allclose(loss(named), loss(plain), rtol=1e-6)
  of_head = losses.kl(
    STUDENT.taps["distillation_logits"], TEACHER.logits, temperature=3.0
  )
  np.testing.assert_allclose(
    loss(head)[0], 9 * np.float64(of_head)[KEEP].mean(), rtol=1e-5
  )


def test_a_term_that_owns_variables_gets_its_arguments():
  mgd, nce, vid = made(
    vid=dict(
      name="variational_information",
      weight=2.0,
      student="stage_2",
      teacher="stage_2",
      initial_variance=4.0,
      projector=dict(name="linear"),
    ),
    mgd=dict(
      name="masked_generative",
      weight=1.0,
      student="stage_1",
      teacher="stage_1",
      mask_ratio=0.5,
    ),
    nce=dict(
      name="info_nce",
      weight=1.0,
      student="pooled",
      teacher="pooled",
      temperature=0.2,
      embedding=4,
    ),
  )
  assert (vid.name, vid.weight(0), vid.taps) == (
    "vid",
    2.0,
    ("stage_2", "stage_2"),
  )
  params, _ = initial(vid)
  np.testing.assert_allclose(
    jax.nn.softplus(params["term"]["raw_variance"]) + 1e-5, 4.0, rtol=1e-5
  )
  assert mgd.hparams["mask_ratio"] == 0.5
  assert nce.hparams["temperature"](0) == np.float32(0.2)


CRD = dict(name="crd", weight=0.8, student="pooled", teacher="pooled")


def test_a_bank_has_a_row_for_each_example_of_the_data():
  (term,) = made(300, c=CRD | dict(embedding=4, num_negatives=3))
  _, state = jax.eval_shape(functools.partial(initial, term))
  rows, width = state["student_bank"].shape
  assert rows >= 300
  assert width == 4
  made(300, c=CRD | dict(num_examples=300))
  with pytest.raises(UserError, match=r"of 299 rows .* 300 examples"):
    made(300, c=CRD | dict(num_examples=299))


def test_every_loss_and_term_can_be_named():
  for name in {**losses.TAP_LOSSES, **terms.TERMS}:
    taps, more = "stage_[12]", {}
    if name == "self_relations":
      taps, more = "block_[12]", {"num_relation_heads": 2}
    got = made(
      300, t=dict(name=name, weight=1.0, student=taps, teacher=taps) | more
    )
    assert len(got) == (1 if name in ("review", "flow") else 2), name
  for name in {**losses.LOGIT_LOSSES, **losses.SPAN_LOSSES}:
    (term,) = made(t=dict(name=name, weight=1.0))
    assert term.reads_logits


@pytest.mark.parametrize(
  ("entry", "says"),
  [
    (3, "terms.t is 3, must be a mapping"),
    (dict(weight=1.0), "terms.t lacks 'name'"),
    (dict(name="hint"), "terms.t lacks 'weight'"),
    (
      dict(name="hnt", weight=1.0),
      "unknown loss of terms.t 'hnt': did you mean 'hint'",
    ),
    (dict(name="hint", weight=1.0), "terms.t lacks 'student'"),
    (
      dict(name="hint", weight=1.0, student="stage_1"),
      "terms.t lacks 'teacher': name the teacher's tap",
    ),
    (hint("stage_1", "stage_1", weight="much"), "weight of terms.t is 'much'"),
    (hint("stage_1", "stage_1", weight=None), "terms.t lacks 'weight'"),
    (
      hint("stag_1", "stage_1"),
      "terms.t: unknown student tap 'stag_1': did you mean 'stage_1'. known: "
      "block_1, block_2, distillation_logits, pooled, stage_1, stage_2",
    ),
    (hint("stage_1", "layer_*"), "known: block_1, .*stage_2, stage_3"),
    (hint(["stage_9"], ["stage_1"]), "unknown student tap 'stage_9'"),
    (hint("logits", "stage_[12]"), r"unknown teacher tap 'stage_\[12\]'"),
    (hint(["stage_1", "stage_2"], "stage_1"), "maps 2 student taps to 1"),
    (hint(["stage_1"] * 7, "stage_1"), "maps 7 student taps to 1 teacher"),
    (hint([], []), "maps 0 student taps to 0 teacher taps"),
    (hint(3, "stage_1"), "got the taps 3, needs a name"),
    (hint("stage_[12]", "stage_[123]"), "matches 2 student taps"),
    (hint("stage_1", "stage_1", map="evnly"), "did you mean 'evenly'"),
    (hint("stage_1", "stage_1", map=2), "unknown map '2'"),
    (hint(["stage_1"], ["stage_2"], map="evenly"), "map='evenly' is for two"),
    (hint("stage_[12]", "stage_3", map="last"), "to teacher layer -1"),
    (hint("stage_1", "stage_1", distnce="l1"), "did you mean 'distance'"),
    (hint("stage_1", "stage_1", where=1), "unknown argument of terms.t 'where"),
    (hint("stage_1", "stage_1", temperature=4.0), "hint takes none"),
    (
      dict(name="cross_entropy", weight=1.0, temperature=4.0),
      "cross_entropy takes none",
    ),
    (
      dict(name="kl", weight=1.0, skew=4.0),
      "unknown argument of terms.t 'skew'",
    ),
    (
      dict(name="kl", weight=1.0, teacher="logits"),
      "unknown argument of terms.t 'teacher'",
    ),
    (
      hint("stage_1", "stage_1", projector=dict(name="liner")),
      "unknown projector of terms.t 'liner': did you mean 'linear'",
    ),
    (
      hint("stage_1", "stage_1", projector=dict(norm=True)),
      "projector of terms.t lacks 'name'",
    ),
    (
      hint("stage_1", "stage_1", projector=dict(name="linear", nrm=True)),
      "unknown argument of projector of terms.t 'nrm': did you mean 'norm'",
    ),
    (
      hint("stage_1", "stage_1", projector="linear"),
      "projector of terms.t is 'linear', must be a mapping",
    ),
    (
      hint("logits", "logits", name="dkd", projector=dict(name="linear")),
      "a loss of labels",
    ),
    (hint("stage_1", "stage_1", name="flow"), "terms.t: got 1 pair of taps"),
    (CRD | dict(embeding=3), "did you mean 'embedding'"),
    (
      hint("stage_1", "stage_1", name="self_relations", num_relation_heads=2),
      "relates the queries, keys and values of a layer and got the tap",
    ),
    (hint("block_1", "block_1", name="self_relations"), "num_relation_heads"),
    (CRD | dict(num_examples=2), "of 2 rows is smaller than the dataset's 9"),
  ],
)
def test_mistakes_in_a_term_are_one_line_each(entry, says):
  with pytest.raises(UserError, match=says) as told:
    made(9, t=entry)
  assert "\n" not in str(told.value)


def test_a_config_without_terms_needs_no_taps():
  goal = config.goal(ConfigDict(SETTINGS | dict(terms={})))
  assert [t.name for t in goal.terms] == ["hard", "soft"]
  assert set(goal.shown) == {"alpha", "temperature"}
  assert goal.taps(0) == goal.taps(1) == ()
  assert optax.constant_schedule(0.25)(0) == goal.shown["alpha"](0)
