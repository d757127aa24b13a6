"""Do two tokenizers give ids the same meaning? Told by content, not by name.

A loss that compares two networks token by token needs one vocabulary. Rows that
an embedding has beyond its tokenizer's ids are padding: both networks' classes
are cut to the tokenizer's own, so that 151,936 rows meet 152,064.
"""

from typing import NamedTuple

from kdjax.data.text.tokenizer import Tokenizer
from kdjax.types import UserError


class Shared(NamedTuple):
  """What two networks with one vocabulary have in common.

  Attributes:
    size: the true number of classes; logits from there on are padding.
    warnings: one line for each difference that does not forbid distilling.
  """

  size: int
  warnings: tuple[str, ...]


def shared_vocabulary(
  student: Tokenizer,
  teacher: Tokenizer,
  *,
  student_rows: int | None = None,
  teacher_rows: int | None = None,
) -> Shared:
  """The vocabulary of both, for losses that compare token by token.

  It is shared where every token has the same id on both sides. One side may
  have more tokens after the other's last: then the common ones are the classes,
  and the text is to be tokenized by the tokenizer that has fewer.

  Args:
    student: its tokenizer.
    teacher: its tokenizer.
    student_rows: rows of its embedding, where they are to be checked.
    teacher_rows: likewise.

  Raises:
    UserError: tokens with different ids, naming the losses that take them; more
      ids than rows.
  """
  for tokenizer, rows, whose in (
    (student, student_rows, "student"),
    (teacher, teacher_rows, "teacher"),
  ):
    if rows is not None:
      check_rows(tokenizer, rows, whose)
  warnings = _differences(student, teacher)
  if student.vocabulary == teacher.vocabulary:
    return Shared(student.size, tuple(warnings))
  size = min(student.size, teacher.size)
  ours, theirs = (_below(t, size) for t in (student, teacher))
  if ours != theirs:
    differing = {token for token, _ in ours.items() ^ theirs.items()}
    example = min(differing, key=lambda token: (ours.get(token, size), token))
    raise UserError(
      f"student and teacher have different tokenizers: {len(differing)} tokens "
      f"have not the same id, such as {example!r} with "
      f"{student.vocabulary.get(example, 'none')} and "
      f"{teacher.vocabulary.get(example, 'none')}: losses token by token need "
      "one tokenizer; use a cross-tokenizer loss (universal_logits or "
      "likelihood_matching), or a student that has the teacher's"
    )
  longer = max((student, teacher), key=lambda t: t.size)
  more = sorted(longer.vocabulary.items(), key=lambda item: item[1])
  names = [token for token, number in more if number >= size]
  whose = "student" if longer is student else "teacher"
  shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
  warnings.append(
    f"the {whose}'s tokenizer has {len(names)} more tokens ({shown}): the "
    f"{size} that both have are compared"
  )
  return Shared(size, tuple(warnings))


def check_rows(tokenizer: Tokenizer, rows: int, whose: str = "model") -> None:
  """Refuses a tokenizer whose ids the embedding has no row for."""
  if tokenizer.size > rows:
    raise UserError(
      f"the tokenizer of {tokenizer.name} has ids up to {tokenizer.size - 1}, "
      f"the {whose}'s embedding {rows} rows: it belongs to another checkpoint; "
      "take the tokenizer from the checkpoint's own folder"
    )


def _below(tokenizer: Tokenizer, size: int) -> dict[str, int]:
  return {t: n for t, n in tokenizer.vocabulary.items() if n < size}


def _differences(student: Tokenizer, teacher: Tokenizer) -> list[str]:
  found = []
  for name, what in (("eos_token", "ends"), ("bos_token", "may begin")):
    ours, theirs = student.specials.get(name), teacher.specials.get(name)
    if ours != theirs:
      found.append(
        f"{name} differs: a text {what} with {ours!r} for the student, with "
        f"{theirs!r} for the teacher, who gives the student's little chance"
      )
  if student.prefix != teacher.prefix:
    found.append(
      f"a text begins with the ids {list(student.prefix)} for the student, "
      f"{list(teacher.prefix)} for the teacher: the student's are used"
    )
  if student.chat_template != teacher.chat_template:
    found.append(
      "the chat templates differ: the student's is used, which the teacher may "
      "not have been trained on"
    )
  return found
