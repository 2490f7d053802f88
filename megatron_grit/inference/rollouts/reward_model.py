"""Rewards of answers under a reward model: one number for a conversation, read where its last answer ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_grit.config.embedding_shape import scalar_problem
from megatron_grit.config.options import BatchSize
from megatron_grit.data.chat.chat_format import renderings
from megatron_grit.data.text.records import Message, Record
from megatron_grit.data.text.spans import encode_units
from megatron_grit.errors import CheckpointError, DataError
from megatron_grit.inference.encode import encode_tokens
from megatron_grit.inference.model import GritModel


class RewardModel:
    """Gives answers rewards.

    >>> model = RewardModel.load("runs/reward")
    >>> model.score([[Message("user", "2 + 2?"), Message("assistant", "4")]])

    Args:
        model: of a reward model's checkpoint.
        name: of the checkpoint, for messages.

    Raises:
        CheckpointError: it gives more than one number.
    """

    def __init__(self, model: GritModel, name: str | Path) -> None:
        if scalar_problem(model.config.embedding) is not None:
            raise CheckpointError(
                f"{name}: is no reward model, it embeds a text as a vector; give the checkpoint of a run with "
                "training.objective reward"
            )
        self.model = model
        self._chat_format = model.chat.bind(model.tokenizer)

    @staticmethod
    def load(path: str | Path, device: str = "auto") -> RewardModel:
        """Load a checkpoint of any layout, whole into this process.

        Args:
            path: a checkpoint, or the output directory of a run for its newest one.
            device: as of :meth:`~megatron_grit.inference.model.GritModel.load`.

        Raises:
            CheckpointError: it is damaged, or of no reward model.
        """
        return RewardModel(GritModel.load(path, device=device), path)

    def score(
        self, answers: Sequence[Sequence[Message] | Record], *, batch_tokens: int = BatchSize.batch_tokens
    ) -> np.ndarray:
        """Rewards of answers. All processes of a model-parallel group call this with the same ones.

        Args:
            answers: conversations, of which the last answer is rated; or records, which may also be a prompt and its
                completion as texts without a template.
            batch_tokens: token budget of one forward pass, on each replica of a group.

        Returns:
            float32 [len(answers)].

        Raises:
            DataError: one has no answer, has more tokens than the model has positions, or does not fit its template;
                names it by its number.
        """
        if not len(answers):
            return np.empty(0, dtype=np.float32)
        texts: list[tuple[list[int], list[int]]] = []
        for number, answer in enumerate(answers):
            try:
                texts.append(([], self.tokens(answer)))
            except DataError as error:
                raise DataError(f"answer {number}: {error}") from None
        vectors = encode_tokens(self.model.chunks, texts, group=self.model.model_group, batch_tokens=batch_tokens)
        return vectors[:, 0]

    def tokens(self, answer: Sequence[Message] | Record) -> list[int]:
        """Ids of a conversation up to the token that ends its last answer, as training data have them.

        Raises:
            DataError: as :meth:`score`.
        """
        tokenizer = self.model.tokenizer
        if isinstance(answer, Record) and answer.completion is not None:
            pieces = self._chat_format.completion(answer.prompt or "", answer.completion)
        else:
            messages, tools = (answer.messages, answer.tools) if isinstance(answer, Record) else (list(answer), None)
            if not messages or messages[-1].role != "assistant":
                raise DataError("does not end with what an assistant says, and there is nothing else to rate")
            chat_format = self._chat_format.of(messages, tools)
            pieces = chat_format.pieces(renderings(chat_format, messages, "last")[-1])
        table = encode_units(tokenizer, [pieces])
        if table.problems:
            raise DataError(table.problems[0], path=tokenizer.path)
        ids: list[int] = table.cut(np.array([len(table.tokens)])).tokens.tolist()
        longest = self.model.config.model.max_position_embeddings
        if len(ids) > longest:
            raise DataError(f"has {len(ids)} tokens, and the model takes {longest}; leave it out, or shorten it")
        return ids
