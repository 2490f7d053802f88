"""preprocess_data.py and merge_indexed.py as a user runs them, and as a scheduler kills them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_grit.data.indexed.reader import IndexedFile
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.text.tokenizer import train_sentencepiece
from tests.unit.data.samples import sentence

ROOT = Path(__file__).resolve().parents[2]
TOOL, MERGE = "tools/preprocess/preprocess_data.py", "tools/preprocess/merge_indexed.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.model, small.jsonl and large.jsonl, which takes some seconds to tokenise."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [sentence(number, 40) for number in range(300)]
    train_sentencepiece(texts, folder / "tokenizer", 500)
    for name, repeats in (("small", 1), ("large", 60)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for number in range(300 * repeats):
                file.write(json.dumps({"text": f"{number} {texts[number % 300]}"}) + "\n")
    return folder


def command(corpus: Path, prefix: Path, *arguments: str, name: str = "large") -> list[str]:
    given = ["--input", f"{corpus / name}.jsonl", "--output-prefix", str(prefix), "--append-eod"]
    return [sys.executable, TOOL, *given, "--tokenizer-model", str(corpus), *arguments]


def run(arguments: list[str], status: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == status, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def output(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}_text_document.{extension}").read_bytes() for extension in ("bin", "idx", "json")]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        assert process is None or process.poll() is None, "the build ended before it could be stopped"
        time.sleep(0.005)


def test_a_small_corpus(corpus, tmp_path):
    result = run(command(corpus, tmp_path / "out", name="small"))
    assert result.stdout.startswith("300 lines, 300 documents read\n  text: 300 documents, ")
    IndexedRecords(tmp_path / "out_text_document").verify()
    assert IndexedFile(tmp_path / "out_text_document").num_documents == 300
    refused = run(command(corpus, tmp_path / "out", name="small"), status=2)
    assert refused.stderr.endswith("exists already; choose another prefix or overwrite it (--overwrite)\n")
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_build_that_is_stopped_goes_on_where_it_was(corpus, tmp_path, how):
    run(command(corpus, tmp_path / "whole", "--no-checksum"))
    arguments = command(corpus, tmp_path / "out", "--no-checksum", "--workers", "2", "--partitions", "4")
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    work = tmp_path / ".out_document.build"
    first = work / "piece-00000-of-00004" / "journal.json"
    wait_for(lambda: first.exists() and json.loads(first.read_bytes())["stage"] == "finished", process)
    wait_for(lambda: (work / "piece-00001-of-00004").exists(), process)
    wait_for(lambda: len(workers_of(process.pid)) == 2, process)
    os.killpg(process.pid, signal.SIGSTOP)  # it is not to end while something else is looked at
    second = run(arguments, status=2)
    assert "another process is writing it (process " in second.stderr
    workers = workers_of(process.pid)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as Ctrl-C in a terminal: every process gets it
    else:
        process.kill()
    os.killpg(process.pid, signal.SIGCONT)
    _, errors = process.communicate(timeout=600)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert errors.splitlines()[-1] == "preprocess_data: interrupted; the same command resumes"
        assert "Traceback" not in errors
    wait_for(lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers))
    assert not (tmp_path / "out_text_document.idx").exists()
    log = run(arguments).stderr
    assert f"{first.parent} is finished: not built again" in log
    assert "starting afresh" not in log
    assert output(tmp_path / "out") == output(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def workers_of(pid: int) -> list[psutil.Process]:
    """Worker processes of a build; not the resource tracker of multiprocessing."""
    try:
        children = psutil.Process(pid).children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    except psutil.NoSuchProcess:
        return []


def test_partitions_of_several_nodes_are_joined(corpus, tmp_path):
    run(command(corpus, tmp_path / "whole", name="small"))
    for index in ("1", "0"):
        arguments = command(corpus, tmp_path / "out", "--partitions", "2", "--partition", index, name="small")
        assert "documents in this partition" in run(arguments).stdout
    run(command(corpus, tmp_path / "out", "--partitions", "2", name="small"))
    assert output(tmp_path / "out") == output(tmp_path / "whole")


def test_files_are_merged(corpus, tmp_path):
    lines = (corpus / "small.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("a", lines[:100]), ("b", lines[100:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
        arguments = ["--input", str(tmp_path / f"{name}.jsonl"), "--output-prefix", str(tmp_path / name)]
        run([sys.executable, TOOL, *arguments, "--tokenizer-model", str(corpus), "--append-eod"])
    run(command(corpus, tmp_path / "whole", name="small"))
    parts = [str(tmp_path / f"{name}_text_document") for name in "ab"]
    result = run([sys.executable, MERGE, "--input", *parts, "--output-prefix", str(tmp_path / "out_text_document")])
    assert "300 documents, 300 sequences" in result.stdout
    assert output(tmp_path / "out") == output(tmp_path / "whole")
    refused = run([sys.executable, MERGE, "--input", *parts, "--output-prefix", parts[0]], status=2)
    assert "would take the place of" in refused.stderr
