import os
import subprocess
import sys

import numpy as np
import pytest

from kdjax.data import text
from kdjax.data.text import corpus
from kdjax.types import UserError

LEFT_OUT = (
  "test/test_a.py",
  "json/tests/b.py",
  "site-packages/c.py",
  "dist-packages/c/d.py",
  "encodings/cp1.py",
  "_sysconfigdata__linux_.py",
  "empty.py",
  "d.txt",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """A tree like the standard library's, of 60 files."""
  top = tmp_path_factory.mktemp("lib")
  for n in range(60):
    path = top / f"package{n % 3}" / f"module{n}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"def function_{n}(x):\n  return 'naïve' + x\n" * 5)
  for name in LEFT_OUT:
    path = top / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("" if name == "empty.py" else "x = 1\n")
  (top / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n'\xe9'\n")
  return top


def test_files_are_split_by_a_hash_of_their_paths_alone(root, tmp_path):
  found = {}
  for split in corpus.SPLITS:
    documents = corpus.documents(split, data_dir=tmp_path, root=root)
    found[split] = list(documents.examples)
  want = {split: [] for split in corpus.SPLITS}
  paths = [f"package{n % 3}/module{n}.py" for n in range(60)]
  for path in sorted(paths):
    want[corpus.split_of(path)].append((root / path).read_text())
  assert found == want
  assert all(found.values())
  # As published: another split would mix the texts of two runs.
  tests = [n for n in range(60) if corpus.split_of(f"{n}.py") == "test"]
  assert tests == [29, 48, 49]


def test_tests_packages_tables_and_empty_files_are_left_out(root):
  found = corpus.sources(root)
  assert len(found) == 60
  assert not {*found} & {*LEFT_OUT, "latin.py"}


def test_version_and_hash_are_recorded_and_name_the_folder(root, tmp_path):
  builder = corpus.builder(tmp_path, root)
  digest = corpus.digest(corpus.sources(root))
  assert builder.info.metadata == {
    "python": sys.version.split()[0],
    "sha256": digest,
  }
  folder = f"python_{sys.version_info[0]}_{sys.version_info[1]}_{digest[:12]}"
  assert folder in str(builder.data_path)
  files = {path.name for path in builder.data_path.iterdir()}
  assert files == {
    "dataset_info.json",
    "features.json",
    "metadata.json",
    *(
      f"python_sources-{split}.array_record-00000-of-00001"
      for split in corpus.SPLITS
    ),
  }
  left = [p.name for p in builder.data_path.parent.iterdir()]
  assert left == [builder.data_path.name]


def test_the_hash_is_of_paths_and_contents():
  one = corpus.digest({"a.py": b"x", "b.py": b"y"})
  assert corpus.digest({"b.py": b"y", "a.py": b"x"}) == one
  for other in ({"a.py": b"x", "b.py": b"z"}, {"a.py": b"x", "c.py": b"y"}):
    assert corpus.digest(other) != one
  assert corpus.digest({"a.py": b"xb.py\0001\0y"}) != one


def test_preparing_writes_nothing_to_the_terminal(root, tmp_path, capfd):
  corpus.documents("train", data_dir=tmp_path, root=root)
  corpus.bpe(vocab_size=270, data_dir=tmp_path, root=root)
  assert capfd.readouterr() == ("", "")


def test_bpe_is_of_the_train_split_and_the_same_each_time(root, tmp_path):
  made = corpus.bpe(vocab_size=300, data_dir=tmp_path / "a", root=root)
  assert made.size == 300
  assert len(made.vocabulary) == 300
  again = corpus.bpe(vocab_size=300, data_dir=tmp_path / "b", root=root)
  assert again.files == made.files
  train = corpus.documents("train", data_dir=tmp_path / "a", root=root)
  whole = text.tokenize(train, made, folder=tmp_path / "tokens")
  assert whole.num_bytes.sum() == sum(len(t.encode()) for t in train.examples)
  assert len(whole.ids) < 0.5 * whole.num_bytes.sum()
  decoded = made.decode(whole.ids[: whole.offsets[1]].tolist())
  assert decoded == f"<|endoftext|>{train.examples[0]}<|endoftext|>"
  with pytest.raises(UserError, match="got vocab_size=259, needs 260 or more"):
    corpus.bpe(vocab_size=259, data_dir=tmp_path, root=root)


@pytest.mark.slow  # two processes, which import everything anew
def test_bpe_does_not_depend_on_the_number_of_threads():
  line = (
    "from kdjax.data.text import corpus; import hashlib;"
    "t = [f'def f{n}(x): return x * {n} + y{n % 7}' for n in range(200)];"
    "print(hashlib.sha256(corpus.train_bpe(iter(t), 320).to_str().encode())"
    ".hexdigest())"
  )
  found = {
    subprocess.run(
      [sys.executable, "-c", line],
      env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": seed},
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    for threads, seed in (("1", "1"), ("3", "2"))
  }
  assert len(found) == 1


def test_another_split_is_refused(tmp_path):
  with pytest.raises(UserError, match="needs one of train, validation, test"):
    corpus.documents("valid", data_dir=tmp_path)


def test_a_python_without_its_sources_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _: str(tmp_path))
  with pytest.raises(UserError, match="holds 0 bytes of Python sources, needs"):
    corpus.documents("train", data_dir=tmp_path / "made")


def test_the_running_pythons_library_is_there():
  found = corpus.sources()
  assert len(found) > 300
  assert "json/decoder.py" in found
  assert not any("test" in path.split("/")[:-1] for path in found)
  splits = [corpus.split_of(path) for path in found]
  for split, share in (("train", 0.9), ("validation", 0.05), ("test", 0.05)):
    np.testing.assert_allclose(
      splits.count(split) / len(found), share, atol=0.04
    )
