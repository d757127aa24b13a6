"""Conversations -> text, by the template that came with the tokenizer.

Templates are Jinja in a sandbox, with what `transformers` offers them, so that
the text is the one it would have made. They come from checkpoints: untrusted.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from kdjax.data.text.tokenizer import Tokenizer
from kdjax.types import UserError

Messages = Sequence[Mapping[str, Any]]
Spans = list[tuple[int, int]]

# Characters that Unicode keeps out of text stand around what a template puts
# between {% generation %} and {% endgeneration %}, until they are found.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARKS = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")


def render(tokenizer: Tokenizer, messages: Messages) -> tuple[str, Spans]:
  """A conversation's text, and which characters of it the assistant says.

  Where the template marks them, by {% generation %}, that decides. Otherwise
  turn i is what stands after the rendering of the messages before it, with the
  prompt to generate, up to the end of the rendering that it closes: the words
  and the end of the turn, not its header.

  Returns:
    The text, and [(start, stop), ...] in characters.

  Raises:
    UserError: no template; one that fails on these messages; one that marks
      nothing and renders a turn otherwise once more turns follow.
  """
  if _MARKS.search(tokenizer.chat_template or ""):
    return _unmark(template_text(tokenizer, messages, mark=True))
  text = template_text(tokenizer, messages)
  spans = [
    _turn(tokenizer, messages, n, text)
    for n, message in enumerate(messages)
    if message["role"] == "assistant"
  ]
  return text, spans


def template_text(
  tokenizer: Tokenizer,
  messages: Messages,
  *,
  add_generation_prompt: bool = False,
  mark: bool = False,
) -> str:
  """What the chat template makes of the messages.

  Args:
    tokenizer: whose template and special tokens are used.
    messages: with `role`, `content` and whatever else the template reads.
    add_generation_prompt: whether the header of the assistant's next turn ends
      the text.
    mark: whether noncharacters stand around what the template says is
      generated.
  """
  if not tokenizer.chat_template:
    raise UserError(
      f"the tokenizer of {tokenizer.name} has no chat template, needs one for "
      "conversations: put chat_template.jinja beside its tokenizer.json, or "
      "give texts"
    )
  written = json.dumps(list(messages), ensure_ascii=False)
  plain = json.loads(written)
  if mark and (_OPEN in written or _CLOSE in written):
    raise UserError(
      "a message holds the noncharacter U+FDD0 or U+FDD1, which no text may: "
      "delete it"
    )
  try:
    return _compiled(tokenizer.chat_template).render(
      messages=[_reasoned(message) for message in plain],
      tools=None,
      documents=None,
      add_generation_prompt=add_generation_prompt,
      kdjax_mark=mark,
      **tokenizer.specials,
    )
  except (jinja2.TemplateError, TypeError) as error:
    raise UserError(
      f"the chat template of {tokenizer.name} refuses the conversation "
      f"({error}): mend its messages"
    ) from error


def _reasoned(message: dict[str, Any]) -> dict[str, Any]:
  """The reasoning under both names that templates read it by."""
  for name in ("reasoning_content", "thinking", "reasoning"):
    reasoning = message.get(name)
    if reasoning is not None:
      named = {"thinking": reasoning} | message
      return named | {"reasoning_content": reasoning}
  return message


def _turn(
  tokenizer: Tokenizer, messages: Messages, n: int, text: str
) -> tuple[int, int]:
  before = template_text(tokenizer, messages[:n], add_generation_prompt=True)
  closed = template_text(tokenizer, messages[: n + 1])
  if text.startswith(before):
    if text.startswith(closed):
      return len(before), len(closed)
    # Some templates drop a turn's reasoning once others follow. What ends the
    # turn is then found after its words.
    words = str(messages[n].get("content") or "").strip()
    end = closed[closed.rfind(words) + len(words) :] if words else ""
    at = text.find(words + end, len(before)) if end else -1
    if at >= 0:
      return len(before), at + len(words) + len(end)
  raise UserError(
    f"the chat template of {tokenizer.name} writes message {n} otherwise once "
    "more follow, so that the assistant's words are not found: mark them in it "
    "by {% generation %}, or end the conversation there"
  )


def _unmark(marked: str) -> tuple[str, Spans]:
  text, spans, start = "", [], 0
  for part in re.split(f"([{_OPEN}{_CLOSE}])", marked):
    if part == _OPEN:
      start = len(text)
    elif part == _CLOSE:
      spans.append((start, len(text)))
    else:
      text += part
  return text, spans


class _Generation(jinja2.ext.Extension):
  """{% generation %}: what the assistant says."""

  tags = {"generation"}  # noqa: RUF012

  def parse(self, parser: Any) -> Any:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    flag = jinja2.nodes.Name("kdjax_mark", "load")
    call = self.call_method("around", [flag])
    return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

  def around(self, mark: Any, caller: Any) -> str:
    return f"{_OPEN}{caller()}{_CLOSE}" if mark is True else caller()


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, "jinja2.ext.loopcontrols"],
  )
  # Jinja's own `tojson` escapes for HTML.
  environment.filters["tojson"] = _json
  environment.globals["raise_exception"] = _raise
  environment.globals["strftime_now"] = _now
  return environment.from_string(template)


def _json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
  return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
  raise jinja2.TemplateError(message)


def _now(form: str) -> str:
  return datetime.datetime.now().strftime(form)
