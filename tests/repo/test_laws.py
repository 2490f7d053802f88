"""Every file keeps the laws, and every law is able to fail."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.repo import laws

Law = Callable[[str, str], list[str]]
LawOfAll = Callable[[dict[str, str]], list[str]]
PYTHON_LAWS: list[Law] = [
    laws.import_arrows,
    laws.relative_imports,
    laws.init_only_reexports,
    laws.sizes,
    laws.parameters,
    laws.single_readers,
    laws.unsafe_reading,
    laws.entry_points,
    laws.kind_names,
    laws.flags_from_dataclasses,
]
LAWS_OF_ALL: list[LawOfAll] = [laws.circles, laws.crowded_folders, laws.class_names, laws.unresolved_imports]
LONG_FUNCTION = "def f():\n" + "    x = 1\n" * 85

# A law, a path, and a text that breaks it there.
BROKEN: list[tuple[Law, str, str]] = [
    (laws.import_arrows, "megatron_grit/data/a.py", "from megatron_grit.models.decoder import build_model"),
    (laws.import_arrows, "megatron_grit/data/a.py", "def f():\n    import megatron_grit.training.step"),
    (laws.import_arrows, "megatron_grit/config/a.py", "from megatron_grit import cli"),
    (laws.import_arrows, "megatron_grit/data/a.py", "importlib.import_module('megatron_grit.cli.train')"),
    (laws.import_arrows, "megatron_grit/errors.py", "from megatron_grit.config.schema import RunConfig"),
    (laws.import_arrows, "megatron_grit/store/a.py", "from megatron_grit.config.schema import RunConfig"),
    (laws.kind_names, "megatron_grit/training/a.py", 'rows = batch.rows_of("generative")'),
    (laws.kind_names, "megatron_grit/training/a.py", "rows = batch.embedding_rows"),
    (laws.kind_names, "megatron_grit/planning/a.py", "if row.kind is RowKind.GENERATIVE: pass"),
    (laws.kind_names, "megatron_grit/convert/a.py", 'shown = ("loss", "loss_emb")'),
    (laws.kind_names, "megatron_grit/config/checks/a.py", 'Problem("training.embedding_batch_size")'),
    (laws.kind_names, "megatron_grit/data/rows/a.py", "from megatron_grit.data.kinds.embedding import STREAM"),
    (laws.kind_names, "megatron_grit/training/a.py", "from megatron_grit.training.objectives import generative"),
    (laws.kind_names, "megatron_grit/training/a.py", 'rows = batch.rows_of("preference")'),
    (laws.kind_names, "megatron_grit/training/a.py", "weight = self.config.reward.weight"),
    (laws.kind_names, "megatron_grit/planning/a.py", 'Problem("rollout.batch_size")'),
    (laws.kind_names, "megatron_grit/training/a.py", 'shown = ("loss", "loss_reward", "rewards/margins")'),
    (laws.kind_names, "megatron_grit/training/a.py", "from megatron_grit.data.kinds import rollout"),
    (laws.kind_names, "megatron_grit/training/a.py", "rollout_rows = []"),
    (laws.relative_imports, "megatron_grit/data/a.py", "from .batch import StepBatch"),
    (laws.init_only_reexports, "megatron_grit/data/__init__.py", "def f():\n    return 1"),
    (laws.sizes, "megatron_grit/data/a.py", "x = 1\n" * 501),
    (laws.sizes, "megatron_grit/data/a.py", LONG_FUNCTION),
    (laws.sizes, "tools/preprocess/a.py", "x = 1\n" * 81),
    (laws.sizes, "megatron_grit/cli/a.py", "x = 1\n" * 81),
    (laws.parameters, "megatron_grit/data/a.py", "def f(a, b, c, d, *, e, f, g, h):\n    pass"),
    (laws.parameters, "tools/a.py", "class A:\n    def f(self, a, b, c, d, e, f, *args, **kwargs):\n        pass"),
    (laws.single_readers, "megatron_grit/models/a.py", "import transformer_engine.pytorch as te"),
    (laws.single_readers, "megatron_grit/models/a.py", "from megatron.core import parallel_state"),
    (laws.single_readers, "megatron_grit/models/a.py", "from importlib import metadata"),
    (laws.single_readers, "megatron_grit/evaluation/a.py", "def f():\n    import faiss"),
    (laws.single_readers, "benchmarks/a.py", "from faiss import knn"),
    (laws.single_readers, "megatron_grit/compat.py", "def f():\n    from megatron.core.models.gpt import gpt_model"),
    (laws.single_readers, "megatron_grit/models/a.py", "from megatron.core.models import hybrid"),
    (laws.single_readers, "tools/a.py", "importlib.import_module('faiss.contrib.ondisk')"),
    (laws.unsafe_reading, "tests/a.py", "import pickle"),
    (laws.unsafe_reading, "tests/a.py", "torch.load(path)"),
    (laws.unsafe_reading, "tests/a.py", "torch.load(path, weights_only=False)"),
    (laws.unsafe_reading, "tests/a.py", "torch.save(state, path)"),
    (laws.unsafe_reading, "tests/a.py", "np.load(path, allow_pickle=True)"),
    (laws.unsafe_reading, "tests/a.py", "AutoModel.from_pretrained(path, trust_remote_code=True)"),
    (laws.unsafe_reading, "tests/a.py", "yaml.load(text)"),
    (laws.machine_text, "a.py", "path = '/" + "home/someone/data'"),
    (laws.machine_text, "a.md", "see https://py" + "pi.org/simple"),
    (laws.machine_text, "a.py", "# TO" + "DO: later"),
    (laws.entry_points, "megatron_grit/cli/a.py", "def main():\n    pass\nif __name__ == '__main__':\n    main()"),
    (laws.entry_points, "tools/a.py", "def main():\n    pass"),
    (laws.entry_points, "tools/a.py", "if __name__ == '__main__':\n    print()"),
    (
        laws.entry_points,
        "tools/a.py",
        "from megatron_grit.cli.a import run\nif __name__ == '__main__':\n    run()",
    ),
    (laws.flags_from_dataclasses, "megatron_grit/cli/a.py", "import argparse"),
    (laws.flags_from_dataclasses, "tools/a.py", "def f():\n    from jsonargparse import ArgumentParser"),
    (laws.flags_from_dataclasses, "examples/a.py", "parser.add_argument('--a')"),
    (laws.flags_from_dataclasses, "megatron_grit/training/a.py", "import sys\nflag = '--fast' in sys.argv"),
    (laws.shell_scripts, "examples/a.sh", "#!/usr/bin/env bash\necho\n"),
]
# Text beside the border that the law allows.
KEPT: list[tuple[Law, str, str]] = [
    (laws.import_arrows, "megatron_grit/models/a.py", "from megatron_grit.data.rows.batch import PackedRow"),
    (laws.import_arrows, "megatron_grit/config/a.py", "from megatron_grit.errors import ConfigError"),
    (laws.import_arrows, "megatron_grit/cli/main.py", "from megatron_grit import __version__"),
    (laws.kind_names, "megatron_grit/data/kinds/a.py", 'kind = "generative"'),
    (laws.kind_names, "megatron_grit/training/a.py", "causal = config.embedding.causal"),
    (
        laws.kind_names,
        "megatron_grit/inference/a.py",
        "best = max(each.reward for each in group.completions)",
    ),
    (laws.kind_names, "megatron_grit/inference/a.py", "from megatron_grit.data.rollouts.records import read_groups"),
    (laws.init_only_reexports, "megatron_grit/data/__init__.py", '"""Doc."""\nimport a\n__all__ = ["a"]'),
    (laws.sizes, "megatron_grit/data/a.py", LONG_FUNCTION.replace("f():", "f():  # long: one table")),
    (laws.parameters, "megatron_grit/data/a.py", "class A:\n    def f(self, a, b, c, d, *, e, f, g):\n        pass"),
    (laws.parameters, "megatron_grit/data/a.py", "# many: one table\ndef f(a, b, c, d, e, f, g, h):\n    pass"),
    (laws.single_readers, "megatron_grit/parallel/context.py", "from megatron.core import parallel_state"),
    (laws.single_readers, "megatron_grit/retrieval/index/faiss_index.py", "def f():\n    import faiss"),
    (laws.single_readers, "tests/unit/retrieval/index/test_faiss_index.py", "import faiss"),
    (laws.unsafe_reading, "tests/a.py", "torch.load(path, weights_only=True)"),
    (laws.unsafe_reading, laws.PICKLE_TESTS, "torch.save(state, path)"),
    (laws.machine_text, "a.sh", "cd /workspace && ls tmp/a"),
    (laws.entry_points, "tools/a.py", "from megatron_grit.cli.a import main\nif __name__ == '__main__':\n    main()"),
    (laws.flags_from_dataclasses, "benchmarks/a.py", "import argparse"),
    (laws.flags_from_dataclasses, "megatron_grit/config/parse.py", "argv = sys.argv[1:]"),
    (laws.shell_scripts, "examples/a.sh", "#!/usr/bin/env bash\nset -euo pipefail\n"),
]

A, B, C = (f"megatron_grit/data/{name}.py" for name in "abc")
# Files that break a law between files.
BROKEN_TOGETHER: list[tuple[LawOfAll, dict[str, str]]] = [
    (laws.unresolved_imports, {A: "def f():\n    from megatron_grit.data.b import x"}),
    (laws.unresolved_imports, {A: "from megatron_grit.data.b import x", B: "def y():\n    x = 1"}),
    (laws.unresolved_imports, {A: "import megatron_grit.data.b"}),
    (laws.circles, {A: "from megatron_grit.data.b import x", B: "def f():\n    from megatron_grit.data import a"}),
    (
        laws.circles,
        {
            A: "import megatron_grit.data.b",
            B: "import megatron_grit.data.c",
            C: f"if T:\n    import {A[:-3].replace('/', '.')}",
        },
    ),
    (
        laws.circles,
        {"megatron_grit/data/__init__.py": "from megatron_grit.data.a import x", A: "from megatron_grit.data import x"},
    ),
    (laws.crowded_folders, {f"tools/{number}.py": "" for number in range(16)}),
    (laws.class_names, {A: "class Segment: pass", B: "def f():\n    class Segment: pass"}),
    (laws.class_names, {A: "class Segment: pass", "megatron_grit/data/rows/a.py": "class _Segment: pass"}),
]
KEPT_TOGETHER: list[tuple[LawOfAll, dict[str, str]]] = [
    (laws.unresolved_imports, {A: "from megatron_grit.data.b import x, y", B: "x, y = 1, 2"}),
    (laws.unresolved_imports, {A: "from megatron_grit.data import b", B: ""}),
    (laws.circles, {A: "from megatron_grit.data import b, c", B: "import megatron_grit.data.c", C: "import b"}),
    (
        laws.crowded_folders,
        {f"megatron_grit/data/{number}.py": "" for number in range(15)} | {"megatron_grit/data/a.md": ""},
    ),
    (laws.class_names, {A: "class Segment: pass", "megatron_grit/retrieval/a.py": "class Segment: pass"}),
]


@pytest.fixture(scope="module")
def files(repository: Path) -> dict[str, str]:
    """Text of every tracked file that is text."""
    texts = {}
    for name in laws.tracked_files(repository):
        data = (repository / name).read_bytes()
        if b"\0" not in data:
            texts[name] = data.decode("utf-8")
    assert len(texts) > 20, "the list of files is not the repository's"
    return texts


@pytest.mark.parametrize("law", PYTHON_LAWS, ids=lambda law: law.__name__)
def test_python_files_keep_the_law(law: Law, files: dict[str, str]) -> None:
    bad = [line for name, text in files.items() if name.endswith(".py") for line in law(name, text)]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("law", LAWS_OF_ALL, ids=lambda law: law.__name__)
def test_the_files_together_keep_the_law(law: LawOfAll, files: dict[str, str]) -> None:
    bad = law(files)
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("law", [laws.machine_text, laws.shell_scripts], ids=lambda law: law.__name__)
def test_all_files_keep_the_law(law: Law, files: dict[str, str]) -> None:
    bad = [line for name, text in files.items() for line in law(name, text)]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(("law", "path", "text"), BROKEN)
def test_law_finds_a_violation(law: Law, path: str, text: str) -> None:
    assert law(path, text)


@pytest.mark.parametrize(("law", "path", "text"), KEPT)
def test_law_allows_what_is_allowed(law: Law, path: str, text: str) -> None:
    assert law(path, text) == []


@pytest.mark.parametrize(("law", "texts"), BROKEN_TOGETHER)
def test_law_of_all_finds_a_violation(law: LawOfAll, texts: dict[str, str]) -> None:
    assert law(texts)


@pytest.mark.parametrize(("law", "texts"), KEPT_TOGETHER)
def test_law_of_all_allows_what_is_allowed(law: LawOfAll, texts: dict[str, str]) -> None:
    assert law(texts) == []


def test_files_that_name_a_kind_do(files: dict[str, str]) -> None:
    for name in laws.NAMES_A_KIND:
        assert laws.kind_names("megatron_grit/training/a.py", files[f"megatron_grit/{name}"]), f"{name} names no kind"


def test_layers_are_those_of_the_package(repository: Path) -> None:
    folders = {path.parent.name for path in (repository / laws.PACKAGE).glob("*/__init__.py")}
    modules = {path.stem for path in (repository / laws.PACKAGE).glob("*.py")} - {"__init__"}
    assert folders | modules == set(laws.LAYERS) | set(laws.LEAVES)


def test_unit_tests_mirror_the_package(repository: Path) -> None:
    unit, package = repository / "tests" / "unit", repository / laws.PACKAGE
    folders = {path.parent.relative_to(unit) for path in unit.rglob("test_*.py")}
    strange = [str(folder) for folder in folders if not ((package / folder).is_dir() or folder.name in laws.LEAVES)]
    assert not strange and len(folders) > len(laws.LAYERS), f"no such folder in the package: {strange}"


def test_documents_lead_somewhere(repository: Path, files: dict[str, str], tmp_path: Path) -> None:
    documents = {name: text for name, text in files.items() if name.endswith(".md")}
    bad = [line for name, text in documents.items() for line in laws.markdown_links(name, text, repository)]
    assert not bad, "\n".join(bad)
    (tmp_path / "b.md").write_text("# One heading\n")
    assert laws.markdown_links("a.md", "[b](b.md#one-heading) [me](#top)\n# Top", tmp_path) == []
    for broken in ("[c](c.md)", "[b](b.md#two)", "[me](#nowhere)", "`bash examples/none.sh`"):
        assert laws.markdown_links("a.md", broken, tmp_path), broken


def test_shell_scripts_parse(repository: Path, files: dict[str, str]) -> None:
    scripts = [name for name, text in files.items() if name.endswith(".sh") or text.startswith("#!/usr/bin/env bash")]
    for script in scripts:
        parsed = subprocess.run(["bash", "-n", script], cwd=repository, capture_output=True, text=True)
        assert parsed.returncode == 0, parsed.stderr
    assert "tests/run.sh" in scripts


def test_configuration_needs_no_torch(repository: Path) -> None:
    code = (
        "import sys, megatron_grit.cli.main, megatron_grit.cli.train, megatron_grit.config.checks.run\n"
        "heavy = {'torch', 'megatron', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
