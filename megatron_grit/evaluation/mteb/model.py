"""Our models as mteb's: the members of its ``EncoderProtocol``, without its base class, so that this imports without
it."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_grit.evaluation.encoder import FolderEncoder, TextEncoder, encode_filled
from megatron_grit.evaluation.mteb.instructions import InstructionSet
from megatron_grit.evaluation.tasks.task import Lengths


class MtebModel:
    """An encoder of ours in mteb's terms. Similarity is the cosine, whatever the length of vectors.

    Args:
        encoder: the model.
        instructions: of the tasks.
        lengths: how texts are given to it.
        meta: mteb's ``ModelMeta``, whose name and revision say where results are kept.
    """

    def __init__(self, encoder: TextEncoder, instructions: InstructionSet, lengths: Lengths, meta: Any) -> None:
        self._encoder, self._instructions, self._lengths = encoder, instructions, lengths
        self.mteb_model_meta = meta
        """Read by mteb under this name."""

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Vectors of texts, float32 [n, D]; called by mteb.

        Args:
            inputs: batches of dictionaries with the list ``text``.
            task_metadata: of the task.
            hf_split: not looked at, as ``hf_subset`` and ``kwargs``: texts are put into batches by their tokens.
            prompt_type: query or document, of tasks that tell.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        side = None if prompt_type is None else prompt_type.value
        instruction = self._instructions.of(task_metadata.name, task_metadata.type, task_metadata.prompt, side)
        how = {**vars(self._lengths), "side": "passage" if side == "document" else "query"}
        template = self._instructions.template
        if template is None or not instruction:
            return encode_filled(self._encoder, texts, instruction, **how)
        prompt = template.format(instruction=instruction)
        if isinstance(self._encoder, FolderEncoder):
            return encode_filled(self._encoder, texts, prompt, **how)
        return self._encoder.encode([self._with_prompt(prompt, text) for text in texts], None, **how)

    def _with_prompt(self, prompt: str, text: str) -> Any:
        """Token ids of a text behind a prompt that is not of GRIT's template, with the BOS in front that models of
        such prompts were trained with. The prompt is pooled with the text."""
        tokenizer = self._encoder.tokenizer  # type: ignore[attr-defined]
        return [tokenizer.bos_id, *tokenizer.encode(prompt + text)]

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines of all pairs; called by mteb."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines of rows; called by mteb."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)
