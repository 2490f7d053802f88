"""Centres of lists by several processes: the same bits whatever their number, as good as faiss's, and none of the work
done twice after a kill."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from megatron_grit.retrieval.index import kmeans
from megatron_grit.retrieval.index.faiss_index import exact_search
from megatron_grit.retrieval.index.kmeans import KMeans, share_of
from megatron_grit.retrieval.index.on_torch import nearest_centres
from megatron_grit.retrieval.work import Worker
from megatron_grit.store.blocks import BlockFolder
from tests.unit.retrieval.workers import run_together

DIM, LISTS = 12, 40


def vectors_of(count: int, seed: int = 0) -> np.ndarray:
    """Of clusters of different sizes, so that centres matter."""
    random = np.random.default_rng(seed)
    middles = random.standard_normal((60, DIM)) * np.linspace(2, 0.2, DIM)
    of = (60 * random.random(count) ** 2).astype(int)
    return (middles[of] + 0.5 * random.standard_normal((count, DIM))).astype(np.float32)


def state_in(folder: Path) -> BlockFolder:
    return BlockFolder(folder, 10, 1, {"task": "lists"})


def trained(folder: Path, vectors: np.ndarray, num_workers: int, metric: str = "l2", **changed: Any) -> np.ndarray:
    found: dict[int, np.ndarray] = {}
    values = {"spherical": metric != "l2", "seed": 1, "nearest": functools.partial(nearest_centres, metric=metric)}
    means = KMeans(LISTS, len(vectors), **values | changed)

    def task(worker: Worker) -> None:
        found[worker.rank] = means.run(vectors[slice(*share_of(len(vectors), worker))], worker, state_in(folder))

    run_together(num_workers, task)
    assert all((centres == found[0]).all() for centres in found.values())
    return found[0]


def objective(vectors: np.ndarray, centres: np.ndarray) -> float:
    """Mean squared distance to the nearest centre, by the definition."""
    pairs = vectors.astype(np.float64)[:, None] - centres.astype(np.float64)[None]
    return float((pairs**2).sum(2).min(1).mean())


def by_faiss(vectors: np.ndarray, seed: int = 1234) -> np.ndarray:
    clustering = faiss.Kmeans(DIM, LISTS, niter=10, seed=seed, max_points_per_centroid=len(vectors))
    clustering.train(vectors)
    return np.asarray(clustering.centroids)


@pytest.mark.parametrize("metric", ["l2", "inner_product"])
def test_processes_and_threads_change_no_bit(tmp_path: Path, metric: str) -> None:
    """Shares are of unlike sizes, and of more processes than parts some have none."""
    vectors, before = vectors_of(4096 * 4 + 100), torch.get_num_threads()
    shares = [share_of(len(vectors), Worker(rank, 3)) for rank in range(3)]
    assert [last - first for first, last in shares] == [4096, 8192, 4196]
    found = []
    try:
        for threads, num_workers in ((1, 1), (2, 1), (1, 3), (1, 6)):
            torch.set_num_threads(threads)
            found.append(trained(tmp_path / f"{threads}.{num_workers}", vectors, num_workers, metric))
    finally:
        torch.set_num_threads(before)
    assert all(centres.tobytes() == found[0].tobytes() for centres in found)
    lengths = np.linalg.norm(found[0], axis=1)
    assert np.allclose(lengths, 1, atol=1e-6) == (metric == "inner_product")


def test_as_good_as_faiss(tmp_path: Path) -> None:
    """To 1%, which is what another seed changes. After one iteration it is not, and centres of others are no good."""
    vectors = vectors_of(6000)
    wanted = np.mean([objective(vectors, by_faiss(vectors, seed)) for seed in (1, 2, 3)])
    found = [objective(vectors, trained(tmp_path / f"{seed}", vectors, 2, seed=seed)) for seed in (1, 2, 3)]
    assert np.mean(found) == pytest.approx(wanted, rel=0.01)
    once = [
        objective(vectors, trained(tmp_path / f"once{seed}", vectors, 1, seed=seed, iterations=1)) for seed in (1, 2)
    ]
    assert np.mean(once) > 1.03 * wanted
    assert objective(vectors, trained(tmp_path / "other", vectors_of(6000, seed=5), 1)) > 1.3 * wanted


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """With the iteration that it was in, on any number of processes; files of earlier iterations are removed."""
    vectors, calls = vectors_of(9000), [0]
    straight = trained(tmp_path / "straight", vectors, 1)

    def failing(part: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt
        return nearest_centres(part, centres, "l2")

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", vectors, 1, nearest=failing)
    assert len(list((tmp_path / "killed").glob("*.hdf5"))) == 2
    last = state_in(tmp_path / "killed").blocks[3].path
    again = trained(tmp_path / "killed", vectors, 2, nearest=failing)
    assert calls[0] == 5 + 2 * 6 and again.tobytes() == straight.tobytes()
    # What was written last is damaged: the iteration before it is gone on from.
    calls[0] = 10
    for block in state_in(tmp_path / "killed").blocks[4:]:
        block.path.unlink(missing_ok=True)
    trained(tmp_path / "cut", vectors, 1, iterations=4)
    for path in (tmp_path / "cut").glob("*.hdf5"):
        (tmp_path / "killed" / path.name).write_bytes(path.read_bytes())
    last.write_bytes(last.read_bytes()[:-7])
    again = trained(tmp_path / "killed", vectors, 1, nearest=failing)
    assert calls[0] == 10 + 7 and again.tobytes() == straight.tobytes()


def test_an_empty_list_takes_half_of_a_full_one(tmp_path: Path) -> None:
    centres = np.arange(6 * DIM, dtype=np.float32).reshape(6, DIM) + 1
    counts = np.array([0, 1000, 0, 1, 3, 0])
    kmeans._split(centres, counts, np.random.default_rng(0))
    assert counts.sum() == 1004 and (counts > 0).all() and counts[3] == 1
    assert len(np.unique(centres, axis=0)) == 6 and (centres[3] == np.arange(3 * DIM, 4 * DIM) + 1).all()
    like = np.abs(centres[[0, 2, 5]][:, None] / centres[[1, 4]][None] - 1).max(axis=2).min(axis=1)
    assert (like < 0.005).all(), "a centre is near none that was cut"
    # Most of these vectors are one: lists become empty in each iteration.
    vectors = vectors_of(5000)
    vectors[:4900] = vectors[0]
    found = [trained(tmp_path / f"{number}", vectors, number) for number in (1, 2)]
    assert found[0].tobytes() == found[1].tobytes() and np.isfinite(found[0]).all()
    assert objective(vectors, found[0]) <= 1.05 * objective(vectors, by_faiss(vectors))


def test_sums_are_exact_and_have_room() -> None:
    """Of as many vectors as a sum has room for, all at the largest channel; and the order of the vectors is nothing."""
    vectors = np.full((5000, DIM), -7.9999, np.float32)
    vectors[0, 0] = 1e-6
    means = KMeans(1, 1 << 28, False, 0, lambda *_: (np.empty(0), np.empty(0)))
    scale = means._scale(vectors, Worker())
    assert 2.0**62 >= (1 << 28) * 8 * scale > 2.0**60
    of = np.zeros(5000, dtype=np.int64)
    _, counts, sums = kmeans._sums(vectors, of, scale)
    assert counts.tolist() == [5000] and sums[0, 1] / scale / 5000 == np.float32(-7.9999)
    shuffled = np.random.default_rng(0).permutation(5000)
    assert (kmeans._sums(vectors[shuffled], of, scale)[2] == sums).all()


@pytest.mark.parametrize("metric", ["l2", "inner_product"])
def test_torch_finds_the_same_centres(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, in tiles that do not divide the sizes."""
    monkeypatch.setattr("megatron_grit.retrieval.index.on_torch.ROWS_OF_PART", 300)
    monkeypatch.setattr("megatron_grit.retrieval.index.on_torch._CENTRES", 17)
    vectors = vectors_of(1000)
    centres = vectors[:LISTS].copy()
    centres[30] = centres[2]
    scores, numbers = nearest_centres(vectors, centres, metric, "cpu")
    wanted_scores, wanted = (found[:, 0] for found in exact_search(vectors, centres, 1, metric))
    assert (numbers == wanted).mean() > 0.999 and (numbers == 2).any() and not (numbers == 30).any()
    np.testing.assert_allclose(scores, wanted_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_rows", [20, 37])
def test_threads_change_no_bit(num_rows: int) -> None:
    """Products of so few rows have other last bits where several threads share them."""
    random = np.random.default_rng(0)
    vectors, centres = (random.standard_normal((n, 768), dtype=np.float32) for n in (num_rows, 1100))
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(nearest_centres(vectors, centres, "inner_product", "cpu"))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    for scores, numbers in found[1:]:
        assert scores.tobytes() == found[0][0].tobytes() and (numbers == found[0][1]).all()
