"""Lines of text in, an array on disk out."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_grit.errors import DataError
from megatron_grit.inference.model import GritModel
from megatron_grit.inference.text_files import encode_file, read_texts, save_embeddings


def test_read_texts(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes("one\r\n two \nthree \u2028 still three".encode())
    assert read_texts(str(path)) == ["one", " two ", "three \u2028 still three"]


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO("ä\nb\n".encode())))
    assert read_texts("-") == ["ä", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text"),
        (b"a\n \nb\n", "texts.txt:2: an empty line"),
        (b"ab\xff", "texts.txt:1: not UTF-8: byte 2"),
    ],
)
def test_unusable_input(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        read_texts(str(path))
    assert message in str(raised.value)


def test_missing_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing.txt: no such input file"):
        read_texts(str(tmp_path / "missing.txt"))


def test_output_is_whole_or_not_there(tmp_path: Path) -> None:
    class Broken:
        dtype, shape = np.dtype("float32"), (1,)

        def __array__(self, *args: object, **kwargs: object) -> np.ndarray:
            raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="No space left"):
        save_embeddings(Broken(), tmp_path / "out.npy")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    save_embeddings(np.eye(2, dtype=np.float32), tmp_path / "new folder" / "out.npy")
    assert np.load(tmp_path / "new folder" / "out.npy").tolist() == [[1, 0], [0, 1]]


def test_encode_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def encode(texts: list[str], **options: object) -> np.ndarray:
        calls.append((texts, options))
        return np.full((len(texts), 3), 0.5, dtype=np.float32)

    monkeypatch.setattr(GritModel, "load", lambda path, device: SimpleNamespace(encode=encode))
    (tmp_path / "in.txt").write_text("a\nb\n")
    options = {"instruction": "Find", "side": "query", "max_length": 9, "batch_tokens": 64}
    encode_file("run", str(tmp_path / "in.txt"), tmp_path / "out.npy", **options)
    assert calls == [(["a", "b"], options)]
    assert np.load(tmp_path / "out.npy", allow_pickle=False).shape == (2, 3)
