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

from megatron_grit.convert.weight_diff import make_diff, recover, verify
from megatron_grit.errors import CheckpointError, OutputError
from megatron_grit.store import folder as output_folder

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
WIDTHS = {
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
"""Bytes of an element."""


def write_raw(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file of any types, written by hand."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values()))


def read_raw(path: Path) -> tuple[dict[str, str], Tensors]:
    """Metadata and tensors of a safetensors file, read by hand; no gap, no overlap."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {})
    tensors, ends = {}, [0]
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        assert begin == ends[-1] and end - begin == WIDTHS[entry["dtype"]] * int(np.prod(entry["shape"], dtype=int))
        tensors[name] = entry["dtype"], tuple(entry["shape"]), data[start + begin : start + end]
        ends.append(end)
    assert start + ends[-1] == len(data)
    return metadata, tensors


def contents(path: Path) -> dict[str, Any]:
    """Relative name to bytes of every file, or to its metadata and tensors."""
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    return {
        name: read_raw(file) if file.suffix == ".safetensors" else file.read_bytes() for name, file in files.items()
    }


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
    for tensors in (base, tuned):  # a truth value has one bit
        for name, (dtype, shape, data) in tensors.items():
            if dtype == "BOOL":
                tensors[name] = (dtype, shape, bytes(byte & 1 for byte in data))
    # One pair that is related for sure; without any there is nothing to make a diff of.
    base["shared"], tuned["shared"] = (
        ("BF16", (2,), draw(st.binary(min_size=4, max_size=4))),
        ("BF16", (2,), b"\0\x80" * 2),
    )
    return base, tuned


@settings(max_examples=150, deadline=None)
@given(pairs(), st.integers(1, 3))
def test_recovery_is_bit_for_bit(pair: tuple[Tensors, Tensors], shards: int) -> None:
    base, tuned = pair
    with tempfile.TemporaryDirectory() as name:
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
    stored_type, _, stored = read_raw(tmp_path / "diff" / "model.safetensors")[1]["w"]
    integer = np.dtype(f"<u{dtype.itemsize}")
    got = np.frombuffer(stored, integer).tolist()
    bits = [np.frombuffer(bytes(t.view(torch.uint8).numpy()), integer).tolist() for t in (base, tuned)]
    assert got == [(b - a) % 2 ** (8 * dtype.itemsize) for a, b in zip(*bits, strict=True)]
    assert stored_type == f"U{8 * dtype.itemsize}"


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
    names = contents(folders / "diff").keys() - {"manifest.json"}
    digests = {name: hashlib.sha256((folders / "diff" / name).read_bytes()).hexdigest() for name in names}
    assert digests == manifest["files"]
    embed = contents(folders / "tuned")["model-0.safetensors"][1]["embed"]
    described = {"dtype": "F32", "shape": [13, 6], "sha256": hashlib.sha256(embed[2]).hexdigest()}
    assert manifest["tuned"]["tensors"]["embed"] == described | {"file": "model-0.safetensors"}
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
        lambda f: _edit_manifest(f, lambda m: m["tuned"]["tensors"]["embed"].update(sha256="0")),
        "manifest.json: tensor embed comes out other",
    ),
    "manifest's tensors": (
        lambda f: _edit_manifest(f, lambda m: m["tuned"]["tensors"].pop("head.weight")),
        "manifest.json: names other tensors than the files hold",
    ),
    "manifest's type": (
        lambda f: _edit_manifest(f, lambda m: m["tuned"]["tensors"]["embed"].update(dtype="F31")),
        "manifest.json: not a manifest of format weight_diff_2",
    ),
    "earlier format": (
        lambda f: _edit_manifest(f, lambda m: m.update(format="weight_diff_1")),
        "manifest.json: not a manifest of format weight_diff_2",
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
    with pytest.raises(CheckpointError, match=r"file extra\.txt is in .*tuned only"):
        verify(folders / "base", folders / "diff", folders / "tuned")
    (folders / "tuned" / "extra.txt").unlink()
    _flip(folders / "tuned" / "model-0.safetensors", -1)
    with pytest.raises(CheckpointError, match=r"tuned: tensor layer.* is not that of the diff's tuned model"):
        verify(folders / "base", folders / "diff", folders / "tuned")
    _flip(folders / "tuned" / "model-0.safetensors", -1)
    (folders / "tuned" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"file config\.json is not that of the diff's tuned model"):
        verify(folders / "base", folders / "diff", folders / "tuned")


def test_unusable_inputs(folders: Path) -> None:
    (folders / "there").mkdir()
    (folders / "there" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="there: already exists and is not empty"):
        make_diff(folders / "base", folders / "tuned", folders / "there")
    with pytest.raises(CheckpointError, match="lies within"):
        make_diff(folders / "base", folders / "tuned", folders / "tuned" / "diff")
    (folders / "tuned" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: pickled"):
        make_diff(folders / "base", folders / "tuned", folders / "diff")
    (folders / "tuned" / "pytorch_model.bin").unlink()
    (folders / "tuned" / "model.safetensors").write_bytes((folders / "base" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"model-0\.safetensors: is none of the model's weight files"):
        make_diff(folders / "base", folders / "tuned", folders / "diff")
    (folders / "tuned" / "model.safetensors").unlink()
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
    real = output_folder.replacing

    def counted(path: Path, mode: str) -> Any:
        written.append(path.name)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        return real(path, mode)

    monkeypatch.setattr(output_folder, "replacing", counted)
    with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\); the same command resumes"):
        call()
    assert not (folders / "target").exists()
    _flip(folders / ".target.partial" / "files" / written[0], -1)
    first, last = written[0], written[3]
    written.clear()
    monkeypatch.setattr(output_folder, "replacing", lambda path, mode: (written.append(path.name), real(path, mode))[1])
    call()
    assert contents(folders / "target") == expected
    assert not [path.name for path in folders.glob(".*")]
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
