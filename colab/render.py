"""Runs the notebooks and writes what came out to docs/notebooks.

    python colab/render.py              # all of them, at their full budget
    python colab/render.py losses_tour  # one

It needs `pip install -e '.[notebooks]'`. A notebook becomes a page of Markdown,
with its cells as they are, and its pictures beside it. The notebook itself is
left without outputs.
"""

import base64
import io
import re
import shutil
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
PAGES = HERE.parent / "docs/notebooks"
COLORS = 256  # a palette makes a picture three times smaller


def execute(notebook: nbformat.NotebookNode, folder: Path | str) -> None:
  """Runs it in place, with `folder` as its working folder.

  Raises:
    CellExecutionError: at the first cell that fails.
  """
  resources = {"metadata": {"path": str(folder)}}
  NotebookClient(notebook, timeout=3600, resources=resources).execute()


def page(notebook: nbformat.NotebookNode, name: str, folder: Path) -> str:
  """The Markdown of an executed notebook; its pictures go into `folder`."""
  parts = [f"<!-- Written by colab/render.py from colab/{name}.ipynb. -->"]
  heading = name
  for cell in notebook.cells:
    if cell.cell_type == "markdown":
      parts.append(cell.source)
      heading = [heading, *re.findall(r"^#+ (.*)$", cell.source, re.M)][-1]
      continue
    code = f"```python\n{cell.source}\n```"
    title = re.match(r"# @title (.*)\n", cell.source)
    parts.append(folded(title[1], code) if title else code)
    for output in merged(cell.outputs):
      parts += shown(output, heading, folder)
  return "\n\n".join(parts) + "\n"


def folded(title: str, code: str) -> str:
  """A cell that Colab shows by its title alone."""
  summary = f"<summary>{title}</summary>"
  return f'<details markdown="1">\n{summary}\n\n{code}\n\n</details>'


def merged(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
  """The outputs, with what was printed bit by bit as one."""
  kept: list[nbformat.NotebookNode] = []
  for output in outputs:
    if kept and output.get("name") == kept[-1].get("name", "") != "":
      kept[-1].text += output.text
    else:
      kept.append(output.copy())
  return kept


def shown(
  output: nbformat.NotebookNode, heading: str, folder: Path
) -> list[str]:
  """What a reader sees of one output of a cell below that heading."""
  data = output.get("data", {})
  if "image/png" in data:
    path = folder / f"{len(list(folder.glob('*.png'))) + 1}.png"
    picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    picture.convert("RGB").quantize(COLORS).save(path, optimize=True)
    return [f"![{heading}]({folder.name}/{path.name})"]
  if output.output_type == "stream" and output.name == "stderr":
    return []  # progress
  text = output.get("text", data.get("text/plain", ""))
  text = re.sub(r"\x1b\[[0-9;]*m", "", text).rstrip()
  return [f"```text\n{text}\n```"] if text else []


def render(name: str) -> None:
  notebook = nbformat.read(HERE / f"{name}.ipynb", as_version=4)
  folder = PAGES / name
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  execute(notebook, HERE)
  (PAGES / f"{name}.md").write_text(page(notebook, name, folder))


if __name__ == "__main__":
  for given in sys.argv[1:] or sorted(p.stem for p in HERE.glob("*.ipynb")):
    print(given, flush=True)
    render(given)
