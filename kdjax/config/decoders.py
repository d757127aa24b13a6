"""A config's language models: their architectures, tokenizers and weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from kdjax import errors, inherit, losses, parallel, pretrained
from kdjax.config.network import dtype, of_run
from kdjax.config.students import check_student, inherited_sizes
from kdjax.config.values import plain
from kdjax.data import text
from kdjax.data.text import corpus
from kdjax.models.decoder import Architecture, architecture, decoder
from kdjax.pretrained import decoders
from kdjax.types import Model, Params

_SIDES = ("teacher", "student")


class Decoders(NamedTuple):
  """The two networks of a config, as far as their files and keys tell.

  Each is a mapping by side, "teacher" and "student".

  Attributes:
    nets: the architectures.
    tokenizers: each network's own.
    reads: the tokenizer that its texts are read by.
    num_classes: how many of its classes are no padding.
    warnings: differences that do not forbid distilling, a line each.
  """

  nets: Mapping[str, Architecture]
  tokenizers: Mapping[str, text.Tokenizer]
  reads: Mapping[str, text.Tokenizer]
  num_classes: Mapping[str, int]
  warnings: tuple[str, ...] = ()


def by_spans(config: Any) -> bool:
  """Whether a loss of the config compares networks of two tokenizers."""
  named = [config.soft, *config.terms.values()]
  return any(term.get("name") in losses.SPAN_LOSSES for term in named)


def decoders_of(config: Any) -> Decoders:
  """Teacher and student.

  Where losses compare them token by token their vocabularies are one, and of
  the two tokenizers that of fewer tokens reads the texts: what has further ones
  would give ids that the other does not know.

  Raises:
    UserError: no network or no tokenizer is named; two vocabularies, and losses
      that compare token by token; more tokens than rows of the embedding.
  """
  check_student(config.student)
  folders = {side: _checkpoint_folder(config[side]) for side in _SIDES}
  nets = _nets(config, folders)
  given = {
    side: _tokenizer(config[side].tokenizer, folder, config.data.data_dir)
    for side, folder in folders.items()
  }
  # A side that names none reads as the other does.
  student = given["student"] or given["teacher"]
  teacher = given["teacher"] or student
  if student is None or teacher is None:
    raise errors.UserError(
      "there is no tokenizer: neither path is a checkpoint that has one; set "
      "teacher.tokenizer to a folder, to bytes or to bpe:SIZE"
    )
  own = {"teacher": teacher, "student": student}
  if by_spans(config):
    for side, tokenizer in own.items():
      text.check_rows(tokenizer, nets[side].vocab_size, side)
    sizes = {side: tokenizer.size for side, tokenizer in own.items()}
    return Decoders(nets, own, own, sizes)
  shared = text.shared_vocabulary(
    student,
    teacher,
    student_rows=nets["student"].vocab_size,
    teacher_rows=nets["teacher"].vocab_size,
  )
  fewer = min(student, teacher, key=lambda t: t.size)
  return Decoders(
    nets,
    own,
    dict.fromkeys(own, fewer),
    dict.fromkeys(own, shared.size),
    shared.warnings,
  )


def blank_decoders(config: Any) -> Decoders:
  """Teacher and student without tokenizers: their sizes alone.

  Raises:
    UserError: what needs texts or weights to be known.
  """
  if by_spans(config) or config.student.lora.rank:
    raise errors.UserError(
      "losses by spans and adapters need texts and weights: leave them out "
      "where sizes alone are looked at"
    )
  check_student(config.student)
  folders = {side: _checkpoint_folder(config[side]) for side in _SIDES}
  nets = _nets(config, folders)
  fewest = min(net.vocab_size for net in nets.values())
  return Decoders(nets, {}, {}, dict.fromkeys(nets, fewest))


def _nets(
  config: Any, folders: Mapping[str, Path | None]
) -> dict[str, Architecture]:
  nets = {"teacher": _net(config.teacher, folders["teacher"], "teacher")}
  if sizes := inherited_sizes(config.student):
    return nets | {"student": inherit.cut(nets["teacher"], **sizes)}
  return nets | {"student": _net(config.student, folders["student"], "student")}


def _tokenizer(
  name: str, checkpoint: Path | None, data_dir: str
) -> text.Tokenizer | None:
  """The tokenizer of a network; None where nothing names one.

  Args:
    name: "bytes"; "bpe:SIZE", trained on the sources of Python; a folder; or
      "" for that of the checkpoint.
    checkpoint: its folder.
    data_dir: where a trained one is kept; "" = the usual place.
  """
  if name == "bytes":
    return text.byte_level()
  if name.startswith("bpe:"):
    size = name.removeprefix("bpe:")
    if not size.isdigit():
      raise errors.UserError(
        f"got the tokenizer {name!r}, needs a size: write bpe:1024"
      )
    return corpus.bpe(vocab_size=int(size), data_dir=data_dir or None)
  if name:
    return text.from_folder(name)
  if checkpoint is not None:
    return text.from_folder(checkpoint)
  return None


def _checkpoint_folder(config: Mapping[str, Any]) -> Path | None:
  """The folder of a network's pretrained weights; None where it has none."""
  path = config["path"]
  if not path or not pretrained.is_weights(path):
    return None
  return pretrained.local(path)


def _net(
  config: Mapping[str, Any], folder: Path | None, what: str
) -> Architecture:
  """The decoder of a checkpoint's config.json, or of `config.model`."""
  told = plain(config["model"])
  if folder is not None:
    if told:
      raise errors.UserError(
        f"{what} has a path to weights and a model: the weights' config.json "
        f"says what the network is; set {what}.model to {{}}"
      )
    return decoders.read_architecture(folder)
  if not told:
    raise errors.UserError(
      f"{what} has neither a path to weights nor a model: set {what}.path, or "
      f"{what}.model to what a config.json holds"
    )
  return architecture(told)


def causal_lm(
  made: Architecture, config: Mapping[str, Any], head: str, num_classes: int
) -> Model:
  """The network as a `Model`, its head as `config.head` says."""
  return decoder(
    made,
    head=head,
    num_classes=num_classes,
    dtype=dtype(config["dtype"]),
    remat=config["remat"],
  )


def decoder_params(
  config: Mapping[str, Any],
  model: Model,
  stored: Any,
  mesh: Mesh,
  rules: Sequence[parallel.Rule] = (),
) -> Params | None:
  """The weights of `config.path`; None where it names nothing.

  Args:
    stored: the dtype of the arrays.
    mesh, rules: where they lie: `parallel.shardings`.
  """
  path = config["path"]
  if not path:
    return None
  like = jax.eval_shape(model.init, jax.random.key(0), {})
  if pretrained.is_weights(path):
    where = parallel.shardings(like[0], mesh, rules)
    return decoders.read(path, dtype=stored, shardings=where)[1]
  return of_run(path, like)[0]
