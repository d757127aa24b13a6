"""What a network makes of each held-out example, kept for `kdjax.report`.

`<workdir>/seed_<n>/<network>/examples.npz` holds, of the first `MOST` that
count (images, or tokens), arrays `[n]`:

row            its number in the split, of a token that of the row it stands in
label, guess   the class that is right, and the network's most likely one
confidence     the probability of `guess`
nll            nats
teacher_guess  the teacher's most likely class
kl             KL(teacher ‖ network) at T = 1, nats

Both of the teacher are absent where another tokenizer reads for it. Besides, of
texts `ids` and `texts`, what each class that occurs above is written as; of
images `image_<row>`, uint8 [h, w, c], those where the network is worst, and
`class_names` where the data set has them.
"""

import io
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kdjax import files
from kdjax.errors import UserError

NAME = "examples.npz"
MOST = 50_000
_WORST = 24  # images kept
_SIDE = 96  # pixels of their longer side, at most
_LETTERS = 24  # of a token
_ROUNDING = 1e-6  # of a KL that is 0

Facts = Mapping[str, np.ndarray]


def write(path: Path, facts: Facts) -> None:
  """Whole or not at all, whatever kills the process."""
  whole = io.BytesIO()
  np.savez_compressed(whole, allow_pickle=False, **facts)
  files.write(path, whole.getvalue())


def read(path: Path) -> dict[str, np.ndarray] | None:
  """What `write` wrote; None where there is nothing.

  Raises:
    UserError: the file is damaged.
  """
  try:
    whole = io.BytesIO(path.read_bytes())
    with np.load(whole, allow_pickle=False) as arrays:
      return dict(arrays)
  except FileNotFoundError:
    return None
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise UserError(
      f"{path} is damaged ({error}): delete it, and start the training command "
      "again, which trains nothing and writes it anew"
    ) from error


def badness(facts: Facts) -> tuple[str, np.ndarray]:
  """What examples are ranked by, and its values in nats.

  The KL from the teacher; where none is (a teacher's from itself), or none is
  known, the NLL.
  """
  kl = facts.get("kl", np.zeros(1))
  if np.nanmax(kl) > _ROUNDING:
    return "KL from the teacher", kl
  return "NLL", facts["nll"]


def worst_first(facts: Facts) -> np.ndarray:
  """Positions, by `badness`."""
  return np.argsort(-badness(facts)[1], kind="stable")


def with_images(
  facts: Facts, examples: Any, class_names: Sequence[str] = ()
) -> dict[str, np.ndarray]:
  """The facts, and small copies of the images where the network is worst.

  Args:
    examples: row -> mapping with `image`, uint8 [H, W, C].
  """
  rows = facts["row"][worst_first(facts)[:_WORST]].tolist()
  images = {f"image_{row}": _small(examples[row]["image"]) for row in rows}
  names = {"class_names": np.array(class_names)} if class_names else {}
  return {**facts, **images, **names}


def with_texts(
  facts: Facts, decode: Callable[[Sequence[int]], str]
) -> dict[str, np.ndarray]:
  """The facts, and how each token that occurs in them is written."""
  kinds = ("label", "guess", "teacher_guess")
  ids = np.unique(np.concatenate([facts[k] for k in kinds if k in facts]))
  texts = np.array(list(_texts(ids.tolist(), decode)), dtype=np.str_)
  return {**facts, "ids": ids, "texts": texts}


def _texts(
  ids: Iterable[int], decode: Callable[[Sequence[int]], str]
) -> Iterable[str]:
  for number in ids:
    # Some decoders drop the space that a text begins with: so the second of
    # two is looked at.
    once, twice = decode([number]), decode([number, number])
    text = twice[len(once) :] if twice.startswith(once) else once
    yield text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"


def _small(image: np.ndarray) -> np.ndarray:
  if max(image.shape[:2]) <= _SIDE:
    return image
  made = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
  made.thumbnail((_SIDE, _SIDE))
  return np.asarray(made).reshape(made.height, made.width, image.shape[-1])
