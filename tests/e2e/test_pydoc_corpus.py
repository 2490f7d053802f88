from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from examples import pydoc_corpus
from examples.pydoc_corpus import DocEntry, build_corpus, clean_docstring, is_held_out, module_group
from megatron_grit.errors import DataError

HELD_OUT = next(name for name in (f"module{i}" for i in range(1000)) if is_held_out(name))
TRAINED = next(name for name in (f"module{i}" for i in range(1000)) if not is_held_out(name))


def entry(module: str, name: str, docstring: str, kind: str = "function") -> DocEntry:
    return DocEntry(module=module, kind=kind, signature=f"{module}.{name}()", docstring=docstring)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("corpus")
    counts = pydoc_corpus.write_corpus(folder)
    records = {}
    for path in sorted(folder.iterdir()):
        with path.open(encoding="utf-8") as lines:
            records[path.stem] = [json.loads(line) for line in lines]
    assert {name: len(values) for name, values in records.items()}.items() <= counts.items()
    return records


def test_scale_of_the_corpus(corpus: dict[str, list[dict]]) -> None:
    assert len(corpus["train_embedding"]) > 4000
    assert 250 < len(corpus["heldout_embedding"]) < 500
    assert len({record["module"] for record in corpus["heldout_embedding"]}) >= 15
    assert len(corpus["train_generative"]) > 5000 and len(corpus["heldout_generative"]) > 250


def test_no_module_is_on_both_sides(corpus: dict[str, list[dict]]) -> None:
    trained = {record["module"] for record in corpus["train_embedding"]}
    held_out = {record["module"] for record in corpus["heldout_embedding"]}
    assert not trained & held_out


def normalised(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().lower()


def test_no_held_out_text_is_trained_on(corpus: dict[str, list[dict]]) -> None:
    held_out = {normalised(record["pos"][0][1]) for record in corpus["heldout_embedding"]}
    trained = {normalised(record["pos"][0][1]) for record in corpus["train_embedding"]}
    for record in corpus["train_generative"]:
        trained.add(normalised(record["text"] if isinstance(record["text"], str) else record["text"][1]))
    assert len(held_out) == len(corpus["heldout_embedding"])  # one passage answers one query
    assert not held_out & trained
    queries = {record["query"][1] for record in corpus["heldout_embedding"]}
    assert not queries & {record["query"][1] for record in corpus["train_embedding"]}


def test_known_entries(corpus: dict[str, list[dict]]) -> None:
    passages = {r["query"][1]: r["pos"][0][1] for r in corpus["train_embedding"] + corpus["heldout_embedding"]}
    dumps = next(query for query in passages if query.startswith("json.dumps("))
    assert "skipkeys=False" in dumps and passages[dumps].startswith("Serialize ``obj`` to a JSON formatted ``str``")
    assert passages["math.perm(n, k=None, /)"].startswith("Number of ways to choose k items")
    assert any(query.startswith("textwrap.TextWrapper.fill(text)") for query in passages)  # self is left out


def test_same_files_under_another_hash_seed(tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.mkdir()
    for name in ("json", "logging", "threading.py", "argparse.py"):
        source = Path(sysconfig.get_paths()["stdlib"]) / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, library / name)
    code = "import sys; from pathlib import Path; from examples.pydoc_corpus import write_corpus; "
    code += "write_corpus(Path(sys.argv[1]), stdlib=Path('library'))"
    for seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        subprocess.run([sys.executable, "-c", code, seed], cwd=tmp_path, env=environment, check=True)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len(names) == 4 and names == sorted(path.name for path in (tmp_path / "2").iterdir())
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_repeated_docstring_is_kept_once_and_held_out_first() -> None:
    same = "Return the number of things that are there."
    entries = [
        entry(TRAINED, "a", same),
        entry(TRAINED, "b", "Close the connection and wait for it."),
        entry(HELD_OUT, "c", same.upper()),  # differs only in case
        entry(HELD_OUT, "d", same),
    ]
    corpus = build_corpus(entries, {})
    assert [record["query"][1] for record in corpus.heldout_embedding] == [f"{HELD_OUT}.c()"]
    assert [record["query"][1] for record in corpus.train_embedding] == [f"{TRAINED}.b()"]
    assert [record["text"][0] for record in corpus.train_generative] == [f"What does {TRAINED}.b() do?"]


def test_text_of_a_held_out_module_is_not_trained_on() -> None:
    same = "A module that exists under two names."
    entries = [
        entry(TRAINED, "a", "Something that is trained on."),
        entry(HELD_OUT, "b", "Something that is held out."),
        DocEntry(module=TRAINED, kind="module", signature=TRAINED, docstring=same),
        DocEntry(module=HELD_OUT, kind="module", signature=HELD_OUT, docstring=same),
    ]
    corpus = build_corpus(entries, {})
    assert {"text": same} in corpus.heldout_generative
    assert [record["text"][-1] for record in corpus.train_generative] == ["Something that is trained on."]


def test_large_module_does_not_decide_the_figures() -> None:
    entries = [entry(HELD_OUT, f"f{i}", f"Function number {i} of a large module.") for i in range(100)]
    corpus = build_corpus([*entries, entry(TRAINED, "a", "Something that is trained on.")], {})
    assert len(corpus.heldout_embedding) == pydoc_corpus._MAX_HELD_OUT_PER_MODULE
    assert len(corpus.train_embedding) == 1


def test_short_docstring_is_no_passage() -> None:
    with pytest.raises(DataError, match="no docstrings found"):
        build_corpus([entry(TRAINED, "a", "Too short."), entry(HELD_OUT, "b", "This one is long enough.")], {})


@pytest.mark.parametrize(
    ("docstring", "name", "expected"),
    [
        ("range(stop) -> range object\nrange(start, stop) -> range object\n\nReturn one.", "range", "Return one."),
        ("D.keys() -> a set-like object with D's keys", "dict.keys", "a set-like object with D's keys"),
        ("D.pop(k[,d]) -> v, remove specified key.", "dict.pop", "v, remove specified key."),
        ("D.f() -> bool.  Whether it is so.", "f", "bool.  Whether it is so."),
        ("close() has to be called at the end.", "close", "close() has to be called at the end."),
        ("Return getpid() of the parent.", "getpid", "Return getpid() of the parent."),
        ("First line.\n\n    Indented body.\n    ", "f", "First line.\n\nIndented body."),
    ],
)
def test_clean_docstring(docstring: str, name: str, expected: str) -> None:
    assert clean_docstring(docstring, name) == expected


def test_unwrap_lines() -> None:
    long, other = "A sentence that is long enough to have been wrapped by", "its author at the width of a terminal."
    assert pydoc_corpus.unwrap_lines(f"{long}\n{other}\n\n{other}") == f"{long} {other}\n\n{other}"
    assert pydoc_corpus.unwrap_lines(f"  {long}\n  {other}") == f"  {long} {other}"
    assert pydoc_corpus.unwrap_lines(f"{long}\n{long}\n{other}") == f"{long} {long} {other}"
    for kept in (
        f"Short line\n{other}",
        f"{long}\n  {other}",
        f"{long}\n- {other}",
        f"{long}\n1. {other}",
        f"{long}\n>>> {other}",
        f">>> {long}\n{other}",
    ):
        assert pydoc_corpus.unwrap_lines(kept) == kept


def test_module_groups() -> None:
    assert module_group("json.decoder") == "json"
    assert module_group("_pydecimal") == module_group("_decimal") == module_group("decimal") == "decimal"
    assert module_group("ntpath") == module_group("posixpath") == module_group("os") == "os"
    assert module_group("_collections_abc") == "collections"
    assert module_group("__future__") == "__future__"


def test_source_is_read_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text('''
raise SystemExit("imported")

if True:
    def dumps(obj: object, /, *, indent: int = 4) -> str:
        """Serialize an object to a string."""

class Decoder:
    """Decodes documents into objects of Python."""

    def __init__(self, strict=True): ...

    async def decode(self, s, _w=None):
        """Return the object of a document."""

    def _private(self):
        """This is not public documentation."""
''')
    (tmp_path / "ast.py").write_text("def broken(:\n")
    (tmp_path / "not_in_the_standard_library.py").write_text('"""A module that a distribution added."""\n')
    entries = list(pydoc_corpus.read_source_entries(tmp_path))
    assert entries[3].docstring == "" and entries[4].docstring == "Return the object of a document."
    assert [(e.kind, e.signature) for e in entries] == [
        ("module", "json"),
        ("function", "json.dumps(obj, /, *, indent=4)"),
        ("class", "json.Decoder(strict=True)"),
        ("function", "json.Decoder.__init__(strict=True)"),
        ("function", "json.Decoder.decode(s, _w=None)"),
    ]


def test_split_text_loses_nothing() -> None:
    text = "\n\n".join(f"Paragraph {i}. " + "word " * (i * 20) for i in range(20))
    pieces = pydoc_corpus.split_text(text, max_chars=500)
    assert len(pieces) > 10
    assert "".join(pieces).split() == "".join(text.split("\n\n")).split() or " ".join(pieces).split() == text.split()
    assert all(len(piece) < 500 or "\n\n" not in piece for piece in pieces)
