"""Documents of a folder: which files are read, and what text they hold."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megatron_grit.errors import DataError
from megatron_grit.retrieval.rag.documents import Document, find_files, html_text, read_documents

PAGE = """<!DOCTYPE html><html><head><title>The
 queue</title><style>p { color: red }</style><script>var shown = "no"; if (1 < 2) {}</script></head>
<body><h1>A &amp; B</h1><p>It <b>sor</b>ts&nbsp;every
byte.<p>Then it ends.<br>Really.<ul><li>one<li>two</ul><noscript>unseen</noscript><template>unseen</template>
<svg><title>unseen</title><text>unseen</text></svg><table><tr><td>a</td><td>b</td></tr></table>caf&eacute;
&#x2603;</body>"""


def test_a_folder_is_read_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "docs"
    (folder / "below" / ".git").mkdir(parents=True)
    (folder / "b.txt").write_text("\ufeffPlain text.\r\nTwo lines.\n", encoding="utf-8")
    (folder / "a.md").write_text("Intro\n\n## The parser ##\n\nIt opens files.\n")
    (folder / "below" / "c.HTML").write_text(PAGE)
    (folder / "empty.txt").write_text(" \n")
    (folder / "below" / ".git" / "d.txt").write_text("hidden")
    (folder / ".e.txt").write_text("hidden")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    lines = [{"text": "One.", "id": "x7", "title": "First"}, {"text": ""}, {"text": "Two.", "other": 1}]
    (folder / "z.jsonl.gz").write_bytes(gzip.compress("\n\n".join(map(json.dumps, lines)).encode()))
    with caplog.at_level("INFO", "megatron_grit"):
        files = find_files([folder, folder / "b.txt"])
    assert [name for _, name in files] == ["a.md", "b.txt", "empty.txt", "z.jsonl.gz", "below/c.HTML"]
    assert "1 files of other kinds are not read: .png (1)" in caplog.text
    found = list(read_documents(files))
    assert found[0].text.startswith("Intro\n\n## The parser ##\n\nIt opens files.")
    assert found[0][1:] == ("a.md", "The parser")
    assert found[1].text.strip() == "Plain text.\nTwo lines." and found[1][1:] == ("b.txt", "b")
    assert found[2:4] == [Document("One.", "z.jsonl.gz:x7", "First"), Document("Two.", "z.jsonl.gz:5", "")]
    assert found[4].source == "below/c.HTML" and found[4].title == "The queue" and len(found) == 5


def test_a_page_is_what_it_shows() -> None:
    text, title = html_text(PAGE)
    lines = ["A & B", "It sorts every byte.", "Then it ends.", "Really.", "one", "two", "a", "b", "café ☃"]
    assert (text.split("\n"), title) == (lines, "The queue")
    assert html_text("<p>no end <b>of anything") == ("no end of anything", "")
    assert html_text("<head><script>unseen</script><body>seen")[0] == "seen"
    assert html_text("</p></div>a</script>b")[0].split() in (["ab"], ["a", "b"])


def test_what_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(DataError, match="is of no kind that is read"):
        find_files([tmp_path / "a.pdf"])
    with pytest.raises(DataError, match="holds no .txt"):
        find_files([tmp_path])
    with pytest.raises(DataError, match="is not there"):
        find_files([tmp_path / "none"])
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_documents(find_files([tmp_path / "b.txt"])))
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(DataError, match='must be an object with a text under "text"') as caught:
        list(read_documents(find_files([tmp_path / "c.jsonl"])))
    assert "c.jsonl:2" in str(caught.value)
    assert [one.text for one in read_documents(find_files([tmp_path / "c.jsonl"])[:0], "body")] == []
