"""The laws of the repository as functions from a file to a list of violations.

Each takes the path relative to the root and the text, so that a test can hand it text that breaks the law.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
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

# Module that only one file may import, and that file.
SINGLE_READERS = {
    "faiss": f"{PACKAGE}/retrieval/index/faiss_index.py",
    "transformer_engine": f"{PACKAGE}/compat.py",
    "flash_attn": f"{PACKAGE}/compat.py",
    "importlib.metadata": f"{PACKAGE}/compat.py",
    "megatron.core.parallel_state": f"{PACKAGE}/parallel/context.py",
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
    for line, module in imported_modules(ast.parse(text)):
        layer = layer_of(module)
        if layer is None or layer in LEAVES or layer == "__version__":
            continue
        if own in LEAVES or LAYERS.index(layer) > LAYERS.index(own):
            bad.append(f"{path}:{line}: {own} imports {module}")
    return bad


def relative_imports(path: str, text: str) -> list[str]:
    """Every import says where its module is."""
    return [
        f"{path}:{node.lineno}: relative import"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.level
    ]


def init_only_reexports(path: str, text: str) -> list[str]:
    """An __init__.py holds a docstring, imports, and assignments to dunder names."""
    if PurePosixPath(path).name != "__init__.py":
        return []
    bad = []
    for node in ast.parse(text).body:
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
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.end_lineno is not None
        length = node.end_lineno - node.lineno + 1
        head = lines[max(node.lineno - 2, 0) : node.body[0].lineno]
        if length > MAX_FUNCTION_LINES and not any(re.search(r"# long: \S", line) for line in head):
            bad.append(f"{path}:{node.lineno}: {node.name} has {length} lines")
    return bad


def single_readers(path: str, text: str) -> list[str]:
    """What differs between machines and versions is asked in one place."""
    if not path.startswith((PACKAGE, "tools/", "benchmarks/")):
        return []
    bad = []
    for line, module in imported_modules(ast.parse(text)):
        for owned, owner in SINGLE_READERS.items():
            if path != owner and f"{module}.".startswith(f"{owned}."):
                bad.append(f"{path}:{line}: only {owner} imports {owned}")
    return bad


# Makes pickled weights, one of them malicious, to see how they are read.
PICKLE_TESTS = "tests/unit/convert/test_hf_folder.py"


def unsafe_reading(path: str, text: str) -> list[str]:
    """No file that is read may run code."""
    if path == PICKLE_TESTS:
        return []
    tree = ast.parse(text)
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
    tree = ast.parse(text)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    bad = []
    if "main" not in functions:
        bad.append(f"{path}: no main()")
    elif verb and [argument.arg for argument in functions["main"].args.args] != ["argv"]:
        bad.append(f"{path}: main() does not take argv")
    if not any(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in tree.body):
        bad.append(f"{path}: no __main__ guard")
    return bad


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
