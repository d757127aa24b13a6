"""The examples where a network is worst, and what language models write."""

from collections.abc import Mapping

import numpy as np

from kdjax.examples import badness, worst_first
from kdjax.report import measures
from kdjax.report.against import class_names, drawn, visible
from kdjax.report.html import Html, el, join, photo
from kdjax.report.measures import Facts
from kdjax.report.runs import Run
from kdjax.report.sections import Section, plain
from kdjax.results import NETWORKS

_SHOWN = 12  # images
_WIDTH, _WINDOWS = 64, 6  # tokens of a stretch, stretches


def worst(run: Run) -> Section | None:
  """Images, or stretches of text, of the first seed that has any."""
  for network in reversed(run.networks):
    seeds = run.facts(network)
    if seeds:
      facts = seeds[0]
      texts = "texts" in facts
      body = _worst_texts(facts) if texts else _worst_images(facts)
      what = "stretches of text" if texts else "images"
      title = f"Worst {what}"
      by, _ = badness(facts)
      says = f"Of {plain(network)}, first seed, by {by} (nats)."
      return Section(title, join([el("p", says), body]))
  return None


def _worst_images(facts: Facts) -> Html:
  size = measures.num_classes([facts])
  names = class_names([facts], size)
  _, value = badness(facts)
  order = worst_first(facts)[:_SHOWN].tolist()
  most = max(float(value[order[0]]), 1e-9) if order else 1.0
  cards = []
  for n in order:
    pixels = facts.get(f"image_{int(facts['row'][n])}")
    if pixels is None:
      continue
    label, guess = int(facts["label"][n]), int(facts["guess"][n])
    lines = [
      el("b", f"{value[n]:.2f}"),
      el("br"),
      f"student: {names(guess)} ({facts['confidence'][n]:.0%})",
    ]
    if "teacher_guess" in facts:
      teacher = int(facts["teacher_guess"][n])
      lines += [el("br"), f"teacher: {names(teacher)}"]
    lines += [el("br"), f"label: {names(label)}"]
    says = f"test image {int(facts['row'][n])}, label {names(label)}"
    framed = el(
      "div",
      photo(pixels, says),
      style=f"color: {_heat(float(value[n]) / most)}",
    )
    cards.append(el("figure", framed, el("figcaption", *lines)))
  return el("div", *cards, class_="cards")


def _worst_texts(facts: Facts) -> Html:
  known = dict(zip(facts["ids"].tolist(), facts["texts"].tolist()))
  _, value = badness(facts)
  most = max(float(np.nanquantile(value, 0.99)), 1e-9)
  scale = el(
    "p",
    *(
      join([el("span", class_="key", style=_shade(x)), f" {_two(x * most)} "])
      for x in (0.0, 0.25, 0.5, 0.75, 1.0)
    ),
    "and more; dotted: the student's most likely token is not the teacher's.",
    class_="faint",
  )
  blocks: list[Html] = [scale]
  for piece in measures.worst_windows(facts, _WIDTH, _WINDOWS):
    spans = [
      _token(facts, n, known, float(value[n]) / most)
      for n in range(piece.start, piece.stop)
    ]
    row = int(facts["row"][piece.start])
    blocks.append(
      el("p", f"row {row}, mean {_two(value[piece].mean())}", class_="faint")
    )
    blocks.append(el("div", *spans, class_="tokens"))
  return join(blocks)


def _token(
  facts: Facts, n: int, known: Mapping[int, str], share: float
) -> Html:
  text = known[int(facts["label"][n])]
  guess = known[int(facts["guess"][n])]
  told = f"NLL {facts['nll'][n]:.2f}; student: {visible(guess)}"
  other = False
  if "teacher_guess" in facts:
    teacher = int(facts["teacher_guess"][n])
    other = teacher != int(facts["guess"][n])
    told = (
      f"KL {facts['kl'][n]:.2f}, {told}; teacher: {visible(known[teacher])}"
    )
  shown = drawn(text).replace("\n", "↵\n")
  return el(
    "span",
    shown or "∅",
    title=told,
    style=_shade(share),
    class_="other" if other else None,
  )


def _two(value: float) -> str:
  """Two digits that say something: 12, 3.4, 0.0042."""
  return f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"


def _heat(share: float) -> str:
  """The colour of a frame."""
  return f"rgba(213, 94, 0, {0.15 + 0.85 * min(max(share, 0), 1):.2f})"


def _shade(share: float) -> str:
  return f"background: rgba(222, 108, 20, {0.75 * min(max(share, 0), 1):.2f})"


def samples(run: Run) -> Section | None:
  """What the networks of the first seed write."""
  blocks = []
  for seed in run.results.get("seeds", ())[:1]:
    for network in NETWORKS:
      for prompt, written in seed.get(network, {}).get("samples", ()):
        blocks.append(el("h3", plain(network)))
        blocks.append(el("pre", el("b", prompt), written.rstrip()))
  return Section("What they write", join(blocks)) if blocks else None
