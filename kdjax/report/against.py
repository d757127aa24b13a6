"""Where the student differs: from its teacher, and from itself alone."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kdjax.report import charts, measures
from kdjax.report.html import Html, el, join, pictures, table
from kdjax.report.measures import KINDS, Facts, Share
from kdjax.report.runs import Run
from kdjax.report.sections import STUDENTS, Section, plain, short
from kdjax.report.style import Picture
from kdjax.results import NETWORKS

_ROWS = 10  # of a table of classes or pairs
_SHOWN = 12  # classes in a picture where there are many


def against_teacher(run: Run) -> Section | None:
  """Who says what: a matrix of few classes, the most frequent pairs of all."""
  made, body = [], []
  for network in STUDENTS:
    seeds = [f for f in run.facts(network) if "teacher_guess" in f]
    if not seeds:
      continue
    size = measures.num_classes(seeds)
    names = class_names(seeds, size)
    if size <= charts.FEW:
      counts = measures.confusion(seeds, size)
      labels = [str(names(n)) for n in range(size)]
      made.append(
        charts.matrix(f"confusion_{network}", plain(network), counts, labels)
      )
    pairs = measures.confused(seeds, _ROWS)
    total = sum(len(f["guess"]) for f in seeds)
    apart = sum(int(np.sum(f["guess"] != f["teacher_guess"])) for f in seeds)
    body.append(
      table(
        ["teacher says", "student says", "examples"],
        [[names(a), names(b), f"{n:,}"] for a, b, n in pairs],
        caption=(
          f"{plain(network)}: differs from the teacher on {apart:,} of "
          f"{total:,} ({apart / total:.1%}), most often so"
        ),
      )
    )
  if not body:
    return None
  says = "Where the student's most likely class is not the teacher's."
  if made:
    says += " Counts over all seeds; what they agree on is grey."
  tables = el("div", *body, class_="pictures")
  return Section(
    "Against the teacher", join([el("p", says), pictures(made), tables]), made
  )


def groups(run: Run) -> Section | None:
  """Classes, or kinds of tokens, and what each network makes of them."""
  texts, found, names = _shares(run)
  if not found:
    return None
  which = "nll" if texts else "accuracy"
  ours = [n for n in NETWORKS if n in found][-1]
  body, made = [], []
  for rival in [n for n in found if n != ours] or [ours]:
    lost = _lost(found[ours], found[rival], which)
    body.append(_lost_table(found, lost, names, ours, rival, which))
    few = len(lost) <= charts.FEW
    if lost and not (made and few):  # a picture of few has them all
      made.append(_lost_picture(found, lost, names, rival, which, few=few))
  says = (
    "A kind is told by the token's text alone: whether a space or a sign comes "
    "before it, or letters."
    if texts
    else "Classes by their label, those first where the student lost most."
  )
  title = "Kinds of tokens" if texts else "Classes"
  tables = el("div", *body, class_="pictures")
  return Section(title, join([el("p", says), pictures(made), tables]), made)


def _shares(
  run: Run,
) -> tuple[bool, dict[str, dict[int, Share]], Callable[[int], object]]:
  """Whether they are texts; each network's groups; what those are called."""
  there = {n: run.facts(n) for n in run.networks if run.facts(n)}
  everything = [facts for seeds in there.values() for facts in seeds]
  if any("texts" in facts for facts in everything):
    words = measures.keywords(run.config)
    found = {
      network: measures.by_group(
        seeds, [measures.kinds(f, words) for f in seeds], len(KINDS)
      )
      for network, seeds in there.items()
    }
    return True, found, KINDS.__getitem__
  size = measures.num_classes(everything) if everything else 0
  found = {
    network: measures.by_group(seeds, [f["label"] for f in seeds], size)
    for network, seeds in there.items()
  }
  return False, found, class_names(everything, size)


def _lost_picture(
  found: Mapping[str, Mapping[int, Share]],
  lost: Sequence[tuple[int, float]],
  names: Callable[[int], object],
  rival: str,
  which: str,
  *,
  few: bool,
) -> Picture:
  title = "NLL of each kind" if which == "nll" else "Accuracy of each class"
  ids = [n for n, _ in (lost if few else lost[:_SHOWN])]
  return charts.dumbbells(
    f"groups_{rival}",
    title if few else f"Lost most against {plain(rival)}",
    "NLL, nats a token" if which == "nll" else "accuracy",
    [_bare(names(n)) for n in ids],
    [
      (plain(network), NETWORKS.index(network), [s.get(n) for n in ids])
      for network, s in found.items()
    ],
    which,
  )


def _bare(name: object) -> str:
  text = str(name)
  return text if len(text) <= 22 else text[:21] + "…"


def _lost(
  ours: Mapping[int, Share], theirs: Mapping[int, Share], which: str
) -> list[tuple[int, float]]:
  """(group, by how much we are worse), the most first."""
  sign = 1 if which == "nll" else -1
  found = [
    (n, sign * (getattr(share, which) - getattr(theirs[n], which)))
    for n, share in ours.items()
    if n in theirs
  ]
  return sorted(found, key=lambda pair: -pair[1])


def _lost_table(
  found: Mapping[str, Mapping[int, Share]],
  lost: Sequence[tuple[int, float]],
  names: Callable[[int], object],
  ours: str,
  rival: str,
  which: str,
) -> Html:
  factor, form = (1, ".3f") if which == "nll" else (100, ".1f")
  rows = []
  for n, by in lost[:_ROWS]:
    if by < 1e-9:
      break
    mine, other = found[ours][n], found[rival][n]
    row = [
      names(n),
      f"{mine.examples:,.0f}",
      f"{factor * getattr(other, which):{form}}",
      f"{factor * getattr(mine, which):{form}}",
      f"{factor * by:+{form}}",
    ]
    if which == "nll":
      row.append("–" if math.isnan(mine.kl) else f"{mine.kl:.3f}")
    rows.append(row)
  if not rows:
    return el("p", f"Nothing lost against {plain(rival)}.")
  unit = "NLL" if which == "nll" else "accuracy %"
  head = ["", "examples", short(rival), short(ours), "lost"]
  return table(
    [*head, "KL"] if which == "nll" else head,
    rows,
    caption=f"lost most against {plain(rival)}, {unit}",
  )


def class_names(seeds: Sequence[Facts], size: int) -> Callable[[int], object]:
  for facts in seeds:
    if "texts" in facts:
      known = {
        int(i): t
        for f in seeds
        for i, t in zip(f["ids"].tolist(), f["texts"].tolist())
      }
      return lambda n: el("code", visible(known.get(n, str(n))))
    if len(facts.get("class_names", ())) >= size:
      names = facts["class_names"].tolist()
      return lambda n: names[n]
  return str


def visible(text: str) -> str:
  """A token with its spaces, ends of line and control characters."""
  return drawn(text.replace("\n", "↵").replace(" ", "␣")) or "∅"


def drawn(text: str) -> str:
  """With pictures of the characters that have no shape, but ends of line."""
  return "".join(map(_sign, text.replace("\t", "→")))


def _sign(char: str) -> str:
  if char.isprintable() or char == "\n":
    return char
  code = ord(char)  # Unicode has a row of pictures of the first 32
  return chr(0x2400 + code) if code < 0x20 else f"\\x{code:02x}"
