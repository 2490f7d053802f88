"""The choices of a response: how many a request asks for, and what it wants to know of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.inference.generation.answers import AnswerPart
from megatron_grit.inference.results import Answer
from megatron_grit.serving.fields import MAX_CHOICES, Json, RequestError, read_number, read_switch


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a request asks of its answers."""

    n: int
    """Answers to each prompt."""
    log_probs: bool
    """Whether to give the log-probability of each token."""
    token_ids: bool
    """Whether to give the ids of prompt and answer, the token that ended it included, as vLLM does."""
    chat: bool
    """Whether they are messages, as of ``/v1/chat/completions``, or texts, as of ``/v1/completions``."""

    @property
    def kind(self) -> str:
        """What a response is."""
        return "chat.completion" if self.chat else "text_completion"

    @property
    def kind_of_chunk(self) -> str:
        """What a chunk of a response is."""
        return "chat.completion.chunk" if self.chat else "text_completion"

    def choice(self, index: int, answer: Answer, tokenizer: Tokenizer) -> Json:
        """An answer as the endpoint gives it."""
        return (self._chat_choice if self.chat else self._text_choice)(index, answer, tokenizer)

    def delta(self, part: AnswerPart, is_first: bool, tokenizer: Tokenizer) -> Json:
        """A part of an answer as the endpoint streams it.

        Args:
            part: the last one comes with what is known of tokens.
            is_first: whether it is the first of this answer. Clients join what comes, the role too, which the first one
                names.
            tokenizer: the model's.
        """
        choice: Json = {"index": part.prompt, "logprobs": None, "finish_reason": None}
        if part.answer is not None:
            choice = self.choice(part.prompt, part.answer, tokenizer)
            choice.pop("message", None)
        delta = ({"role": "assistant"} if is_first else {}) | {"content": part.text}
        return choice | ({"delta": delta} if self.chat else {"text": part.text})

    def _chat_choice(self, index: int, answer: Answer, tokenizer: Tokenizer) -> Json:
        """An answer as ``/v1/chat/completions`` gives it."""
        choice: Json = {"index": index, "message": {"role": "assistant", "content": answer.text}, "logprobs": None}
        if self.log_probs:
            entries = [
                {"token": token, "logprob": value, "bytes": list(token.encode()), "top_logprobs": []}
                for token, value in zip(_tokens(answer, tokenizer), answer.log_probs, strict=True)
            ]
            choice["logprobs"] = {"content": entries, "refusal": None}
        choice["finish_reason"] = answer.finish_reason
        return choice | ({"token_ids": list(answer.token_ids)} if self.token_ids else {})

    def _text_choice(self, index: int, answer: Answer, tokenizer: Tokenizer) -> Json:
        """An answer as ``/v1/completions`` gives it; ``text_offset`` counts tokens as they are written here."""
        choice: Json = {"index": index, "text": answer.text, "logprobs": None, "finish_reason": answer.finish_reason}
        if self.log_probs:
            tokens = _tokens(answer, tokenizer)
            choice["logprobs"] = {
                "tokens": tokens,
                "token_logprobs": list(answer.log_probs),
                "top_logprobs": None,
                "text_offset": list(accumulate(map(len, tokens), initial=0))[:-1],
            }
        if self.token_ids:
            choice |= {"token_ids": list(answer.token_ids), "prompt_token_ids": list(answer.prompt_token_ids)}
        return choice


def read_chat(body: Json) -> Choices:
    """What a request to ``/v1/chat/completions`` asks for.

    Raises:
        RequestError: names the field.
    """
    return Choices(
        n=read_number(body, "n", 1, MAX_CHOICES, 1),
        log_probs=read_switch(body, "logprobs"),
        token_ids=read_switch(body, "return_token_ids"),
        chat=True,
    )


def read_text(body: Json, num_prompts: int) -> Choices:
    """What a request to ``/v1/completions`` asks for; there ``logprobs`` is a number of alternatives, here 0.

    Args:
        body: the request.
        num_prompts: that it holds.

    Raises:
        RequestError: names the field.
    """
    n = read_number(body, "n", 1, MAX_CHOICES, 1)
    if n * num_prompts > MAX_CHOICES:
        raise RequestError(f"prompt and n ask for {n * num_prompts} answers; ask for at most {MAX_CHOICES}", "n")
    log_probs = read_number(body, "logprobs", 0, 0, -1) == 0
    return Choices(n=n, log_probs=log_probs, token_ids=read_switch(body, "return_token_ids"), chat=False)


def usage(answers: Sequence[Answer], num_prompts: int) -> Json:
    """Tokens that were read and written.

    Args:
        answers: to each prompt equally many.
        num_prompts: each is counted once.
    """
    asked = sum(answer.num_prompt_tokens for answer in answers[:: len(answers) // num_prompts])
    written = sum(answer.num_tokens for answer in answers)
    return {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}


def _tokens(answer: Answer, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.id_to_token(index) for index in answer.token_ids]
