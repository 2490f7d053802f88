"""Models named on the Hugging Face hub: which names are, what is asked for, and what is told where that fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.errors import CheckpointError
from megatron_grit.store.hub import _MODULE_FILES, local_folder


def test_model_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the files that are needed are asked for, at the revision."""
    hub = pytest.importorskip("huggingface_hub")
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert local_folder("org/name", "v2") == local_folder("org/name@v2") == tmp_path
    assert local_folder("org/name", weights=False) == tmp_path
    small = {"config.json", "generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
    small |= {"special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"}
    small |= {"vocab.json", "merges.txt"}
    assert [name for name, _ in asked] == ["org/name"] * 3
    assert [options["revision"] for _, options in asked] == ["v2", "v2", None]
    patterns = [set(options["allow_patterns"]) for _, options in asked]
    small |= set(_MODULE_FILES)
    assert patterns[0] == small | {"*.safetensors", "*.safetensors.index.json"}
    assert patterns[2] == small
    assert all(set(options["ignore_patterns"]) == {"[!0-9]*/*", "consolidated*"} for _, options in asked)


def test_paths_are_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    Path("org/file").touch()
    for path in ("org/name", "org/file", "./org/other", str(tmp_path / "no" / "thing"), "a/b/c", "name"):
        assert local_folder(path) == Path(path)
    for name, revision in (("org/name", "v2"), ("org/name@v2", None)):
        with pytest.raises(CheckpointError, match="org/name: is a directory, which has no revision v2"):
            local_folder(name, revision)
    assert local_folder("folder/tokenizer.json") == Path("folder/tokenizer.json")
    with pytest.raises(CheckpointError, match="org/other@v1: revision v2 is asked for as well"):
        local_folder("org/other@v1", "v2")


def fill_cache(cache: Path, commit: str, files: Path) -> None:
    """A model in a cache as the hub's client lays it out."""
    folder = cache / "models--org--name"
    (folder / "snapshots").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    files.rename(folder / "snapshots" / commit)


OFFLINE = """
import sys
from megatron_grit.errors import CheckpointError
from megatron_grit.store.hub import local_folder
for name in sys.argv[1:]:
    name, _, revision = name.partition("@")
    try:
        folder = local_folder(name, revision or None)
        print(folder.name, sorted(path.name for path in folder.iterdir()))
    except CheckpointError as error:
        print(error)
"""


def test_cache_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    commit = "a" * 40
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).touch()
    fill_cache(tmp_path / "cache", commit, source)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    names = ["org/name", f"org/name@{commit}", "org/name@other", "org/absent"]
    result = subprocess.run(
        [sys.executable, "-c", OFFLINE, *names],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = result.stdout.splitlines()
    assert lines[0] == lines[1] and lines[0] == f"{commit} ['config.json', 'model.safetensors']"
    reason = "the hub cannot be reached and the model is not in the cache"
    assert f"hub at revision other: {reason}" in lines[2] and "org/name: is no directory here" in lines[2]
    assert reason in lines[3] and "org/absent: is no directory here" in lines[3]


def test_hub_without_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="org/name: is no directory here.*pip install huggingface_hub"):
        local_folder("org/name")


def test_what_the_hub_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def download(*_: Any, **__: Any) -> str:
        raise OSError("401: gated\nask for access")

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match="hub: 401: gated ask for access"):
        local_folder("org/name")
