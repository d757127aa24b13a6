"""Docstrings as Markdown: their sections, sources and examples.

mkdocstrings is told to take docstrings as they are (`docstring_style: null`),
and this extension of griffe turns them into Markdown first. Its own parser of
Google's style knows neither `student, teacher: both` nor `Source:`.
"""

import ast
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import griffe

TITLES = {
  "Args": "Arguments",
  "Attributes": "Attributes",
  "Raises": "Raises",
  "Returns": "Returns",
  "Yields": "Yields",
  "Source": "Source",
  "Sources": "Sources",
}
_HEAD = re.compile(rf"^({'|'.join(TITLES)}):(?: (.*))?$")
_ITEM = re.compile(r"^(\*{0,2}\w[\w.]*(?:, \*{0,2}\w[\w.]*)*): *(.*)$")
_ARXIV = re.compile(r"\b(?:arXiv |arxiv\.org/abs/)(\d{4}\.\d{4,5})")
_DOI = re.compile(r"\bdoi (10\.\d{4,}/[^\s,;)]*[^\s,;).])")


class Docstrings(griffe.Extension):
  """Rewrites the docstring of every object that is loaded."""

  def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
    if obj.docstring:
      obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
  """The docstring's sections as Markdown; the rest of its text as it is."""
  parts = [
    _section(title, body) if title else _text(body)
    for title, body in sections(docstring)
  ]
  return "\n\n".join(part for part in parts if part)


def sections(docstring: str) -> Iterator[tuple[str, str]]:
  """(title, body) in order; "" is the title of plain text."""
  title, lines = "", []
  for line in docstring.splitlines():
    head = _HEAD.match(line)
    # A section goes on as long as its lines are indented.
    ends = title and line and not line.startswith(" ")
    if head or ends:
      yield title, textwrap.dedent("\n".join(lines)).strip("\n")
      title, lines = "", [line]
    else:
      lines.append(line)
    if head:
      title, lines = head[1], []
      if head[2]:
        # What stands beside the title is indented like what stands below.
        lines = [f"  {head[2]}"]
  yield title, textwrap.dedent("\n".join(lines)).strip("\n")


def items(body: str) -> list[tuple[tuple[str, ...], str]]:
  """(names, text) of each item; of a body that is one text, nothing."""
  found: list[tuple[tuple[str, ...], str]] = []
  for line in body.splitlines():
    item = _ITEM.match(line)
    if item:
      found.append((tuple(item[1].split(", ")), item[2]))
    elif found and (line.startswith(" ") or not line):
      names, text = found[-1]
      found[-1] = names, f"{text}\n{line.strip()}".rstrip()
    else:
      return []
  return found


def _section(title: str, body: str) -> str:
  listed = items(body) if title in ("Args", "Attributes", "Raises") else []
  if not listed:
    return f"**{TITLES[title]}:** {_inline(body)}"
  rows = [(", ".join(f"`{n}`" for n in names), text) for names, text in listed]
  return f"**{TITLES[title]}:**\n\n{_definitions(rows)}"


def _definitions(rows: list[tuple[str, str]]) -> str:
  return "\n\n".join(
    f"{name}\n:   {textwrap.indent(_inline(text), '    ').lstrip()}"
    for name, text in rows
  )


def _columns(block: str) -> list[tuple[str, str]]:
  """(name, text) of each row where names and texts stand in two columns."""
  rows: list[tuple[str, str]] = []
  for line in block.splitlines():
    row = re.match(r" {0,2}([\w.]+) {2,}(\S.*)$", line)
    if row:
      rows.append((row[1], row[2]))
    elif rows and line.startswith("    "):
      name, text = rows[-1]
      rows[-1] = name, f"{text}\n{line.strip()}"
    else:
      return []
  return rows


def _text(body: str) -> str:
  """Plain text; its indented blocks are fenced, Python as Python."""
  # A paragraph belongs to the one before if both are indented: code has blank
  # lines of its own.
  blocks: list[str] = []
  for paragraph in re.split(r"\n\s*\n", body.strip("\n")):
    code = all(line.startswith("    ") for line in paragraph.splitlines())
    if code and blocks and blocks[-1].startswith("    "):
      blocks[-1] += f"\n\n{paragraph}"
    else:
      blocks.append(paragraph)
  return "\n\n".join(
    _fenced(block) if block.startswith("    ") else _paragraph(block)
    for block in blocks
  )


def _paragraph(block: str) -> str:
  """A list may follow its first line at once; Markdown wants a gap."""
  if rows := _columns(block):
    return _definitions([(f"`{name}`", text) for name, text in rows])
  lines = _inline(block).splitlines()
  for n, line in enumerate(lines):
    if re.match(r" *(?:\d+\.|-) ", line):
      listed = textwrap.dedent("\n".join(lines[n:]))
      return "\n".join([*lines[:n], "", listed]).lstrip("\n")
  return "\n".join(lines)


def _fenced(block: str) -> str:
  code = textwrap.dedent(block).strip("\n")
  return f"```{_language(code)}\n{code}\n```"


def _language(code: str) -> str:
  if code.startswith("python -m"):
    return "bash"
  try:
    ast.parse(code)
  except SyntaxError:
    return "text"
  return "python"


def _inline(text: str) -> str:
  """No `<` outside of code opens a tag; papers are links."""
  parts = text.split("`")
  for n in range(0, len(parts), 2):
    part = parts[n].replace("<", "&lt;")
    part = _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", part)
    parts[n] = _DOI.sub(r"[doi \1](https://doi.org/\1)", part)
  return "`".join(parts)
