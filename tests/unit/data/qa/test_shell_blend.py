"""Blend files of the old shell format are read, not run."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_grit.data.qa.shell_blend import read_shell_blend
from megatron_grit.errors import ConfigError


@pytest.mark.parametrize(
    "text",
    [
        '#!/bin/bash\n# a comment\nDATA_BLEND="0.7 a-1 0.3 b"\n',
        "export DATA_BLEND='0.7 a-1\n    0.3 b'; OTHER=1\n",
        'DATA_BLEND="1 old"\nDATA_BLEND="0.7 a-1 \\\n0.3 b"',
    ],
)
def test_blends(text: str, tmp_path: Path) -> None:
    (tmp_path / "b.sh").write_text(text)
    assert read_shell_blend(tmp_path / "b.sh") == [(0.7, "a-1"), (0.3, "b")]


def test_one_data_set_and_the_published_blend(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "b.sh").write_text('DATA_BLEND="1.0 squad1.1"')
    assert read_shell_blend(tmp_path / "b.sh") == [(1.0, "squad1.1")]
    published = read_shell_blend(repository / "tools" / "retro" / "sft" / "open_inst.sh")
    assert len(published) == 9 and dict((name, weight) for weight, name in published)["oasst-noncode"] == 0.817
    assert sum(weight for weight, _ in published) == pytest.approx(1)


@pytest.mark.parametrize(
    "text, message",
    [
        ('DATA_BLEND="a 0.3 b"', "b.sh: entry 1 of DATA_BLEND: a is not a weight"),
        ('DATA_BLEND="0.7 a 0.3"', "b.sh: entry 2 of DATA_BLEND: no name follows the weight 0.3"),
        ('DATA_BLEND="0.7 a -1 b"', "b.sh: entry 2 of DATA_BLEND: the weight -1 is not a positive number"),
        ('DATA_BLEND="0.7 a nan b"', "b.sh: entry 2 of DATA_BLEND: the weight nan is not a positive number"),
        ('DATA_BLEND="1 a 1 a"', "b.sh: entry 2 of DATA_BLEND: a is there twice"),
        ('DATA_BLEND="1 ../a"', "b.sh: entry 1 of DATA_BLEND: ../a is no name of a data set"),
        ('DATA_BLEND="1 $NAME"', "b.sh: DATA_BLEND holds $, which is not expanded"),
        ('DATA_BLEND="1 `touch x`"', "b.sh: DATA_BLEND holds `, which is not expanded"),
        ('DATA_BLEND=" "', "b.sh: DATA_BLEND is empty"),
        ("OTHER=1", "b.sh: sets no DATA_BLEND"),
        ('touch x\nDATA_BLEND="1 a"', "b.sh:1: touch is no assignment; a blend file is read, not run"),
        ('DATA_BLEND="1 a', "b.sh: no closing quotation; close the quotes"),
    ],
)
def test_mistakes(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.sh").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_shell_blend("b.sh")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists(), "the file was run"
