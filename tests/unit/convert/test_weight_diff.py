"""Weight diffs: any bit pattern of any type comes back, nothing but the right base does, and a killed run goes on."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_grit.convert import weight_diff
from megatron_grit.convert.raw_safetensors import WIDTHS, read_header
from megatron_grit.convert.weight_diff import make_diff, recover, verify
from megatron_grit.errors import CheckpointError

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def write_raw(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file of any types, written by hand."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values()))


def contents(path: Path) -> dict[str, bytes]:
    """Relative name to bytes of every file."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensors, Tensors]:
    """Base and tuned tensors: same, changed, of other rows, of another type, or on one side only. Bits are any."""
    base: Tensors = {}
    tuned: Tensors = {}
    for index in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(sorted(WIDTHS)))
        rows, columns = draw(st.integers(0, 4)), draw(st.integers(0, 3))
        width = WIDTHS[dtype] * columns

        def some(rows: int, width: int = width) -> bytes:
            return draw(st.binary(min_size=rows * width, max_size=rows * width))

        name = f"t{index}"
        kind = draw(st.sampled_from(["changed", "rows", "type", "new", "gone"]))
        if kind != "new":
            base[name] = (dtype, (rows, columns), some(rows))
        if kind == "rows":
            rows = draw(st.integers(0, 6))
        if kind == "type":
            dtype = draw(st.sampled_from([other for other in sorted(WIDTHS) if WIDTHS[other] == WIDTHS[dtype]]))
        if kind != "gone":
            tuned[name] = (dtype, (rows, columns), some(rows))
    # One pair that is related for sure; without any there is nothing to make a diff of.
    base["shared"], tuned["shared"] = (
        ("BF16", (2,), draw(st.binary(min_size=4, max_size=4))),
        ("BF16", (2,), b"\0\x80" * 2),
    )
    return base, tuned


@settings(max_examples=150, deadline=None)
@given(pairs(), st.integers(1, 3), st.sampled_from([8, 16, 1 << 24]))
def test_recovery_is_bit_for_bit(pair: tuple[Tensors, Tensors], shards: int, block: int) -> None:
    base, tuned = pair
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_diff, "BLOCK_BYTES", block)
        root = Path(name)
        (root / "base").mkdir()
        (root / "tuned").mkdir()
        write_raw(root / "base" / "model.safetensors", base)
        names = list(tuned)
        for shard in range(shards):
            part = {name: tuned[name] for name in names[shard::shards]}
            write_raw(root / "tuned" / f"model-{shard}.safetensors", part, {"format": "pt"})
        make_diff(root / "base", root / "tuned", root / "diff")
        recover(root / "base", root / "diff", root / "back")
        assert contents(root / "back") == contents(root / "tuned")
        verify(root / "base", root / "diff", root / "tuned")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8], ids=str)
def test_differences_are_integers_modulo_2_to_the_n(dtype: torch.dtype, tmp_path: Path) -> None:
    """Against arithmetic in Python's integers, with NaN, infinities and -0."""
    values = [0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), -float("inf"), 3.25]
    if dtype is torch.int8:
        values = [0, 1, -1, 127, -128, 5, 6, 7]
    base, tuned = torch.tensor(values, dtype=dtype), torch.tensor(values[::-1], dtype=dtype)
    for name, tensor in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file({"w": tensor}, tmp_path / name / "model.safetensors")
    make_diff(tmp_path / "base", tmp_path / "tuned", tmp_path / "diff")
    _, _, (stored,) = read_header(tmp_path / "diff" / "model.safetensors")
    integer = np.dtype(f"<u{dtype.itemsize}")
    got = np.frombuffer(b"".join(stored.blocks(64)), integer).tolist()
    bits = [np.frombuffer(bytes(t.view(torch.uint8).numpy()), integer).tolist() for t in (base, tuned)]
    assert got == [(b - a) % 2 ** (8 * dtype.itemsize) for a, b in zip(*bits, strict=True)]
    assert stored.dtype == f"U{8 * dtype.itemsize}"


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """base/ in one file, tuned/ in two with a vocabulary that grew, a tokenizer and a folder of its own."""
    torch.manual_seed(0)
    base = {f"layer.{i}.weight": torch.randn(8, 6).bfloat16() for i in range(4)} | {"embed": torch.randn(10, 6)}
    tuned = {name: tensor + 0.01 for name, tensor in base.items()}
    tuned["embed"] = torch.cat([tuned["embed"], torch.randn(3, 6)])
    tuned["head.weight"] = torch.randn(2, 6)
    for name in ("base", "tuned", "tuned/1_Pooling"):
        (tmp_path / name).mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    names = sorted(tuned)
    for shard, part in enumerate((names[:3], names[3:])):
        save_file({name: tuned[name] for name in part}, tmp_path / "tuned" / f"model-{shard}.safetensors")
    for name in ("config.json", "tokenizer.json", "1_Pooling/config.json"):
        (tmp_path / "tuned" / name).write_text(json.dumps({"name": name}))
    return tmp_path


def test_a_directory_round_trips_and_its_manifest_says_what_it_is(folders: Path) -> None:
    make_diff(folders / "base", folders / "tuned", folders / "diff")
    assert recover(folders / "base", folders / "diff", folders / "back") == folders / "back"
    assert contents(folders / "back") == contents(folders / "tuned")
    manifest = json.loads((folders / "diff" / "manifest.json").read_text())
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents(folders / "diff").items()}
    assert {name: sha for name, sha in digests.items() if name != "manifest.json"} == manifest["files"]
    assert manifest["tensors"]["embed"] == {"dtype": "F32", "shape": [13, 6], "file": "model-0.safetensors"}
    assert manifest["base"]["tensors"]["embed"]["shape"] == [10, 6]
    assert manifest["base"]["tokenizer_sha256"] is None
    name = hashlib.sha256((folders / "tuned" / "tokenizer.json").read_bytes()).hexdigest()
    assert manifest["tuned"]["tokenizer_sha256"] == hashlib.sha256(f"tokenizer.json {name}\n".encode()).hexdigest()
    assert not list(folders.glob(".*"))


def test_a_base_in_other_files_is_the_same_base(folders: Path) -> None:
    from safetensors.torch import load_file

    make_diff(folders / "base", folders / "tuned", folders / "diff")
    tensors = load_file(folders / "base" / "model.safetensors")
    (folders / "again").mkdir()
    save_file({"embed": tensors.pop("embed")}, folders / "again" / "a.safetensors")
    save_file(tensors, folders / "again" / "b.safetensors")
    recover(folders / "again", folders / "diff", folders / "back")
    assert contents(folders / "back") == contents(folders / "tuned")


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def _lose_embed(folders: Path) -> None:
    from safetensors.torch import load_file

    file = folders / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("embed")
    file.unlink()
    save_file(tensors, file)


def _edit_manifest(folders: Path, change: Any) -> None:
    file = folders / "diff" / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


DAMAGE: dict[str, tuple[Any, str]] = {
    "other base": (lambda f: _flip(f / "base" / "model.safetensors", -1), r"base.*tensor layer\.3\.weight has other"),
    "tensor gone": (_lose_embed, "tensor embed is missing; the diff is of another base"),
    "diff bit": (lambda f: _flip(f / "diff" / "model-1.safetensors", -1), r"diff/model-1\.safetensors: damaged"),
    "other file": (lambda f: (f / "diff" / "tokenizer.json").write_text("{}"), r"diff/tokenizer\.json: damaged"),
    "file gone": (lambda f: (f / "diff" / "config.json").unlink(), r"diff/config\.json: missing"),
    "base cut": (
        lambda f: (f / "base" / "model.safetensors").write_bytes((f / "base" / "model.safetensors").read_bytes()[:-5]),
        "base/model.safetensors: not a whole safetensors file",
    ),
    "no manifest": (lambda f: (f / "diff" / "manifest.json").unlink(), "no manifest.json"),
    "manifest text": (lambda f: (f / "diff" / "manifest.json").write_text("[]"), "not the manifest of a weight diff"),
    "way out": (
        lambda f: _edit_manifest(
            f, lambda m: [part.update({"../x": "0"}) for part in (m["files"], m["tuned"]["files"])]
        ),
        "outside the diff",
    ),
    "manifest's tuned": (
        lambda f: _edit_manifest(f, lambda m: m["tuned"]["files"].update({"model-0.safetensors": "0"})),
        r"model-0\.safetensors comes out other",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_told_and_nothing_is_written(what: str, folders: Path) -> None:
    make_diff(folders / "base", folders / "tuned", folders / "diff")
    damage, message = DAMAGE[what]
    damage(folders)
    with pytest.raises(CheckpointError, match=message):
        recover(folders / "base", folders / "diff", folders / "back")
    assert not (folders / "back").exists()
    with pytest.raises(CheckpointError, match=message):
        verify(folders / "base", folders / "diff")


def test_verify_compares_the_tuned_directory(folders: Path) -> None:
    make_diff(folders / "base", folders / "tuned", folders / "diff")
    verify(folders / "base", folders / "diff", folders / "tuned")
    (folders / "tuned" / "extra.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"extra\.txt: is in .*tuned only"):
        verify(folders / "base", folders / "diff", folders / "tuned")
    (folders / "tuned" / "extra.txt").unlink()
    _flip(folders / "tuned" / "model-0.safetensors", -1)
    with pytest.raises(CheckpointError, match=r"model-0\.safetensors: is not the file"):
        verify(folders / "base", folders / "diff", folders / "tuned")


def test_unusable_inputs(folders: Path) -> None:
    (folders / "there").mkdir()
    with pytest.raises(CheckpointError, match="is there already"):
        make_diff(folders / "base", folders / "tuned", folders / "there")
    with pytest.raises(CheckpointError, match="lies within"):
        make_diff(folders / "base", folders / "tuned", folders / "tuned" / "diff")
    (folders / "tuned" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: pickled"):
        make_diff(folders / "base", folders / "tuned", folders / "diff")
    (folders / "tuned" / "pytorch_model.bin").unlink()
    (folders / "other").mkdir()
    save_file({"x": torch.zeros(3)}, folders / "other" / "model.safetensors")
    with pytest.raises(CheckpointError, match="is that its base"):
        make_diff(folders / "other", folders / "tuned", folders / "diff")


@pytest.mark.parametrize("verb", ["make", "recover"])
def test_a_stopped_run_keeps_whole_files_and_no_others(
    verb: str, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_diff(folders / "base", folders / "tuned", folders / "diff")
    expected = contents(folders / ("diff" if verb == "make" else "tuned"))

    def call() -> None:
        if verb == "make":
            make_diff(folders / "base", folders / "tuned", folders / "target")
        else:
            recover(folders / "base", folders / "diff", folders / "target")

    written: list[str] = []
    real = weight_diff.replacing

    def counted(path: Path, mode: str) -> Any:
        written.append(path.name)
        if len(written) == 4:
            raise OSError("no space left on device")
        return real(path, mode)

    monkeypatch.setattr(weight_diff, "replacing", counted)
    with pytest.raises(OSError):
        call()
    assert not (folders / "target").exists()
    _flip(folders / ".target.partial" / written[0], 0)
    first, last = written[0], written[3]
    written.clear()
    monkeypatch.setattr(weight_diff, "replacing", lambda path, mode: (written.append(path.name), real(path, mode))[1])
    call()
    assert contents(folders / "target") == expected
    # Written again: the one that was damaged meanwhile and those that were not done. The other two are kept.
    assert len(written) == len([name for name in expected if name != "manifest.json"]) - 2
    assert {first, last} <= set(written)


@pytest.mark.slow
def test_the_tool(folders: Path) -> None:
    """From the command line, with the message of a wrong base."""
    tool = [sys.executable, str(Path(__file__).parents[3] / "tools" / "weight_diff.py")]
    paths = {name: str(folders / name) for name in ("base", "tuned", "diff", "back")}
    make = ["make", "--base", paths["base"], "--tuned", paths["tuned"], "--diff", paths["diff"]]
    back = ["recover", "--base", paths["base"], "--tuned", paths["back"], "--diff", paths["diff"]]
    check = ["verify", "--base", paths["base"], "--diff", paths["diff"], "--tuned", paths["tuned"]]
    for verb in (make, back, check):
        subprocess.run([*tool, *verb], check=True, capture_output=True, timeout=100)
    assert contents(folders / "back") == contents(folders / "tuned")
    _flip(folders / "base" / "model.safetensors", -1)
    result = subprocess.run([*tool, *check], capture_output=True, text=True, timeout=100)
    assert result.returncode == 2 and "has other values than the diff's base" in result.stderr
    assert "Traceback" not in result.stderr
