"""The file of facts: what is kept of images and of texts."""

import numpy as np
import pytest
import report_runs

from kdjax import examples
from kdjax.errors import UserError


def test_what_is_written_is_read(tmp_path):
  path = tmp_path / "new" / examples.NAME
  assert examples.read(path) is None
  given = report_runs.text_facts()
  examples.write(path, given)
  assert [p.name for p in path.parent.iterdir()] == [examples.NAME]
  got = examples.read(path)
  assert set(got) == set(given)
  for name, value in given.items():
    assert got[name].dtype == value.dtype
    assert (got[name] == value).all()


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04cut"])
def test_a_damaged_file_is_named(tmp_path, content):
  path = tmp_path / examples.NAME
  path.write_bytes(content)
  with pytest.raises(UserError, match=r"examples\.npz is damaged"):
    examples.read(path)


def test_images_are_the_worst_ones_and_small():
  images = [{"image": np.full((200, 100, 3), n, np.uint8)} for n in range(60)]
  facts = report_runs.facts()
  got = examples.with_images(facts, images, ("a", "b"))
  kept = {int(n.removeprefix("image_")) for n in got if n.startswith("image_")}
  worst = np.argsort(-facts["kl"])[: len(kept)]
  assert kept == set(worst.tolist())
  for row in kept:
    assert got[f"image_{row}"].shape == (96, 48, 3)
    assert (got[f"image_{row}"] == row).all()
  assert got["class_names"].tolist() == ["a", "b"]


def test_an_image_as_small_as_that_is_kept_as_it_is():
  image = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
  got = examples.with_images(report_runs.facts(size=1), [{"image": image}])
  assert (got["image_0"] == image).all()


def test_a_token_keeps_the_space_that_a_decoder_drops_at_the_start():
  words = [" the", " cat", "s", "x" * 40]
  decode = lambda ids: "".join(words[i] for i in ids).removeprefix(" ")  # noqa: E731
  facts = {"label": np.array([0, 2, 3]), "guess": np.array([1, 2, 2])}
  got = examples.with_texts(facts, decode)
  assert got["ids"].tolist() == [0, 1, 2, 3]
  assert got["texts"].tolist() == [" the", " cat", "s", "x" * 23 + "…"]
