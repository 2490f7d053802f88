"""Kill -9 during the build of a retrieval database, many times: is the finished database always the same, bit for bit?

A database is built of made-up documents, or of given ones, with a tiny random encoder, and killed: at a random time, or
just before the n-th file takes its final name. The same command then resumes in the same directory, and may be killed
again. When it is done, every file is compared with those of a build that nothing interrupted. Builds by one process and
by two are compared with each other, and take turns in being killed.

Builds are forked from this process, which has imported everything and done nothing else.

Example:
    python -m benchmarks.retro_kill_campaign --kills 50
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.harness import free_port
from megatron_grit.data.indexed.roles import Role, RowKind
from megatron_grit.data.indexed.writer import IndexedWriter
from megatron_grit.data.text.tokenizer import load_tokenizer, train_sentencepiece
from megatron_grit.store.files import write_json
from megatron_grit.store.logs import configure_logging

_SYLLABLES = "ka to mi re su no la vi pe du".split()
POINTS = 70
"""Renames that are died at: about as many as a build makes."""
MAX_SECONDS = 300.0


def write_inputs(folder: Path, num_documents: int = 120, fewest_words: int = 0) -> dict[str, Any]:
    """Documents, their tokenizer and a tiny random encoder. Returns the settings of a build of them."""
    draw = random.Random(1)
    words = ["".join(draw.choices(_SYLLABLES, k=draw.randint(1, 3))) for _ in range(300)]
    texts = [" ".join(draw.choices(words, k=draw.randint(fewest_words, 120))) for _ in range(num_documents)]
    texts += texts[:5]
    train_sentencepiece([*filter(None, texts)], folder / "tokenizer", 400)
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    prefixes = []
    for name, part in (("first", texts[::2]), ("second", texts[1::2])):
        prefixes.append(str(folder / name))
        with IndexedWriter(folder / name, RowKind.GENERATIVE, tokenizer.vocab_size) as writer:
            for text in part:
                writer.add([(Role.TEXT, [*tokenizer.encode(text), tokenizer.eos_id])])
            writer.finalize(tokenizer_fingerprint=tokenizer.fingerprint, template="none", limits={})
    write_encoder(folder / "encoder", words)
    return {
        "data_paths": prefixes,
        "tokenizer": str(folder / "tokenizer.model"),
        "embedder": str(folder / "encoder"),
        "chunk_length": 16,
        "duplicates": "near",
        "minhash_permutations": 32,
        "doc_block_size": 20,
        "block_size": 128,
        "index": "IVF8,PQ4x4",
        "num_shards": 2,
        "valid_fraction": 0.1,
        "num_neighbors_query": 20,
        "num_neighbors_save": 4,
    }


def write_encoder(folder: Path, words: Sequence[str], hidden_size: int = 16) -> None:
    """A BERT of two layers with random weights, and its tokenizer of whole words."""
    import torch
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys([*words, *_SYLLABLES])]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    write_tokenizer(folder, vocabulary)


def write_tokenizer(folder: Path, vocabulary: list[str]) -> None:
    """A WordPiece tokenizer as transformers reads it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(WordPiece(numbers, unk_token="[UNK]"))  # type: ignore[call-arg]
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    special = [(name, numbers[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    fast.save_pretrained(folder)


def digests(project: Path) -> dict[str, str]:
    """SHA-256 of every file of a database."""
    paths = sorted(path for path in project.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(project).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


class Campaign:
    """Builds in one directory, killed and compared with one that was not.

    Args:
        folder: for the databases.
        settings: of the build.
        draw: random numbers.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], draw: random.Random) -> None:
        self.folder, self.settings, self.draw = folder, settings, draw
        self.project, self.log = folder / "killed", folder / "log.txt"
        self.kills = self.finished = self.number = 0
        self.seconds = {1: 0.0, 2: 0.0}
        self.reference: dict[str, str] = {}

    def build_references(self) -> None:
        """Builds by one process and by two that nothing interrupts."""
        for num_ranks in (1, 2):
            project = self.folder / f"whole_{num_ranks}"
            began = time.monotonic()
            if self._wait(self._start(project, num_ranks, None)) != [0] * num_ranks:
                raise SystemExit(f"the uninterrupted build by {num_ranks} fails:\n{self.log.read_text()}")
            self.seconds[num_ranks] = time.monotonic() - began
            found = digests(project)
            if self.reference and found != self.reference:
                raise SystemExit(f"builds by one and by two processes differ: {differences(self.reference, found)}")
            self.reference = found

    def run(self, num_kills: int) -> None:
        """Kill so many times, and finish what the last one left.

        Raises:
            SystemExit: a finished database is another one, or a build fails.
        """
        if not self.reference:
            self.build_references()
        with tqdm(total=num_kills, unit="kill", disable=None) as bar:
            while self.kills < num_kills:
                self._round(kill=True)
                bar.update(self.kills - bar.n)
        while self.project.is_dir():
            self._round(kill=False)

    def _round(self, *, kill: bool) -> None:
        num_ranks = 1 + self.number % 2
        self.number += 1
        at_rename = kill and self.draw.random() < 0.5
        point = self.draw.randint(1, POINTS) if at_rename else None
        pids = self._start(self.project, num_ranks, point)
        if kill and not at_rename:
            time.sleep(self.draw.random() * self.seconds[num_ranks])
            for pid in self.draw.sample(pids, len(pids)):
                os.kill(pid, signal.SIGKILL)
        statuses = self._wait(pids)
        if -signal.SIGKILL in statuses:
            self.kills += 1
            return
        if any(statuses):
            raise SystemExit(f"a build fails after {self.kills} kills:\n{self.log.read_text()}")
        found = digests(self.project)
        if found != self.reference:
            raise SystemExit(f"after {self.kills} kills files differ: {differences(self.reference, found)}")
        self.finished += 1
        shutil.rmtree(self.project)

    def _start(self, project: Path, num_ranks: int, point: int | None) -> list[int]:
        port = free_port()
        ranks = range(num_ranks)
        # With several ranks any of them may be the one that dies at a rename.
        dying = self.draw.choice(ranks)
        return [
            _fork(lambda rank=rank: self._build(project, rank, num_ranks, port, point if rank == dying else None))
            for rank in ranks
        ]

    def _build(self, project: Path, rank: int, num_ranks: int, port: int, point: int | None) -> None:
        out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if num_ranks > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()})
        if point is not None:
            _die_at_rename(point)
        from megatron_grit.cli.main import guarded
        from megatron_grit.retrieval.stages.preparation import Preparation
        from megatron_grit.retrieval.stages.run import run_tasks

        os._exit(guarded(lambda: run_tasks(Preparation(project, "build", self.settings)), "build_db"))

    def _wait(self, pids: list[int]) -> list[int]:
        """Exit statuses; when one is gone, its fellows end within seconds, or are ended."""
        statuses: dict[int, int] = {}
        deadline = time.monotonic() + MAX_SECONDS
        while len(statuses) < len(pids):
            for pid in pids:
                if pid not in statuses and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    statuses[pid] = os.waitstatus_to_exitcode(found[1])
                    if statuses[pid]:
                        deadline = min(deadline, time.monotonic() + 0.2)
            if time.monotonic() > deadline:
                for pid in pids:
                    if pid not in statuses:
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        return [statuses[pid] for pid in pids]


def _fork(action: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        action()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _die_at_rename(point: int) -> None:
    """Have this process killed just before a file takes its final name for the ``point``-th time."""
    rename, count = os.replace, 0

    def replace(*args: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if count == point:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*args, **options)

    os.replace = replace  # type: ignore[assignment]


def differences(wanted: dict[str, str], found: dict[str, str]) -> list[str]:
    """Files that are missing, too many, or other ones."""
    return [name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]


def main() -> int:
    """Run the campaign. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-paths", nargs="+", help="indexed files in place of made-up documents; with --tokenizer")
    parser.add_argument("--tokenizer")
    parser.add_argument("--folder", type=Path, help="for the databases; default: a temporary one")
    arguments = parser.parse_args()
    import_all()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        settings = _inputs_of_a_child(folder)
        if arguments.data_paths:
            settings |= {"data_paths": arguments.data_paths, "tokenizer": arguments.tokenizer, "chunk_length": 64}
            settings |= {"doc_block_size": 200, "block_size": 1000}
        campaign = Campaign(folder, settings, random.Random(arguments.seed))
        campaign.run(arguments.kills)
    one, two = campaign.seconds.values()
    print(
        f"{campaign.kills} kills, {campaign.finished} databases finished, each equal to the uninterrupted one in all "
        f"{len(campaign.reference)} files; a build takes {one:.1f} s by one process and {two:.1f} s by two"
    )
    return 0


def import_all() -> None:
    """Import what a build needs, so that each fork has it."""
    configure_logging()
    import torch
    import transformers.models.bert.modeling_bert  # noqa: F401

    import megatron_grit.inference.encoders.hugging_face
    import megatron_grit.retrieval.stages.run  # noqa: F401
    from megatron_grit.retrieval.index.faiss_index import new_index

    new_index("Flat", "l2", 4)
    torch.set_num_threads(1)


def _inputs_of_a_child(folder: Path) -> dict[str, Any]:
    """Inputs made in a process of its own: a fork of one that has computed may wait for threads that it lacks."""
    pid = _fork(lambda: write_json(folder / "settings.json", write_inputs(folder)))
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise SystemExit("the inputs could not be made")
    settings: dict[str, Any] = json.loads((folder / "settings.json").read_text())
    return settings


if __name__ == "__main__":
    sys.exit(main())
