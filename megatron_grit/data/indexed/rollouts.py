"""What is known of the completions of an indexed file beside their tokens: who sampled them, and their rewards.

Three files stand beside ``PREFIX.bin``:

- ``PREFIX.completions.npy``, float64 [records, 2]: of each completion its group, the number of its prompt, and reward;
- ``PREFIX.behavior.npy``, float32 [tokens]: log-probability of each token, in the order of the ``.bin``, under the
  policy that sampled it; NaN for tokens of prompts. It is left out where the sampler did not tell;
- ``PREFIX.rollouts.json``: what both follow from, and their checksums.

Shape suffix legend: R = records, N = tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_grit.data.indexed.reader import IndexedMeta
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.top_probabilities import data_facts
from megatron_grit.errors import DataError
from megatron_grit.store.content import content_digest
from megatron_grit.store.digest import sha256_of_file
from megatron_grit.store.files import replacing, write_json
from megatron_grit.store.rows import read_rows

FORMAT = "megatron_grit.rollouts"
_SPREAD_FLOOR = 1e-4
_REMEDY = "write it with megatron-grit build-rollouts"


def side_paths(prefix: str | Path) -> tuple[Path, Path, Path]:
    """The completions of an indexed file, their log-probabilities, and what they follow from."""
    return Path(f"{prefix}.completions.npy"), Path(f"{prefix}.behavior.npy"), Path(f"{prefix}.rollouts.json")


def group_advantages(groups_R: np.ndarray, rewards_R: np.ndarray, scale: Literal["std", "mean"]) -> np.ndarray:
    """How much better each completion is than the others of its group: float32 [R].

    reward - mean, divided with ``std`` by (standard deviation + 1e-4), the unbiased one over the group (GRPO, arXiv
    2402.03300, section 4.1.2); with ``mean`` it is not divided (Dr. GRPO, arXiv 2503.20783). 0 in groups of equal
    rewards.

    Args:
        groups_R: the number of each one's group.
        rewards_R: float64.
        scale: of ``rollout.advantages``.
    """
    _, group_R, sizes_G = np.unique(groups_R, return_inverse=True, return_counts=True)
    means_G = np.bincount(group_R, rewards_R) / sizes_G
    away_R = rewards_R - means_G[group_R]
    away_R[equal_groups(groups_R, rewards_R)] = 0.0  # a mean of equal numbers may differ from them in its last bit
    if scale == "std":
        spread_G = np.sqrt(np.bincount(group_R, away_R**2) / np.maximum(sizes_G - 1, 1))
        away_R = away_R / (spread_G + _SPREAD_FLOOR)[group_R]
    return away_R.astype(np.float32)


def equal_groups(groups_R: np.ndarray, rewards_R: np.ndarray) -> np.ndarray:
    """Whether a completion's group has one reward only, which teaches nothing: bool [R]; arguments as above."""
    _, group_R = np.unique(groups_R, return_inverse=True)
    least_G, most_G = np.full(group_R.max(initial=-1) + 1, np.inf), np.full(group_R.max(initial=-1) + 1, -np.inf)
    np.minimum.at(least_G, group_R, rewards_R)
    np.maximum.at(most_G, group_R, rewards_R)
    equal: np.ndarray = (least_G == most_G)[group_R]
    return equal


def write_rollouts(
    prefix: str | Path,
    meta: IndexedMeta,
    groups_R: np.ndarray,
    rewards_R: np.ndarray,
    behavior_N: np.ndarray | None,
    facts: dict[str, Any],
) -> None:
    """Write the files beside an indexed file, the description last.

    Args:
        prefix: of the indexed file.
        meta: what its ``.json`` says.
        groups_R: group of each record.
        rewards_R: float64.
        behavior_N: float32. None: not known.
        facts: what else is to be said of them.

    Raises:
        OutputError: they cannot be written.
    """
    completions, behavior, described = side_paths(prefix)
    described.unlink(missing_ok=True)
    with replacing(completions, "wb") as file:
        np.save(file, np.stack((groups_R.astype(np.float64), rewards_R.astype(np.float64)), axis=1), allow_pickle=False)
    digests = {"completions_sha256": sha256_of_file(completions), "behavior_sha256": None}
    behavior.unlink(missing_ok=True)
    if behavior_N is not None:
        with replacing(behavior, "wb") as file:
            np.save(file, behavior_N.astype(np.float32), allow_pickle=False)
        digests["behavior_sha256"] = sha256_of_file(behavior)
    write_json(described, {"format": FORMAT, "data": data_facts(meta), **digests, **facts})


class Rollouts:
    """Reads what is known of the completions of an indexed file.

    Args:
        records: the indexed file.
        scale: see :func:`group_advantages`.

    Attributes:
        rewards_R: float64 [R].
        advantages_R: float32 [R].
        has_behavior: whether the sampling policy's log-probabilities are known.

    Raises:
        DataError: nothing is known of them, or it is of other data or damaged.
    """

    def __init__(self, records: IndexedRecords, scale: Literal["std", "mean"]) -> None:
        completions, behavior, described = side_paths(records.prefix)
        if not described.is_file():
            raise DataError(f"is missing, so {records.prefix} has no rewards; {_REMEDY}", path=described)
        try:
            facts: dict[str, Any] = json.loads(described.read_bytes())
            found, digests = facts["data"], (facts["completions_sha256"], facts["behavior_sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"cannot be read; {_REMEDY}", path=described) from None
        expected = data_facts(records.meta)
        if found != expected:
            differs = next((name for name in expected if found.get(name) != expected[name]), "format")
            raise DataError(
                f"is of other completions than {records.prefix}: {differs} is {found.get(differs)} there and "
                f"{expected[differs]} here; {_REMEDY}",
                path=described,
            )
        rows_R2 = _read(completions, digests[0], np.float64, (len(records), 2))
        self.rewards_R = rows_R2[:, 1]
        self.advantages_R = group_advantages(rows_R2[:, 0], rows_R2[:, 1], scale)
        self.has_behavior = digests[1] is not None
        self._prefix = records.prefix
        if self.has_behavior:
            self._behavior_N = _read(behavior, digests[1], np.float32, (records.meta.num_tokens,))
            self._starts = np.concatenate(([0], np.cumsum(records.lengths())))

    def behavior(self, record: int, start: int, stop: int) -> np.ndarray:
        """Log-probabilities of some tokens of a record under the policy that sampled it: float32; NaN in the prompt.

        Raises:
            DataError: they are not known.
        """
        if not self.has_behavior:
            raise DataError("holds no log-probabilities of the sampling policy", path=side_paths(self._prefix)[2])
        first = self._starts[record]
        return np.array(self._behavior_N[first + start : first + stop])


def _read(path: Path, digest: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    try:
        if content_digest(path) != digest:
            raise ValueError("does not match its checksum")
        rows = read_rows(path, dtype, mapped=True)
        if rows.shape != shape:
            raise ValueError(f"holds {list(rows.shape)} numbers, not {list(shape)}")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read ({error}); {_REMEDY}", path=path) from None
    return rows
