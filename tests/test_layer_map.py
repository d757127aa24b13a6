"""Which layer of the student learns from which of the teacher."""

import pytest

from kdjax.errors import UserError
from kdjax.layer_map import consecutive, layer_pairs, matching

# As a mapping's keys would come: not in order.
BLOCKS = ["block_10", "pooled", "block_2", "stem", "block_1", "block_11"]


def names(count, word="block"):
  return [f"{word}_{n}" for n in range(1, count + 1)]


def layers(n, m, rule):
  """The teacher's layer, from 0, for each of the student's."""
  theirs = names(m)
  pairs = layer_pairs(names(n), theirs, "block_*", "block_*", rule)
  assert [a for a, _ in pairs] == names(n)
  return [theirs.index(b) for _, b in pairs]


def test_taps_come_in_the_order_that_people_count_in():
  want = ["block_1", "block_2", "block_10", "block_11"]
  assert matching("student", "block_*", BLOCKS) == want
  nested = ["blocks/10/mlp", "blocks/9/mlp", "blocks/9/norm", "blocks/10/norm"]
  assert matching("student", "blocks/*/mlp", nested) == [
    "blocks/9/mlp",
    "blocks/10/mlp",
  ]


@pytest.mark.parametrize(
  ("pattern", "want"),
  [
    ("pooled", ["pooled"]),
    ("block_?", ["block_1", "block_2"]),
    ("block_1*", ["block_1", "block_10", "block_11"]),
    ("block_[2-9]", ["block_2"]),
    ("block_1[!0]", ["block_11"]),
  ],
)
def test_a_pattern_means_what_it_matches(pattern, want):
  assert matching("teacher", pattern, BLOCKS) == want


@pytest.mark.parametrize("pattern", ["blok_1", "Block_*", "stage_*", ""])
def test_a_name_that_no_tap_has_lists_the_taps(pattern):
  with pytest.raises(UserError, match="unknown teacher tap") as told:
    matching("teacher", pattern, BLOCKS)
  for tap in BLOCKS:
    assert tap in str(told.value)
  assert repr(pattern) in str(told.value)
  assert "\n" not in str(told.value)


def test_the_side_that_is_wrong_is_named():
  with pytest.raises(UserError, match="unknown student tap 'x_1'"):
    layer_pairs(names(2), names(2), "x_1", "block_1")
  with pytest.raises(UserError, match="teacher tap 'blok_1': did you mean 'bl"):
    layer_pairs(names(2), names(2), "block_1", "blok_1")
  with pytest.raises(UserError, match="unknown student tap"):
    layer_pairs([], names(2), "block_*", "block_*")


def test_one_to_one_pairs_in_order_whatever_the_names():
  assert layer_pairs(names(3), names(3, "stage"), "block_*", "stage_*") == [
    ("block_1", "stage_1"),
    ("block_2", "stage_2"),
    ("block_3", "stage_3"),
  ]


def test_one_to_one_of_unequal_counts_names_them_and_the_ways_out():
  with pytest.raises(UserError, match="matches 2 student taps") as told:
    layer_pairs(names(2), names(3), "block_*", "block_*")
  text = str(told.value)
  assert "(block_1, block_2)" in text
  assert "3 teacher taps (block_1, block_2, block_3)" in text
  for rule in ("'evenly'", "'first'", "'last'"):
    assert rule in text


@pytest.mark.parametrize(
  ("n", "m", "want"),
  [
    (3, 12, [3, 7, 11]),
    (4, 12, [2, 5, 8, 11]),
    (3, 4, [1, 2, 3]),
    (2, 5, [2, 4]),
    (1, 7, [6]),
    (3, 3, [0, 1, 2]),
    (4, 2, [0, 0, 1, 1]),
    (3, 1, [0, 0, 0]),
  ],
)
def test_evenly_ends_with_the_last_at_equal_distances(n, m, want):
  assert layers(n, m, "evenly") == want


def test_evenly_is_never_off_and_never_turns_back():
  for n in range(1, 13):
    for m in range(1, 13):
      got = layers(n, m, "evenly")
      assert got == sorted(got)
      assert got[0] >= 0
      assert got[-1] == m - 1
      for i, layer in enumerate(got):
        assert 0 <= layer + 1 - (i + 1) * m / n < 1


@pytest.mark.parametrize(
  ("n", "m", "want"),
  [
    (2, 12, [0, 11]),
    (3, 12, [0, 6, 11]),
    (6, 12, [0, 2, 4, 7, 9, 11]),
    (3, 3, [0, 1, 2]),
    (1, 7, [0]),
    (4, 2, [0, 0, 1, 1]),
  ],
)
def test_spread_has_both_ends_at_equal_distances(n, m, want):
  assert layers(n, m, "spread") == want


def test_spread_takes_no_layer_twice_while_there_are_enough():
  for m in range(1, 13):
    for n in range(1, m + 1):
      got = layers(n, m, "spread")
      assert sorted(set(got)) == got
      assert got[0] == 0
      if n > 1:
        assert got[-1] == m - 1


def test_first_and_last_take_an_end_of_the_teacher():
  assert layers(3, 5, "first") == [0, 1, 2]
  assert layers(3, 5, "last") == [2, 3, 4]


@pytest.mark.parametrize(
  ("rule", "says"),
  [
    ("first", "layer 3 of 4 to teacher layer 3, the teacher has 0..2"),
    ("last", "layer 0 of 4 to teacher layer -1"),
    (lambda i, n, m: 7, "layer 0 of 4 to teacher layer 7"),
  ],
)
def test_a_map_that_leaves_the_teacher_is_refused(rule, says):
  with pytest.raises(UserError, match=says):
    layers(4, 3, rule)


def test_any_function_of_the_layer_is_a_map():
  assert layers(3, 8, lambda i, n, m: 2 * i + 1) == [1, 3, 5]
  assert layers(3, 8, lambda i, n, m: m - 1) == [7, 7, 7]
  assert layers(2, 8, lambda i, n, m: n) == [2, 2]


@pytest.mark.parametrize("rule", ["one_to_on", "even", 3, None, [0, 1]])
def test_a_wrong_rule_lists_all_rules(rule):
  with pytest.raises(UserError, match="unknown map") as told:
    layers(2, 2, rule)
  for known in ("one_to_one", "evenly", "spread", "first", "last"):
    assert known in str(told.value)


def test_consecutive_pairs_follow_one_another():
  pairs = [("a", "x"), ("b", "y"), ("c", "z")]
  assert consecutive(pairs) == [
    (("a", "b"), ("x", "y")),
    (("b", "c"), ("y", "z")),
  ]
  assert consecutive(pairs[:2]) == [(("a", "b"), ("x", "y"))]


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_pairs_have_no_consecutive_ones(count):
  with pytest.raises(UserError, match=f"got {count} pair"):
    consecutive([("a", "x")][:count])
