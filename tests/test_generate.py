"""Generation with a cache against the network that has none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_decoders import NAMES, golden

from kdjax.errors import UserError
from kdjax.generate import generate, nucleus
from kdjax.models.decoder import decoder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_transformers(name):
  stored = golden(name)
  found = generate(stored.net, stored.params, stored.tokens, max_new_tokens=8)
  np.testing.assert_array_equal(found.tokens, stored.greedy)
  np.testing.assert_array_equal(found.lengths, [8, 8])


def uncached(net, params, prompts, steps):
  """Greedy, from the whole row again at each token."""
  model = decoder(net)
  apply = lambda t: model.apply(params, {}, {"tokens": t}, train=False)  # noqa: E731
  run = jax.jit(lambda tokens: apply(tokens)[0].logits)
  found = []
  for prompt in prompts:
    row = np.zeros((1, 24), np.int32)  # what comes later is not seen
    row[0, : len(prompt)] = prompt
    log_probs = []
    for n in range(len(prompt), len(prompt) + steps):
      logits = np.asarray(run(row)[0, n - 1], np.float64)
      row[0, n] = np.argmax(logits)
      log_probs.append(logits.max() - np.logaddexp.reduce(logits))
    found.append((row[0, len(prompt) : len(prompt) + steps], log_probs))
  return map(np.array, zip(*found))


@pytest.mark.parametrize(
  "name", ["gpt2", pytest.param("mistral", marks=pytest.mark.slow)]
)
def test_padding_on_either_side_changes_nothing(name):
  stored = golden(name)
  lengths, steps, width = (3, 11, 7), 9, 11
  prompts = [stored.tokens[n % 2, n : n + k] for n, k in enumerate(lengths)]
  expected, log_probs = uncached(stored.net, stored.params, prompts, steps)
  left = [[*[5] * (width - len(p)), *p] for p in prompts]
  right = [[*p, *[5] * (width - len(p))] for p in prompts]
  right_mask = np.arange(width)[None] < np.array(lengths)[:, None]
  for prompts, mask in ((left, right_mask[:, ::-1]), (right, right_mask)):
    found = generate(
      stored.net,
      stored.params,
      np.array(prompts),
      max_new_tokens=steps,
      mask=mask,
    )
    np.testing.assert_array_equal(found.tokens, expected)
    # Differences of logits up to 5, each within 5e-6 of that.
    np.testing.assert_allclose(found.log_probs, log_probs, atol=3e-5)


def test_a_stop_token_ends_its_row_alone():
  stored = golden("gemma3")
  whole = stored.greedy
  stop = int(whole[0, 3])
  found = generate(
    stored.net,
    stored.params,
    stored.tokens,
    max_new_tokens=8,
    stop_tokens=(60, stop),
    pad_token=59,
  )
  for row, expected, length in zip(found.tokens, whole, found.lengths):
    ends = np.flatnonzero(np.isin(expected, (60, stop)))
    kept = ends[0] + 1 if len(ends) else 8
    assert length == kept
    np.testing.assert_array_equal(row[:kept], expected[:kept])
    assert (np.asarray(row[kept:]) == 59).all()
  after = np.arange(8)[None] >= found.lengths[:, None]
  np.testing.assert_array_equal(found.log_probs == 0, after)
  assert found.lengths[0] <= 4


@pytest.mark.slow
def test_samples_are_of_the_softened_distribution():
  """Frequencies of the first token of 4000 rows, within five deviations."""
  stored = golden("gpt2")
  rows = 4000
  prompt = stored.tokens[:1, :6]
  found = generate(
    stored.net,
    stored.params,
    np.tile(prompt, (rows, 1)),
    max_new_tokens=1,
    key=jax.random.key(0),
    sampling_temperature=2.0,
    num_classes=50,
  )
  z = stored.logits[0, 5, :50].astype(np.float64) / 2
  p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
  seen = np.bincount(np.asarray(found.tokens)[:, 0], minlength=61) / rows
  assert (seen[50:] == 0).all()
  deviation = np.sqrt(p * (1 - p) / rows)
  assert (np.abs(seen[:50] - p) < 5 * deviation + 1e-9).all()


def test_the_nucleus_is_the_fewest_classes_that_reach_p():
  p = np.array([[0.05, 0.5, 0.15, 0.3]], np.float32)
  logits = jnp.log(p)
  for top_p, kept in ((0.4, {1}), (0.6, {1, 3}), (0.81, {1, 2, 3})):
    found = np.asarray(nucleus(logits, jnp.float32(top_p)))[0]
    assert set(np.flatnonzero(np.isfinite(found))) == kept
    order = sorted(kept)
    np.testing.assert_array_equal(found[order], np.asarray(logits)[0, order])
  np.testing.assert_array_equal(nucleus(logits, jnp.float32(1.0)), logits)


REFUSED = {
  "context": (dict(max_new_tokens=24), "17 tokens and 24 new .* context is 40"),
  "none": (dict(max_new_tokens=0), "0 new ones"),
  "temperature": (dict(sampling_temperature=0.0), "must be above 0"),
  "top_p": (dict(top_p=0.0), r"top_p is 0.0, must be in \(0, 1\]"),
  "empty": (dict(mask=np.eye(2, 17) * [[1], [0]]), "prompt 1 has no token"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_told_in_a_line(name):
  change, message = REFUSED[name]
  stored = golden("gpt2")
  options = {"max_new_tokens": 4, "key": jax.random.key(0), **change}
  with pytest.raises(UserError, match=message):
    generate(stored.net, stored.params, stored.tokens, **options)
