"""Write a retrieval and text corpus from Python's own documentation, which is on every machine: four JSONL files.

Example:
    python examples/pydoc_corpus.py --output-dir corpus

Pairs: the qualified name and signature of a function, method or class is the query, its docstring the passage.
Texts: the language reference topics behind ``help()`` and the docstrings of modules. Source files are read with
:mod:`ast` and never imported; only modules written in C, named in ``_EXTENSION_MODULES``, are imported.

What keeps the held-out figures honest:

* The split is by top-level module (``json.decoder`` goes with ``json``), by a hash of its name. A held-out module
  gives at most ``_MAX_HELD_OUT_PER_MODULE`` pairs, so that no large one decides the figures; its others are unused.
* A docstring's leading lines that repeat the signature are removed (:func:`clean_docstring`). A name within its
  sentences stays: that is how documentation reads.
* A docstring is kept once on each side, and one whose normalised beginning is held out is not trained on, however
  different its module. Platform twins and C accelerators (``ntpath``, ``_pydecimal``) go with their public module.
* A whole group of twin modules is on one side (``_MODULE_GROUPS``).

The numbers differ a little between Python versions: they document different functions.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob
from megatron_grit.errors import DataError
from megatron_grit.store.files import replacing

QUERY_INSTRUCTION = "Find the documentation"
"""Instruction of every query; passages have none."""

_HELD_OUT_SHARE = 0.15
_MAX_HELD_OUT_PER_MODULE = 24
_MIN_WORDS = 4
_MIN_WRAPPED_CHARS = 50
_MAX_SIGNATURE_CHARS = 160
_MAX_PASSAGE_CHARS = 1500
_PIECE_CHARS = 1200
_FINGERPRINT_CHARS = 80

_SKIPPED_FOLDERS = {
    "__pycache__",
    "_bundled",
    "__phello__",
    "dist-packages",
    "idlelib",
    "lib-dynload",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_SKIPPED_MODULES = {"antigravity", "this", "__hello__", "lib2to3"}

_EXTENSION_MODULES = (
    "_bisect _codecs _collections _csv _datetime _functools _heapq _io _json _operator _pickle _queue _random _socket "
    "_sqlite3 _ssl _struct _thread _weakref array atexit binascii builtins cmath errno faulthandler fcntl gc itertools "
    "marshal math mmap posix pyexpat resource select signal sys syslog termios time unicodedata zlib"
).split()
"""C modules whose docstrings are read from the imported module. Those absent on a machine are left out."""

_MODULE_GROUPS = {
    "ntpath": "os",
    "posixpath": "os",
    "genericpath": "os",
    "posix": "os",
    "nt": "os",
    "pyexpat": "xml",
    "sre_compile": "re",
    "sre_constants": "re",
    "sre_parse": "re",
    "aifc": "wave",
    "sunau": "wave",
    "dummy_threading": "threading",
    "_thread": "threading",
    "_threading_local": "threading",
    "_collections_abc": "collections",
    "_py_abc": "abc",
    "_weakrefset": "weakref",
    "_strptime": "time",
    "_aix_support": "sysconfig",
    "_osx_support": "sysconfig",
    "concurrent": "multiprocessing",
}
"""Modules that document nearly the same functions as another and so share its side of the split."""


@dataclass(frozen=True, kw_only=True)
class DocEntry:
    """One documented object."""

    module: str
    """Top-level module or group that decides the side of the split."""
    kind: str
    """"module", "class" or "function" (methods included)."""
    signature: str
    """Qualified name, with parameters where they are known."""
    docstring: str
    """Cleaned text."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The four files' records, in the JSONL formats of tools/preprocess/build_grit.py, and counts."""

    train_embedding: list[dict]
    train_generative: list[dict]
    heldout_embedding: list[dict]
    heldout_generative: list[dict]
    num_train_modules: int
    num_heldout_modules: int


def module_group(name: str) -> str:
    """Top-level module, or the group that stands for it: ``_pydecimal`` and ``_decimal`` are ``decimal``."""
    top = name.split(".")[0]
    if top in _MODULE_GROUPS:
        return _MODULE_GROUPS[top]
    bare = re.sub(r"^_(py|c)?(?=[a-z])", "", top)
    return bare if bare in sys.stdlib_module_names else top


def is_held_out(name: str, share: float = _HELD_OUT_SHARE) -> bool:
    """Whether a module group is held out: a pure function of its name."""
    digest = hashlib.sha256(f"held-out:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def clean_docstring(docstring: str, name: str) -> str:
    """Docstring without indentation, wrapped lines, and leading lines that repeat the signature of ``name``.

    What such a line says after the signature stays where it is more than a type: of
    ``D.pop(k[,d]) -> v, remove specified key`` the part after the arrow, of ``range(stop) -> range object`` nothing.
    """
    lines = inspect.cleandoc(docstring).splitlines()
    bare = re.escape(name.rsplit(".", 1)[-1])
    signature = re.compile(rf"^\s*(?:[\w.]+\.)?{bare}\s*\(.*?\)\s*(?:$|(?:->|--|:)\s*(.*)$)")
    while lines and (match := signature.match(lines[0])):
        lines.pop(0)
        described = match.group(1) or ""
        if len(described.split()) >= _MIN_WORDS:
            lines.insert(0, described)
            break
        while lines and not lines[0].strip():
            lines.pop(0)
    return unwrap_lines("\n".join(line.rstrip() for line in lines).strip())


def unwrap_lines(text: str) -> str:
    """Text whose wrapped paragraphs are one line each: where its lines end says nothing, and costs tokens.

    A line goes on in the next where it is long, the next is not indented otherwise and does not begin an item, and
    neither is an example.
    """
    lines: list[str] = []
    wrapped = False  # whether the line before, as it stood in ``text``, may go on
    for line in text.splitlines():
        words = line.lstrip()
        indent = len(line) - len(words)
        if wrapped and re.match(r"[^\W\d]|[`'\"(<]", words) and indent == len(lines[-1]) - len(lines[-1].lstrip()):
            lines[-1] += " " + words
        else:
            lines.append(line)
        wrapped = len(line) >= _MIN_WRAPPED_CHARS and not words.startswith((">>>", "...", "|", "+", "$"))
    return "\n".join(lines)


def read_source_entries(stdlib: Path) -> Iterator[DocEntry]:
    """Objects of every module under ``stdlib``, without importing one, in the order of their files' names.

    An object without documentation has an empty docstring.
    """
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if any(part in _SKIPPED_FOLDERS or part.startswith("config-") for part in parts[:-1]):
            continue
        if parts[0] in _SKIPPED_MODULES or parts[0] not in sys.stdlib_module_names:
            continue  # distributions put modules of their own beside the standard library
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old sources are not our business
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # templates such as lib2to3's bad samples are not modules
        group = module_group(name)
        text = clean_docstring(ast.get_docstring(tree) or "", name)
        yield DocEntry(module=group, kind="module", signature=name, docstring=text)
        yield from _walk_definitions(tree.body, name, group)


def _walk_definitions(body: list[ast.stmt], prefix: str, group: str) -> Iterator[DocEntry]:
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _walk_definitions([*node.body, *node.orelse], prefix, group)
            continue
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_") and not node.name.endswith("__"):
            continue
        qualified = f"{prefix}.{node.name}"
        is_class = isinstance(node, ast.ClassDef)
        text = clean_docstring(ast.get_docstring(node) or "", node.name)
        function = _constructor(node) if isinstance(node, ast.ClassDef) else node
        arguments = "" if function is None else _render_arguments(function.args)
        signature = _cut_signature(f"{qualified}({arguments})")
        yield DocEntry(module=group, kind="class" if is_class else "function", signature=signature, docstring=text)
        if isinstance(node, ast.ClassDef):
            yield from _walk_definitions(node.body, qualified, group)


def _constructor(node: ast.ClassDef) -> ast.FunctionDef | None:
    return next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)


def _render_arguments(arguments: ast.arguments) -> str:
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        argument.annotation = None
    text = ast.unparse(arguments)
    return re.sub(r"^(self|cls)(, (/, )?|$)", "", text)


def _cut_signature(signature: str) -> str:
    if len(signature) <= _MAX_SIGNATURE_CHARS:
        return signature
    return signature[: _MAX_SIGNATURE_CHARS - 4].rsplit(",", 1)[0] + ", ...)"


def read_extension_entries() -> Iterator[DocEntry]:
    """Documented objects of the C modules that this Python has."""
    for name in _EXTENSION_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        public = name.lstrip("_") if name.lstrip("_") in sys.stdlib_module_names else name
        group = module_group(name)
        for attribute in sorted(vars(module)):
            member = getattr(module, attribute)
            if attribute.startswith("_") or not (inspect.isbuiltin(member) or inspect.isclass(member)):
                continue
            if inspect.isclass(member) and member.__module__ not in (name, public):
                continue
            yield from _builtin_entry(member, f"{public}.{attribute}", group)
            if not inspect.isclass(member) or issubclass(member, BaseException):
                continue  # an exception's methods are those of BaseException
            for method in sorted(vars(member)):
                function = vars(member)[method]
                if not method.startswith("_") and callable(function):
                    yield from _builtin_entry(function, f"{public}.{attribute}.{method}", group)


def _builtin_entry(member: object, qualified: str, group: str) -> Iterator[DocEntry]:
    docstring = getattr(member, "__doc__", None)
    if not isinstance(docstring, str):
        return
    signature = getattr(member, "__text_signature__", None)
    arguments = "" if not signature else re.sub(r"\$(self|module|type|cls)(, (/, )?)?(/$)?", "", signature[1:-1])
    kind = "class" if inspect.isclass(member) else "function"
    text = clean_docstring(docstring, qualified)
    yield DocEntry(module=group, kind=kind, signature=_cut_signature(f"{qualified}({arguments})"), docstring=text)


def split_text(text: str, max_chars: int = _PIECE_CHARS) -> list[str]:
    """Pieces of at most about ``max_chars`` characters that end at paragraphs; a longer paragraph is one piece."""
    pieces: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if pieces and len(pieces[-1]) + len(paragraph) < max_chars:
            pieces[-1] += "\n\n" + paragraph
        else:
            pieces.append(paragraph)
    return pieces


def read_topics() -> dict[str, str]:
    """Name and text of each language reference topic.

    Raises:
        DataError: where this Python was installed without its documentation topics.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("this Python has no pydoc_data.topics; install its standard library in full") from error
    return {name: unwrap_lines(topics[name]) for name in sorted(topics)}


def _fingerprint(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().lower()[:_FINGERPRINT_CHARS]


def _usable_pair(entry: DocEntry) -> bool:
    return entry.kind != "module" and len(entry.docstring.split()) >= _MIN_WORDS


def _pair(entry: DocEntry) -> dict:
    passage = entry.docstring[:_MAX_PASSAGE_CHARS]
    return {"query": [QUERY_INSTRUCTION, entry.signature], "pos": [["", passage]], "module": entry.module}


def build_corpus(entries: Iterable[DocEntry], topics: dict[str, str]) -> Corpus:
    """Split, deduplicate and format.

    Args:
        entries: documented objects in a fixed order; the first of equal docstrings is kept.
        topics: name and text of each reference topic.

    Raises:
        DataError: nothing on one side of the split.
    """
    sides: dict[bool, list[DocEntry]] = {False: [], True: []}
    for entry in entries:
        sides[is_held_out(entry.module)].append(entry)
    pairs: dict[bool, list[DocEntry]] = {False: [], True: []}
    seen: set[str] = set()
    for held_out in (True, False):  # held-out first: what it has is barred from training
        for entry in sides[held_out]:
            fingerprint = _fingerprint(entry.docstring)
            if _usable_pair(entry) and fingerprint not in seen:
                seen.add(fingerprint)
                pairs[held_out].append(entry)
    pairs[True] = _cap_per_module(pairs[True])
    if not pairs[False] or not pairs[True]:
        raise DataError("no docstrings found; is this Python's standard library installed as source files?")

    texts: dict[bool, list[dict]] = {False: [], True: []}
    for held_out in (False, True):
        for entry in sides[held_out]:
            if entry.kind == "module" and len(entry.docstring.split()) >= _MIN_WORDS:
                texts[held_out] += [{"text": piece} for piece in split_text(entry.docstring)]
        for entry in pairs[held_out]:
            answer = entry.docstring[:_MAX_PASSAGE_CHARS]
            texts[held_out].append({"text": [f"What does {entry.signature} do?", answer]})
    for topic, text in topics.items():
        texts[is_held_out(f"topic {topic}")] += [{"text": piece} for piece in split_text(text)]
    for held_out in (True, False):
        texts[held_out] = _drop_duplicates(texts[held_out], texts[True] if not held_out else [])

    return Corpus(
        train_embedding=[_pair(entry) for entry in pairs[False]],
        train_generative=texts[False],
        heldout_embedding=[_pair(entry) for entry in pairs[True]],
        heldout_generative=texts[True],
        num_train_modules=len({entry.module for entry in pairs[False]}),
        num_heldout_modules=len({entry.module for entry in pairs[True]}),
    )


def _cap_per_module(entries: list[DocEntry]) -> list[DocEntry]:
    """At most ``_MAX_HELD_OUT_PER_MODULE`` entries of each module: those with the smallest hash of their signature."""
    by_module: dict[str, list[DocEntry]] = {}
    for entry in sorted(entries, key=lambda entry: hashlib.sha256(entry.signature.encode()).digest()):
        by_module.setdefault(entry.module, []).append(entry)
    return [entry for module in sorted(by_module) for entry in by_module[module][:_MAX_HELD_OUT_PER_MODULE]]


def _drop_duplicates(records: list[dict], barred: list[dict]) -> list[dict]:
    """``records`` without repeats and without those whose last text begins like one of ``barred``."""

    def key(record: dict) -> str:
        text = record["text"]
        return _fingerprint(text if isinstance(text, str) else text[-1])

    seen = {key(record) for record in barred}
    kept = []
    for record in records:
        if key(record) not in seen:
            seen.add(key(record))
            kept.append(record)
    return kept


def write_corpus(output_dir: Path, *, stdlib: Path | None = None) -> dict[str, int]:
    """Write train_embedding, train_generative, heldout_embedding and heldout_generative ``.jsonl``.

    Each file appears whole or not at all.

    Args:
        output_dir: made if it does not exist.
        stdlib: folder of the standard library. None: this Python's.

    Returns:
        Counts of records and modules, for printing.

    Raises:
        DataError: no documentation on this machine.
    """
    stdlib = stdlib or Path(sysconfig.get_paths()["stdlib"])
    corpus = build_corpus([*read_source_entries(stdlib), *read_extension_entries()], read_topics())
    output_dir.mkdir(parents=True, exist_ok=True)
    counts = {"train_modules": corpus.num_train_modules, "heldout_modules": corpus.num_heldout_modules}
    for name in ("train_embedding", "train_generative", "heldout_embedding", "heldout_generative"):
        records = getattr(corpus, name)
        path = output_dir / f"{name}.jsonl"
        with replacing(path) as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        counts[name] = len(records)
    return counts


@dataclass(kw_only=True)
class CorpusOptions:
    """Where the corpus goes."""

    output_dir: Path = knob()
    """Folder for the four .jsonl files."""


def run(options: CorpusOptions) -> None:
    """Write the files and print how many records each has."""
    for name, count in write_corpus(options.output_dir).items():
        print(f"{name:20s} {count:6d}")


if __name__ == "__main__":
    sys.exit(command(CorpusOptions, run, None, prog="pydoc_corpus", about=__doc__))
