"""What there is to say of a file of completions, whether they were just sampled or are built into training data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class CompletionCounts:
    """Completions and their rewards."""

    num_prompts: int
    num_completions: int
    reward_mean: float
    reward_std: float
    num_equal_prompts: int
    """Prompts whose completions all have one reward."""
    num_tempered: int
    """Completions that were sampled at a temperature or top_p other than 1."""

    def size(self) -> str:
        """How much there is."""
        return f"{self.num_completions:,} completions of {self.num_prompts:,} prompts"

    def remarks(self) -> list[tuple[int, str]]:
        """What else is worth a line, each with how many there are of it."""
        return [
            (self.num_equal_prompts, "prompts have one reward for all completions, which teaches nothing"),
            (
                self.num_tempered,
                "completions were sampled at a temperature or top_p other than 1, which training does not know of: no "
                "ratio shows it",
            ),
        ]

    def lines(self, name: str) -> list[str]:
        """For a terminal.

        Args:
            name: of what was written.
        """
        head = f"{name}: {self.size()}; reward {self.reward_mean:.4f} +- {self.reward_std:.4f}"
        return [head, *(f"  {count:,} {what}" for count, what in self.remarks() if count)]
