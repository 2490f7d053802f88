"""The laws of the repository as functions to a list of violations.

Most take a file: its path relative to the root and its text. Laws between files take all of them as {path: text}.
Either way a test can hand them text that breaks the law.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath

PACKAGE = "megatron_grit"
LAYERS = [
    "config",
    "parallel",
    "data",
    "models",
    "losses",
    "planning",
    "training",
    "convert",
    "inference",
    "retrieval",
    "evaluation",
    "serving",
    "cli",
]
# Files and folders that every layer may import, and that import nothing but each other.
LEAVES = ["errors", "compat", "store"]
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_THIN_LINES = 500, 80, 80
MAX_PARAMETERS, MAX_FOLDER_FILES = 7, 15

# Module that only one file may import, and that file.
# Each may be imported in one file only, or nowhere.
SINGLE_READERS: dict[str, str | None] = {
    "faiss": f"{PACKAGE}/retrieval/index/faiss_index.py",
    "transformer_engine": f"{PACKAGE}/compat.py",
    "flash_attn": f"{PACKAGE}/compat.py",
    "importlib.metadata": f"{PACKAGE}/compat.py",
    "megatron.core.parallel_state": f"{PACKAGE}/parallel/context.py",
    "megatron.core.models.gpt": None,  # deprecated
    "megatron.core.models.hybrid": None,  # needs TransformerEngine and a GPU
}
# They execute code when they read.
UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# Written in pieces, so that this file keeps its own law.
MACHINE_TEXT = re.compile(
    "|".join(
        [
            r"(?<![\w.])/(?:work|tmp|root|home)/",
            r"pypi" + r"\.org",
            r"python" + r"hosted",
            r"download\.py" + r"torch",
            r"hugging" + r"face\.co/(?:api|datasets)/",
            r"set_" + r"trace\(",
            r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b",
        ]
    )
)


@lru_cache(maxsize=4096)
def _tree(text: str) -> ast.Module:
    return ast.parse(text)


def tracked_files(root: Path) -> list[str]:
    """Files that are or could be committed: everything that git does not ignore."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in sorted(set(listing.stdout.splitlines())) if (root / name).is_file()]


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, at any depth. ``from a import b`` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and _name(node.func).endswith("import_module"):
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield node.lineno, argument.value


def layer_of(module: str) -> str | None:
    """Layer of a dotted name, None where it is not of the package."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def import_arrows(path: str, text: str) -> list[str]:
    """Layers import only what lies below them; leaves import nothing of the package."""
    parts = PurePosixPath(path).with_suffix("").parts
    if parts[0] != PACKAGE or parts[1] == "__init__":
        return []
    own = parts[1]
    bad = []
    for line, module in imported_modules(_tree(text)):
        layer = layer_of(module)
        if layer is None or layer in LEAVES or layer == "__version__":
            continue
        if own in LEAVES or LAYERS.index(layer) > LAYERS.index(own):
            bad.append(f"{path}:{line}: {own} imports {module}")
    return bad


# Files above the kinds of row that may say a kind's name, and why.
NAMES_A_KIND = {
    "cli/evaluation/evaluate.py": "a flag that users type: the file of next tokens to evaluate",
    "config/database/megatron_training.py": "a preset: what Megatron-LM trains on are rows of next tokens",
    "config/database/run.py": "a preset: a database's documents become sources of next tokens",
    "config/kinds.py": "what training.objective unified is short for",
    "evaluation/checkpoint.py": "takes the flag",
    "evaluation/in_training.py": "limits the texts that it has tokenised",
    "inference/encode.py": "makes rows by hand",
    "retrieval/mining/mine.py": "reads a file's kind of record",
    "serving/service.py": "a word of the protocol that it speaks",
    "config/checks/checkpoint.py": "the section of the configuration with the embedding's shape",
    "convert/hf_out/scorer.py": "a label in the config.json of an export",
    "inference/rollouts/run.py": "a key of the file of completions",
}
# Folders below, or of, the kinds.
KIND_HOMES = ("config/schema/", "losses/", "parallel/", "training/objectives/")
# The two kinds whose options stand in other sections; each other kind has a section of its name.
_FIRST_KINDS = ("embedding", "generative")
_KIND_FILES = Path(__file__).parents[2] / PACKAGE / "config" / "schema" / "kinds"
KINDS = sorted(path.stem for path in _KIND_FILES.glob("*.py") if path.stem != "__init__")
_ANY, _OTHERS = "|".join(KINDS), "|".join(kind for kind in KINDS if kind not in _FIRST_KINDS)
_KIND_TEXT = re.compile(
    r"(?:data\.|training\.|loss\.)?(?:embedding|generative)(?:_batch_size|_rows)?|loss_(?:emb|gen)(?:_factor)?|accuracy_emb"
    rf"|(?:{_OTHERS})(?:\.\w+)?|\w+_(?:{_OTHERS})|(?:logps|rewards)/\w+"
)
_KIND_NAME = re.compile(
    rf"(?:^|_)generative(?:_|$)|^(?:{_ANY})_(?:rows?|part|counts|stream|objective|batch)|^(?:{_ANY.upper()})$"
)
_KIND_MODULE = re.compile(rf"\.(?:data\.kinds|training\.objectives|config\.schema\.kinds)\.(?:{_ANY})\b")


def kind_names(path: str, text: str) -> list[str]:
    """What is above the kinds of row asks for a kind by its name and knows none of the names itself.

    Found are names of kinds, of their options and of their metrics, as strings, identifiers and imports. In data only
    what is common to all rows is looked at: what lies below it holds kinds of records, which are a format on disk.
    """
    inner = path.removeprefix(f"{PACKAGE}/")
    if inner == path or inner in NAMES_A_KIND or inner.startswith(KIND_HOMES):
        return []
    if inner.startswith("data/") and not inner.startswith("data/rows/"):
        return []
    tree = _tree(text)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    bad = []
    for node in ast.walk(tree):
        words = [getattr(node, name, None) for name in ("id", "attr", "arg", "name")]
        found = [word for word in words if isinstance(word, str) and _KIND_NAME.search(word)]
        if (
            isinstance(node, ast.Attribute)
            and re.fullmatch(_OTHERS, node.attr)
            and _name(node.value).endswith("config")
        ):
            found.append(node.attr)  # the section
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            found += [node.value] if _KIND_TEXT.fullmatch(node.value) else []
        bad += [f"{path}:{getattr(node, 'lineno', '?')}: names a kind of row: {word}" for word in found]
    bad += [f"{path}:{line}: imports {name}" for line, name in imported_modules(tree) if _KIND_MODULE.search(name)]
    return bad


def relative_imports(path: str, text: str) -> list[str]:
    """Every import says where its module is."""
    return [
        f"{path}:{node.lineno}: relative import"
        for node in ast.walk(_tree(text))
        if isinstance(node, ast.ImportFrom) and node.level
    ]


def init_only_reexports(path: str, text: str) -> list[str]:
    """An __init__.py holds a docstring, imports, and assignments to dunder names."""
    if PurePosixPath(path).name != "__init__.py":
        return []
    bad = []
    for node in _tree(text).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        dunder = isinstance(node, ast.Assign) and all(_name(target).startswith("__") for target in node.targets)
        if not (docstring or dunder or isinstance(node, ast.Import | ast.ImportFrom)):
            bad.append(f"{path}:{node.lineno}: code in an __init__.py")
    return bad


def sizes(path: str, text: str) -> list[str]:
    """Files and functions fit in a head. A longer function gives its reason in a comment "# long: ..."."""
    lines = text.splitlines()
    bad = [f"{path}: {len(lines)} lines"] if len(lines) > MAX_FILE_LINES else []
    thin = path.startswith(("tools/", f"{PACKAGE}/cli/"))
    if thin and len(lines) > MAX_THIN_LINES:
        bad.append(f"{path}: {len(lines)} lines; tools/ and cli/ parse and call one function, in {MAX_THIN_LINES}")
    for node in ast.walk(_tree(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.end_lineno is not None
        length = node.end_lineno - node.lineno + 1
        if length > MAX_FUNCTION_LINES and not _reason("long", node, lines):
            bad.append(f"{path}:{node.lineno}: {node.name} has {length} lines")
    return bad


def parameters(path: str, text: str) -> list[str]:
    """A call can be read. More parameters give their reason in a comment "# many: ..."; tests take many fixtures."""
    if path.startswith("tests/"):
        return []
    lines = text.splitlines()
    bad = []
    for node in ast.walk(_tree(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        listed = [*node.args.posonlyargs, *node.args.args, node.args.vararg, *node.args.kwonlyargs, node.args.kwarg]
        names = [argument.arg for argument in listed if argument is not None]
        count = len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))
        if count > MAX_PARAMETERS and not _reason("many", node, lines):
            bad.append(f"{path}:{node.lineno}: {node.name} has {count} parameters")
    return bad


def _reason(word: str, node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> bool:
    head = lines[max(node.lineno - 2, 0) : node.body[0].lineno]
    return any(re.search(rf"# {word}: \S", line) for line in head)


def circles(files: dict[str, str]) -> list[str]:
    """No file of the package needs itself, over whatever path. Imports in functions and under TYPE_CHECKING count."""
    graph = _import_graph(files)
    reached = {path: _reachable(path, graph) for path in graph}
    found = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}
    return sorted("circle: " + ", ".join(sorted(circle)) for circle in found)


def _import_graph(files: dict[str, str]) -> dict[str, set[str]]:
    """The files of the package that each of them imports. A folder's name stands for its __init__.py."""
    paths = [path for path in files if path.startswith(f"{PACKAGE}/") and path.endswith(".py")]
    modules = {_module_of(path): path for path in paths}
    graph: dict[str, set[str]] = {}
    for path in paths:
        graph[path] = set()
        for _, name in imported_modules(_tree(files[path])):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name not in ("", PACKAGE):
                graph[path].add(modules[name])
    return graph


def _reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    ahead = list(graph[start])
    while ahead:
        path = ahead.pop()
        if path not in seen:
            seen.add(path)
            ahead += graph[path]
    return seen


# Its files are found as if they lay in the folders of the package.
TOY_KIND = "tests/unit/kinds/"


def unresolved_imports(files: dict[str, str]) -> list[str]:
    """What is imported from this repository is there, imports inside functions included, which no start would try."""
    modules = {_module_of(path): path for path in files if path.endswith(".py")}
    packages = {name.rpartition(".")[0] for name in modules} | {name.partition(".")[0] for name in modules}
    names = {module: _top_level_names(_tree(files[path])) for module, path in modules.items()}
    bad = []
    for path in modules.values():
        if path.startswith(TOY_KIND):
            continue
        for node in ast.walk(_tree(files[path])):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in (PACKAGE, "tests"):
                found = names.get(node.module, set())
                for name in (alias.name for alias in node.names):
                    whole = f"{node.module}.{name}"
                    if name not in found and whole not in modules and whole not in packages:
                        bad.append(f"{path}:{node.lineno}: there is no {whole}")
            elif isinstance(node, ast.Import):
                for name in (alias.name for alias in node.names):
                    if name.startswith(f"{PACKAGE}.") and name not in modules and name not in packages:
                        bad.append(f"{path}:{node.lineno}: there is no {name}")
    return bad


def _module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _top_level_names(tree: ast.Module) -> set[str]:
    """Names that a module defines or imports, under conditions as well."""
    names: set[str] = set()
    ahead: list[ast.AST] = list(tree.body)
    while ahead:
        node = ahead.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        ahead += ast.iter_child_nodes(node)
    return names


def crowded_folders(files: dict[str, str]) -> list[str]:
    """A folder's table of contents can be taken in at once."""
    counts: dict[str, int] = defaultdict(int)
    for path in files:
        if path.startswith((f"{PACKAGE}/", "tools/")) and path.endswith(".py"):
            counts[str(PurePosixPath(path).parent)] += 1
    return [f"{folder}: {count} Python files" for folder, count in counts.items() if count > MAX_FOLDER_FILES]


def class_names(files: dict[str, str]) -> list[str]:
    """Within a layer a class's name means one thing; a leading underscore does not make it another."""
    homes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path, text in files.items():
        if path.startswith(f"{PACKAGE}/") and path.endswith(".py"):
            for node in ast.walk(_tree(text)):
                if isinstance(node, ast.ClassDef):
                    homes[PurePosixPath(path).parts[1], node.name.lstrip("_")].append(path)
    return [
        f"{layer}: class {name} in {', '.join(sorted(paths))}"
        for (layer, name), paths in homes.items()
        if len(paths) > 1
    ]


def single_readers(path: str, text: str) -> list[str]:
    """What differs between machines and versions is asked in one place."""
    if not path.startswith((PACKAGE, "tools/", "benchmarks/")):
        return []
    bad = []
    for line, module in imported_modules(_tree(text)):
        for owned, owner in SINGLE_READERS.items():
            if path != owner and f"{module}.".startswith(f"{owned}."):
                bad.append(f"{path}:{line}: {f'only {owner}' if owner else 'no file'} imports {owned}")
    return bad


# Makes pickled weights, one of them malicious, to see how they are read.
PICKLE_TESTS = "tests/unit/convert/hf_in/test_reader.py"


def unsafe_reading(path: str, text: str) -> list[str]:
    """No file that is read may run code."""
    if path == PICKLE_TESTS:
        return []
    tree = _tree(text)
    bad = [
        f"{path}:{line}: imports {module}"
        for line, module in imported_modules(tree)
        if module.split(".")[0] in UNSAFE_MODULES
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = _name(node.func)
        constants = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        if name == "torch.load" and constants.get("weights_only") is not True:
            bad.append(f"{path}:{node.lineno}: torch.load without weights_only=True")
        if name == "torch.save":
            bad.append(f"{path}:{node.lineno}: torch.save writes a pickle; use safetensors")
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            bad.append(f"{path}:{node.lineno}: {name}; use yaml.safe_load")
        bad += [
            f"{path}:{node.lineno}: {flag}"
            for flag in ("allow_pickle", "trust_remote_code")
            if constants.get(flag) is True
        ]
    return bad


def machine_text(path: str, text: str) -> list[str]:
    """No paths of one machine, no hosts of package indexes, nothing left unfinished."""
    return [
        f"{path}:{number}: {found[0]}"
        for number, line in enumerate(text.splitlines(), 1)
        if (found := MACHINE_TEXT.search(line))
    ]


def entry_points(path: str, text: str) -> list[str]:
    """A command is main(argv) behind a __main__ guard: saving a checkpoint starts processes that import it again."""
    verb = path.startswith(f"{PACKAGE}/cli/") and not path.endswith("__init__.py")
    if not (verb or path.startswith("tools/")):
        return []
    tree = _tree(text)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    bad = []
    imported = any(
        module.startswith(f"{PACKAGE}.cli.") and module.endswith(".main") for _, module in imported_modules(tree)
    )
    if "main" not in functions and (verb or not imported):
        bad.append(f"{path}: no main()")
    elif verb and [argument.arg for argument in functions["main"].args.args][:1] != ["argv"]:
        bad.append(f"{path}: main() does not take argv")
    if not any(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in tree.body):
        bad.append(f"{path}: no __main__ guard")
    return bad


COMMAND_LINE_READERS = {"argparse", "jsonargparse", "optparse", "getopt", "click", "typer", "fire"}


def flags_from_dataclasses(path: str, text: str) -> list[str]:
    """Flags are fields of dataclasses; config/commands.py reads and explains them, and nothing else does."""
    if not path.startswith((f"{PACKAGE}/", "tools/", "examples/")):
        return []
    tree = _tree(text)
    bad = [
        f"{path}:{line}: imports {module}; declare a dataclass and give it to cli.main.command"
        for line, module in imported_modules(tree)
        if module.split(".")[0] in COMMAND_LINE_READERS
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node.func).endswith("add_argument"):
            bad.append(f"{path}:{node.lineno}: add_argument; declare a field")
        reads = isinstance(node, ast.Attribute) and _name(node) == "sys.argv"
        if reads and not path.startswith("examples/") and path not in ARGV_READERS:
            bad.append(f"{path}:{node.lineno}: reads sys.argv")
    return bad


ARGV_READERS = {f"{PACKAGE}/config/commands.py", f"{PACKAGE}/config/parse.py", f"{PACKAGE}/cli/main.py"}


def shell_scripts(path: str, text: str) -> list[str]:
    """A script that goes on after an error does harm."""
    if not text.startswith("#!/usr/bin/env bash"):
        return []
    strict = re.search(r"^set -e?uo pipefail$", text, re.MULTILINE)
    return [] if strict else [f"{path}: no 'set -euo pipefail'"]


def markdown_links(path: str, text: str, root: Path) -> list[str]:
    """Links between documents, their anchors, and paths of the repository in code spans lead somewhere."""
    bad = []
    prose = re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    for number, line in enumerate(prose.splitlines(), 1):
        for target in re.findall(r"\]\(([^)\s]+)\)", line):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            file = (root / path).parent / name if name else root / path
            if name and not file.exists():
                bad.append(f"{path}:{number}: no {target}")
            elif anchor and anchor not in _anchors(text if not name else file.read_text(encoding="utf-8")):
                bad.append(f"{path}:{number}: no heading {target}")
        for span in re.findall(r"`([^`]+)`", line):
            for word in re.findall(rf"(?<![\w/.])(?:{PACKAGE}|tools|examples|tests|docs|benchmarks)/[\w./-]*\w", span):
                if not (root / word).exists():
                    bad.append(f"{path}:{number}: no file {word}")
    return bad


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""
