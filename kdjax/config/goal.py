"""A config's objective: the two losses, and the further terms."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kdjax import errors, layer_map, losses, objective, projectors, terms
from kdjax.config.values import hparams, parameters, plain, schedule, take_name
from kdjax.objective import Objective, Term, each

# What a loss is given by the objective, not by the config.
_GIVEN = {"student", "teacher", "labels", "temperature", "where"}
# The losses on logits that a config names.
_LOGIT_LOSSES = {**losses.LOGIT_LOSSES, **losses.SPAN_LOSSES}
# These read several taps at once: all pairs of their layer map, or each two
# that follow one another. All others make a term of each pair.
_JOINED: dict[str, Callable[..., list[Any]]] = {
  "review": lambda pairs: [tuple(zip(*pairs))],
  "flow": layer_map.consecutive,
}


def goal(
  config: Mapping[str, Any],
  student_taps: Iterable[str] = (),
  teacher_taps: Iterable[str] = (),
  num_examples: int = 0,
) -> Objective:
  """alpha · hard + (1 − alpha) · T² · soft + the further terms.

  Args:
    config: the whole.
    student_taps, teacher_taps: the taps there are, which `terms` choose from.
    num_examples: of the training data, for terms that keep a row for each.
  """
  hard, soft = dict(plain(config["hard"])), dict(plain(config["soft"]))
  combined = objective.hinton(
    alpha=schedule(config["alpha"], "alpha"),
    hard_weight=schedule(config["hard_weight"], "hard_weight"),
    soft_weight=schedule(config["soft_weight"], "soft_weight"),
    temperature=schedule(config["temperature"], "temperature"),
    hard=_logit_loss(hard, "hard"),
    soft=_logit_loss(soft, "soft"),
    hard_hparams=hparams(hard, "hard"),
    soft_hparams=hparams(soft, "soft"),
  )
  taps = tuple(student_taps), tuple(teacher_taps)
  further = [
    term
    for name, value in plain(config["terms"]).items()
    for term in _terms(name, value, taps, num_examples)
  ]
  return combined + further


def _terms(
  name: str,
  value: Any,
  taps: tuple[tuple[str, ...], tuple[str, ...]],
  num_examples: int,
) -> list[Term]:
  """One entry of `terms`: a term, or one for each pair of its layer map."""
  what = f"terms.{name}"
  arguments = _mapping(value, what)
  for needed in ("name", "weight"):
    if arguments.get(needed) is None:
      raise errors.UserError(f"{what} lacks {needed!r}: add it to the config")
  known = {**_LOGIT_LOSSES, **losses.TAP_LOSSES, **terms.TERMS}
  takes = parameters(errors.choose(f"loss of {what}", arguments["name"], known))
  tempered = arguments.get("temperature") is not None
  if tempered and "temperature" not in takes:
    raise errors.UserError(
      f"{what} has a temperature, {arguments['name']} takes none: leave it out"
    )
  weight = schedule(arguments.pop("weight"), f"weight of {what}")
  temperature = schedule(
    arguments.pop("temperature", None), f"temperature of {what}"
  )
  loss = arguments["name"]
  if loss in _LOGIT_LOSSES and "student" not in arguments:
    fn = _logit_loss(arguments, what)
    return [Term(name, fn, weight, temperature, hparams(arguments, what))]
  pairs = _pairs(arguments, what, taps)
  if loss in terms.TERMS and "num_examples" in takes:
    given = arguments.setdefault("num_examples", num_examples)
    terms.check_bank(given, num_examples)
  projector = _projector(arguments.pop("projector", None), what)
  made = []
  for pair in pairs:
    joined = name if len(pairs) == 1 else f"{name}/{'+'.join(each(pair[0]))}"
    term = _tap_term(joined, dict(arguments), what, pair, weight, temperature)
    made.append(projectors.project(term, projector) if projector else term)
  return made


def _pairs(
  arguments: dict[str, Any],
  what: str,
  taps: tuple[tuple[str, ...], tuple[str, ...]],
) -> list[Any]:
  """The taps of each term: `student` and `teacher`, and `map` between them."""
  for side in ("student", "teacher"):
    if side not in arguments:
      raise errors.UserError(
        f"{what} lacks {side!r}: name the {side}'s tap, or a pattern such as "
        "'stage_*'"
      )
  ours, theirs = arguments.pop("student"), arguments.pop("teacher")
  rule = arguments.pop("map", "one_to_one")
  joined = _JOINED.get(arguments["name"], list)
  patterns = isinstance(ours, str) and isinstance(theirs, str)
  try:
    if patterns and "logits" not in (ours, theirs):
      return joined(layer_map.layer_pairs(*taps, ours, theirs, rule))
    if rule != "one_to_one":
      raise errors.UserError(
        f"map={rule!r} is for two patterns of taps: leave it out, or give them"
      )
    return joined(_listed(ours, theirs, taps))
  except errors.UserError as error:
    raise errors.UserError(f"{what}: {error}") from None


def _listed(
  ours: Any, theirs: Any, taps: tuple[tuple[str, ...], tuple[str, ...]]
) -> list[tuple[str, str]]:
  """Pairs of taps that are named one by one, the logits among them."""
  ours, theirs = ([x] if isinstance(x, str) else x for x in (ours, theirs))
  for names in (ours, theirs):
    if not isinstance(names, list | tuple):
      raise errors.UserError(
        f"got the taps {names!r}, needs a name, a pattern or a list of names"
      )
  if not ours or len(ours) != len(theirs):
    raise errors.UserError(
      f"maps {len(ours)} student taps to {len(theirs)} teacher taps: name as "
      "many on either side, at least one"
    )
  for side, names, known in zip(("student", "teacher"), (ours, theirs), taps):
    for name in names:
      if name not in ("logits", *known):
        raise errors.unknown(f"{side} tap", str(name), {"logits", *known})
  return list(zip(ours, theirs))


def _tap_term(
  name: str,
  arguments: dict[str, Any],
  what: str,
  taps: Any,
  weight: Any,
  temperature: Any,
) -> Term:
  loss = arguments["name"]
  if loss in terms.TERMS:
    if temperature is not None:
      arguments["temperature"] = temperature
    del arguments["name"]
    bound = {"name": name, "taps": taps, "weight": weight}
    given = hparams(arguments, what)
    return errors.call(what, terms.TERMS[loss], {**given, **bound})
  if loss in _LOGIT_LOSSES:
    fn = _logit_loss(arguments, what)
  else:
    fn = losses.TAP_LOSSES[take_name(arguments, what)]
    _check_arguments(arguments, fn, what)
  return Term(
    name, fn, weight, temperature, hparams(arguments, what), taps=taps
  )


def _logit_loss(arguments: dict[str, Any], what: str) -> Callable[..., Any]:
  """The loss named; `name` and what changes it leave the arguments.

  `zscore=True` standardises both logits; `teacher_temperature` stays, as an
  argument that the transformed loss takes. `divergence` of likelihood_matching
  names another loss.
  """
  loss = errors.choose(
    f"loss of {what}", take_name(arguments, what), _LOGIT_LOSSES
  )
  if "divergence" in arguments and "divergence" in parameters(loss):
    name = arguments.pop("divergence")
    chosen = errors.choose(f"divergence of {what}", name, _divergences())
    loss = functools.partial(loss, divergence=chosen)
  if "teacher_temperature" in arguments:
    loss = losses.with_teacher_temperature(loss)
  if arguments.pop("zscore", False):
    loss = losses.zscore(loss)
  _check_arguments(arguments, loss, what, ("zscore", "teacher_temperature"))
  return loss


def _divergences() -> dict[str, Callable[..., Any]]:
  """The losses of two logits and nothing else, one example at a time."""
  declared = {n: losses.traits(f) for n, f in losses.LOGIT_LOSSES.items()}
  return {
    name: losses.LOGIT_LOSSES[name]
    for name, traits in declared.items()
    if traits.teacher and not traits.labels and not traits.couples
  }


def _check_arguments(
  arguments: dict[str, Any],
  loss: Callable[..., Any],
  what: str,
  also: tuple[str, ...] = (),
) -> None:
  read = losses.traits(loss, losses.Traits()).reads
  takes = set(parameters(loss)) - _GIVEN.union(read)
  for name in arguments:
    if name not in takes:
      raise errors.unknown(f"argument of {what}", name, {*takes, *also})


def _projector(value: Any, what: str) -> projectors.Projector | None:
  if value is None:
    return None
  what = f"projector of {what}"
  arguments = _mapping(value, what)
  make = errors.choose(what, take_name(arguments, what), projectors.PROJECTORS)
  return errors.call(what, make, arguments)


def _mapping(value: Any, what: str) -> dict[str, Any]:
  if not isinstance(value, Mapping):
    raise errors.UserError(
      f"{what} is {value!r}, must be a mapping: write dict(name=...)"
    )
  return dict(value)
