"""How an instruction and its input become a user's turn.

Published mixtures draw a phrasing for each record, with weights 0.2, 0.1, 0.1, ten of 0.05 and 0.1, of which the last
is like Alpaca's. The phrasings here are our own: the same number, weights and kind, other words.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Wrapping = Literal["plain", "alpaca", "drawn"]
"""plain: the instruction, an empty line and the input. alpaca: the last phrasing. drawn: one of all, by the seed."""

WEIGHTS = (0.2, 0.1, 0.1, *[0.05] * 10, 0.1)
WITH_INPUT = (
    "{instruction}\n\n{input}",
    "{instruction}\n\nInput: {input}\n\nOutput:",
    "{instruction}\n{input}\n\nAnswer:",
    "Task: {instruction}\nInput: {input}\nResult:",
    "{input}\n\n{instruction}",
    "Here is a text:\n{input}\n\nDo this with it: {instruction}",
    "Your task: {instruction}\n\nThe material for it:\n{input}\n\nYour reply:",
    "{instruction} Use what follows.\n\n{input}\n",
    "Given:\n{input}\n\nWanted:\n{instruction}\n",
    "I have a request.\n{instruction}\nIt is about this:\n{input}\n",
    "Q: {instruction}\n{input}\nA:",
    "Instruction: {instruction}\nContext: {input}\nAnswer:",
    "Read the input and follow the instruction.\nInput: {input}\nInstruction: {instruction}\n",
    "The instruction below says what to do, and the input is what to do it with. Reply with what was asked for.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
)
WITHOUT_INPUT = (
    "{instruction}",
    "{instruction}\n\nOutput:",
    "{instruction}\n\nAnswer:",
    "Task: {instruction}\nResult:",
    "{instruction}\n",
    "Do this: {instruction}",
    "Your task: {instruction}\n\nYour reply:",
    "{instruction} Write the answer below.\n",
    "Wanted:\n{instruction}\n",
    "I have a request.\n{instruction}\n",
    "Q: {instruction}\nA:",
    "Instruction: {instruction}\nAnswer:",
    "Follow the instruction.\nInstruction: {instruction}\n",
    "The instruction below says what to do. Reply with what was asked for.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:",
)


class Wrapper:
    """Puts instructions and inputs together.

    Args:
        wrapping: which phrasing.
        random: draws it; of no use otherwise.
    """

    def __init__(self, wrapping: Wrapping, random: np.random.Generator) -> None:
        self.wrapping, self._random = wrapping, random

    def __call__(self, instruction: str, given: str = "") -> str:
        """A user's turn. ``given`` may be empty."""
        number = {"plain": 0, "alpaca": len(WEIGHTS) - 1}.get(self.wrapping)
        if number is None:
            number = int(self._random.choice(len(WEIGHTS), p=WEIGHTS))
        phrasing = (WITH_INPUT if given.strip() else WITHOUT_INPUT)[number]
        return phrasing.format(instruction=instruction, input=given)
