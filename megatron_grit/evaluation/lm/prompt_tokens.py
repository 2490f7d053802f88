"""Texts of lm-eval to token ids: special tokens of templates are read as such, and BOS stands at most once."""

from __future__ import annotations

from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.text.spans import encode_units
from megatron_grit.data.text.special import SpecialTokens
from megatron_grit.data.text.tokenizer import JsonTokenizer, Tokenizer
from megatron_grit.data.text.tokenizer_settings import read_settings, token_name
from megatron_grit.errors import DataError


class PromptTokens:
    """Reads texts as transformers' tokenizers do, which lm-eval's backend for Hugging Face models goes by.

    Args:
        tokenizer: of the model.
        add_bos: put BOS before a text that does not begin with it. None: as ``tokenizer_config.json`` says, else as the
            post-processor of ``tokenizer.json`` does; a SentencePiece model does.

    Attributes:
        prefix_id: the token that a text without context follows: BOS, or EOS where the tokenizer has no BOS.
    """

    def __init__(self, tokenizer: Tokenizer, add_bos: bool | None = None) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend() if isinstance(tokenizer, JsonTokenizer) else None
        self._special = SpecialTokens(tokenizer)
        settings = read_settings(tokenizer.path)
        named = token_name(settings.get("bos_token")) is not None
        self.prefix_id = tokenizer.bos_id if named or self._backend is None else tokenizer.eos_id
        stated = settings.get("add_bos_token")
        if add_bos is not None:
            self.adds_bos = add_bos
        elif isinstance(stated, bool):
            self.adds_bos = stated
        else:
            self.adds_bos = self._backend is None or self._backend.encode("a").ids[:1] == [tokenizer.bos_id]

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Ids of a text.

        Args:
            text: as a template wrote it, or a document.
            add_bos: whether BOS is to stand before it. None: as the tokenizer does.

        Raises:
            DataError: it begins with BOS twice.
        """
        bos, ids = self._tokenizer.bos_id, self._encode(text)
        if (self.adds_bos if add_bos is None else add_bos) and ids[:1] != [bos]:
            ids.insert(0, bos)
        check_bos(ids, bos)
        return ids

    def _encode(self, text: str) -> list[int]:
        if self._backend is not None:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
            return ids
        pieces = [(Role.TEMPLATE, part) for part in self._special.split(text)]
        tokens: list[int] = encode_units(self._tokenizer, [pieces]).tokens.tolist() if pieces else []
        return tokens


def check_bos(ids: list[int], bos: int) -> None:
    """
    Raises:
        DataError: a prompt begins with BOS twice, which models are not trained on: scores would be those of another
            text.
    """
    if ids[:2] == [bos, bos]:
        raise DataError(
            "a prompt begins with two BOS; its chat template or the task's text writes one, and so does the other or "
            "add_bos_token: leave one of them out"
        )
