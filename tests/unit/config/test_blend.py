"""What a blend may say, and where a wrong one is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_grit.config.blend import BlendEntry, read_blend
from megatron_grit.errors import ConfigError


def entry(path: str, weight: float | None = None, epochs: float | None = None, cap: int | None = None) -> BlendEntry:
    return BlendEntry(path=path, weight=weight, epochs=epochs, cap=cap)


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([], []),
        (["a", "b"], [entry("a"), entry("b")]),
        (["a b"], [entry("a b")]),
        (["0.3 a 0.7 b"], [entry("a", 0.3), entry("b", 0.7)]),
        (["3", "a", "7e-1", "b c"], [entry("a", 3), entry("b c", 0.7)]),
        (["1 a", "2 b"], [entry("a", 1), entry("b", 2)]),
    ],
)
def test_lists(items: list[str], expected: list[BlendEntry]) -> None:
    assert read_blend(items, "data.generative") == expected


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "blend.yaml"
    path.write_text("- path: x\n  epochs: 2\n  cap: 100\n# more\n- {path: y y}\n- z\n")
    expected = [entry("x", epochs=2, cap=100), entry("y y"), entry("z")]
    assert read_blend([str(path)], "data.embedding") == expected
    assert read_blend(["w", str(path)], "data.embedding") == [entry("w"), *expected]
    path.write_text("- path: x\n  weight: 0.25\n- path: y\n  weight: 3\n")
    assert read_blend([str(path)], "data.embedding") == [entry("x", 0.25), entry("y", 3)]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["0.3 a 0.7"], "data.embedding: no prefix follows the weight 0.7"),
        (["0.3 0.7 b"], "data.embedding: 0.7 follows 0.3; a prefix has to"),
        (["2024", "2024"], "data.embedding: 2024 follows 2024; a prefix has to"),
        (["-1 a"], "data.embedding: weight -1 is not a positive number"),
        (["0 a"], "data.embedding: weight 0 is not a positive number"),
        (["nan a"], "data.embedding: weight nan is not a positive number"),
        (["0.3 a", "b"], "data.embedding: b has no weight, but a has a weight"),
        (
            ["a", "b", "a"],
            "data.embedding names a more than once; leave one, with epochs: 2 where a run is to go through it twice",
        ),
        (["nowhere.yaml"], "nowhere.yaml: cannot read this blend file"),
        (["0.5 nowhere.yaml"], "0.5 stands before the blend file nowhere.yaml"),
    ],
)
def test_wrong_lists(items: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_blend(items, "data.embedding")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "expected a list of '- path: PREFIX'"),
        ("path: a\n", 1, "expected a list"),
        ("- path: a\n- epochs: 2\n", 2, "a source without path"),
        ("- path: a\n  epoch: 2\n", 2, "unknown key epoch; a source has path, weight, epochs, cap"),
        ("- path: a\n  epochs: 2\n  weight: 1\n", 1, "a has both weight and epochs"),
        ("- path: a\n  epochs: 0\n", 2, "epochs 0 is not a positive number"),
        ("- path: a\n  weight: high\n", 2, "weight 'high' is not a positive number"),
        ("- path: a\n  weight: true\n", 2, "weight True is not a positive number"),
        ("- path: a\n  cap: 1.5\n", 2, "cap 1.5 is not a positive whole number"),
        ("- path: 3\n", 1, "path is not a prefix: 3"),
        ("- path: a\n  path: b\n", 2, "path is given twice"),
        ("- path: a\n  weight: 1\n- path: b\n  epochs: 1\n", 3, "b has epochs, but a has a weight"),
        ("- a\n- [b]\n", 2, "expected a prefix, or a mapping"),
        ("- path: a\n- path: a\n", 2, "names a more than once"),
        ("- path: [a\n", 2, "not valid YAML"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = tmp_path / "blend.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_blend([str(path)], "data.embedding")
    assert str(error.value).startswith(f"{path}:{line}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "blend.yaml"
    path.write_bytes(b"- path: \xff\n")
    with pytest.raises(ConfigError, match="byte 8 is not UTF-8"):
        read_blend([str(path)], "data.embedding")
