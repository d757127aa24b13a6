"""Tokens as examples: masks of [B, S], by the step's own way."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses, projectors, term_inputs, terms, totals
from kdjax.errors import UserError
from kdjax.objective import Objective, Term
from kdjax.types import Output

B, S, CLASSES = 2, 4, 5
RNG = np.random.default_rng(0)
MASK = np.array([[1, 1, 0, 1], [0, 1, 1, 0]], np.float32)
KEEP = MASK > 0
KEY = jax.random.key(0)


def array(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def probabilities(*shape):
  return np.asarray(jax.nn.softmax(jnp.asarray(array(*shape))))


def output(width, heads, shared):
  return Output(
    array(B, S, CLASSES),
    {
      "hidden": array(B, S, width),
      "attention": probabilities(B, heads, S, S),
      "queries": array(B, heads, S, 3),
      "keys": array(B, shared, S, 3),
      "values": array(B, shared, S, 3),
      "pooled": array(B, width),
    },
  )


STUDENT, TEACHER, WIDE = output(6, 2, 2), output(6, 2, 2), output(8, 4, 2)
BATCH = {
  "mask": MASK,
  "label": RNG.integers(0, CLASSES, (B, S)),
  "segment_ids": np.array([[1, 1, 1, 2], [1, 1, 1, 0]]),
  "num_documents": np.array([2, 1]),
}


def total(term, student=STUDENT, teacher=TEACHER, batch=BATCH):
  """The term's share of the loss, with fresh variables."""

  @jax.jit
  def share(student, teacher, batch):
    params = state = {}
    if term.init is not None:
      params, state = term_inputs.init_term(term, KEY, student, teacher, batch)
    shares, _, _ = totals.other_terms(
      [term],
      student,
      teacher,
      batch,
      totals.denominators([term], batch),
      jnp.int32(0),
      {term.name: params},
      {term.name: state},
      KEY,
    )
    return shares["extra"]

  return share(student, teacher, batch)


def at(name, loss=losses.hint, **more):
  return Term("t", loss, taps=(name, name), **more)


def kept(output, name):
  """A tap's rows that count, [n, ...], in float64."""
  x = np.float64(output.taps[name])
  return (np.swapaxes(x, 1, 2) if x.ndim == 4 else x)[KEEP]


@pytest.mark.parametrize("name", ["hidden", "queries"])
def test_a_loss_of_each_token_is_averaged_over_those_that_count(name):
  gap = kept(STUDENT, name) - kept(TEACHER, name)
  np.testing.assert_allclose(total(at(name)), np.mean(gap**2), rtol=1e-5)


def test_attention_maps_count_the_queries_of_the_mask():
  q, p = kept(STUDENT, "attention"), kept(TEACHER, "attention")
  want = np.sum(p * np.log(p / q), -1).mean()
  got = total(at("attention", losses.attention_maps))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  q, p = q.mean(1), kept(WIDE, "attention").mean(1)
  got = total(at("attention", losses.attention_maps), teacher=WIDE)
  want = np.sum(p * np.log(p / q), -1).mean()
  np.testing.assert_allclose(got, want, rtol=1e-5)


def as_images(output, names):
  """The rows that count, as examples of a batch without tokens."""
  return Output(None, {n: np.float32(kept(output, n)) for n in names})


NORMED = projectors.project(at("hidden"), projectors.mlp(norm=True))
RELATED = at("hidden", losses.similarity_preserving)
TERMS = {
  "hint": at("hidden"),
  "queries": at("queries"),
  "attention": at("attention", losses.attention_maps),
  "coupled": RELATED,
  "projected": NORMED,
  "projected and coupled": projectors.project(RELATED, projectors.linear()),
  "variance": terms.variational_information(
    "t", ("hidden", "hidden"), weight=1.0
  ),
  "both normed": terms.simple("t", ("hidden", "hidden"), weight=1.0),
  "contrastive": terms.info_nce(
    "t", ("hidden", "hidden"), weight=1.0, embedding=3
  ),
  "several": Term(
    "t",
    lambda s, t: losses.hint(s[0], t[0]) + losses.hint(s[1], t[1]),
    taps=(("hidden", "queries"),) * 2,
  ),
}


@pytest.mark.parametrize("name", TERMS)
def test_tokens_are_to_a_term_what_examples_are(name):
  """Those of the mask alone, as a batch of vectors, give the same number."""
  term = TERMS[name]
  batch = {"mask": np.ones(KEEP.sum(), np.float32)}
  names = ("hidden", "queries", "attention")
  ours, theirs = (as_images(x, names) for x in (STUDENT, TEACHER))
  want = total(term, ours, theirs, batch)
  np.testing.assert_allclose(total(term), want, rtol=2e-5)


@pytest.mark.parametrize("name", TERMS)
def test_masked_tokens_move_nothing_even_when_they_are_nan(name):
  def spoil(x):
    if x.ndim < 3:
      return x
    where = KEEP[:, None, :, None] if x.ndim == 4 else KEEP[..., None]
    return np.where(where, x, np.nan)

  run = jax.jit(jax.value_and_grad(functools.partial(total, TERMS[name])))
  want, gradient = run(STUDENT, TEACHER)
  got, spoilt = run(*jax.tree.map(spoil, (STUDENT, TEACHER)))
  np.testing.assert_array_equal(got, want)
  jax.tree.map(np.testing.assert_array_equal, spoilt, gradient)
  for tap in ("hidden", "queries"):
    rows = gradient.taps[tap]
    rows = np.swapaxes(rows, 1, 2) if rows.ndim == 4 else rows
    np.testing.assert_array_equal(rows[~KEEP], 0)
  assert any(np.any(g) for g in gradient.taps.values())


def test_groups_of_a_coupled_loss_may_be_the_rows_of_the_batch():
  term = dataclasses.replace(RELATED, hparams={"group_size": S})
  want = []
  for b in range(B):
    rows = [x.taps["hidden"][b, KEEP[b]] for x in (STUDENT, TEACHER)]
    values = jax.jit(losses.similarity_preserving)(*rows)
    want.extend(np.asarray(values).tolist())
  np.testing.assert_allclose(total(term), np.mean(want), rtol=1e-5)


def test_labels_come_with_their_tokens():
  plain = Term("t", losses.dkd, temperature=2.0)

  @jax.jit
  def share(student, teacher, batch):
    divide_by = totals.denominators([plain], batch)
    given = [plain], student, teacher, batch, divide_by, jnp.int32(0)
    return totals.logit_terms(*given)[0]

  want = share(STUDENT.logits, TEACHER.logits, BATCH)
  named = dataclasses.replace(plain, taps=("logits", "logits"))
  np.testing.assert_allclose(total(named), want["extra"], rtol=1e-6)


def test_a_term_with_variables_gets_the_batch_by_tokens():
  seen = {}

  def loss(params, state, student, teacher, batch, key):
    seen.update({k: v.shape for k, v in batch.items()})
    seen["student"] = jax.tree.map(jnp.shape, student)
    return student.logits[:, 0], state

  term = Term("t", loss, init=lambda key, s, t: ({}, {}))
  ours, theirs = (
    x._replace(taps={n: x.taps[n] for n in ("queries", "attention")})
    for x in (STUDENT, TEACHER)
  )
  got = total(term, ours, theirs)
  np.testing.assert_allclose(got, STUDENT.logits[KEEP][:, 0].mean(), rtol=1e-5)
  # No number a token: what is said of a row stays outside.
  assert set(seen) == {"mask", "label", "segment_ids", "student"}
  assert seen["mask"] == seen["label"] == (B * S,)
  assert seen["student"].taps["queries"] == (B * S, 2, 3)
  assert seen["student"].taps["attention"] == (B * S, 2, S)


def test_a_mask_of_examples_leaves_their_tokens_together():
  mask = np.array([1.0, 0.0], np.float32)
  got = total(at("hidden"), batch={"mask": mask})
  gap = np.float64(STUDENT.taps["hidden"]) - TEACHER.taps["hidden"]
  np.testing.assert_allclose(got, np.mean(gap[0] ** 2), rtol=1e-5)
  got = total(at("attention", losses.attention_maps), batch={"mask": mask})
  q, p = (np.float64(x.taps["attention"][0]) for x in (STUDENT, TEACHER))
  want = np.sum(p * np.log(p / q), -1).mean()
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_an_activation_without_tokens_is_named():
  says = r"term 't' reads an activation of shape \(2, 6\), and the mask"
  with pytest.raises(UserError, match=says):
    total(at("pooled"))
  with pytest.raises(UserError, match=says):
    total(projectors.project(at("pooled"), projectors.linear()))


KINDS = ("queries", "keys", "values")
MINILM = Term(
  "t",
  losses.self_relations,
  taps=(KINDS, KINDS),
  hparams={"num_relation_heads": 2},
)


def test_relations_get_whole_rows_with_their_documents():
  run = jax.jit(functools.partial(losses.self_relations, num_relation_heads=2))
  both = [tuple(x.taps[k] for k in KINDS) for x in (STUDENT, WIDE)]
  values = run(*both, BATCH["segment_ids"])
  want = np.mean(np.float64(values)[KEEP])
  np.testing.assert_allclose(total(MINILM, teacher=WIDE), want, rtol=1e-5)
  fewer = {k: v for k, v in BATCH.items() if k != "segment_ids"}
  values = np.asarray(run(*both))
  got = total(MINILM, teacher=WIDE, batch=fewer)
  np.testing.assert_allclose(got, np.mean(values[KEEP]), rtol=1e-5)


def test_relations_take_no_projector():
  with pytest.raises(UserError, match="loss of whole sequences"):
    projectors.project(MINILM, projectors.linear())


def test_the_term_of_a_layer_reads_its_three_taps():
  term = terms.self_relations(
    "m", ("block_2", "block_12"), weight=0.5, num_relation_heads=4
  )
  assert Objective((term,)).taps(0) == ("queries_2", "keys_2", "values_2")
  assert Objective((term,)).taps(1) == ("queries_12", "keys_12", "values_12")
  assert term.weight == 0.5
  assert term.hparams == {"num_relation_heads": 4, "causal": True}
  values = terms.self_relations(
    "m", ("block_2",) * 2, weight=1.0, num_relation_heads=4, kinds=("values",)
  )
  assert values.taps == (("values_2",), ("values_2",))
  for wrong in ("final", "queries_2", "block_x", ("block_1", "block_2")):
    with pytest.raises(UserError, match="name the layer, such as 'block_6'"):
      terms.self_relations("m", (wrong,) * 2, weight=1, num_relation_heads=4)
  with pytest.raises(UserError, match="unknown kind of term 'm' 'heads'"):
    terms.self_relations(
      "m", ("block_2",) * 2, weight=1, num_relation_heads=4, kinds=("heads",)
    )


def test_a_mask_between_0_and_1_is_a_weight():
  mask = np.where(np.arange(S) == 1, 0.25, MASK).astype(np.float32)
  gap = np.float64(STUDENT.taps["hidden"]) - TEACHER.taps["hidden"]
  want = np.average(np.mean(gap**2, -1), weights=mask)
  got = total(at("hidden"), batch={"mask": mask})
  np.testing.assert_allclose(got, want, rtol=1e-5)
