r"""Chat templates as data: what stands around the turns of a conversation, and which of it the model generates.

=========  =========================================================================================================
tulu       ``<|system|>\n{system}\n<|user|>\n{user}\n<|assistant|>\n{answer}</s>``, a newline, the next turn
gritlm     the same; a system message goes in front of the next user's
zephyr     as tulu, with ``</s>`` after the system message and the user's turn as well
llama2     ``[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST] {answer} </s>[INST] {user} [/INST] {answer} </s>``
chatml     ``<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>``, a newline, the next turn
tokenizer  the Jinja template that comes with the tokenizer (:mod:`megatron_grit.data.chat.jinja_template`)
=========  =========================================================================================================

All but chatml begin with BOS. There is never more than one: Llama 2 puts one before each of its turns, here only the
first is kept. An answer is supervised together with all that the model has to generate around it: the token that ends
its turn and, in llama2, the space on either side.

Sources: open-instruct (tulu), gritlm, alignment-handbook (zephyr), the Llama 2 reference code, OpenAI's ChatML. White
space around answers is not kept, though zephyr and chatml keep it there: nobody wants a model that generates it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from megatron_grit.data.chat.chat_format import TOKENIZER, ChatFormat, Piece, join_completion
from megatron_grit.data.chat.jinja_template import JinjaChatFormat
from megatron_grit.data.chat.message_keys import check_keys
from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.text.records import Message
from megatron_grit.data.text.special import SpecialTokens
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import ConfigError


class _Slot(Enum):
    CONTENT = "content"
    SYSTEM = "system"


_Part = tuple[Role, str | int | _Slot]
_CONTENT, _SYSTEM = -1, -2  # no ids


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A template. ``{content}`` stands for a message, ``{eos}`` and the ``special_tokens`` become ids."""

    name: str
    user: str
    """Around a user's message."""
    assistant: str
    """Before an answer: the end of the prompt."""
    answer: str
    """An answer and what the model generates around it, the end of its turn included."""
    separator: str = ""
    """Between an answer and the next message."""
    system: str | None = None
    """Around a system message."""
    user_with_system: str | None = None
    """Around a user's message that follows a system message, which is ``{system}``. Where both are None, the system
    message goes in front of the user's with a newline, and is part of it."""
    bos: bool = True
    """Whether a conversation begins with BOS."""
    strip: tuple[str, ...] = ("assistant",)
    """Roles whose messages lose the white space at either end."""
    special_tokens: tuple[str, ...] = ()
    """Texts that become ids where the tokenizer has such special tokens, and stay text where it has not."""

    def __post_init__(self) -> None:
        for key in ("user", "answer", "system", "user_with_system"):
            value = getattr(self, key)
            if value is not None and value.count("{content}") != 1:
                raise ConfigError(f"chat template {self.name}: {key} must contain {{content}} once")
        if self.user_with_system is not None and self.user_with_system.count("{system}") != 1:
            raise ConfigError(f"chat template {self.name}: user_with_system must contain {{system}} once")
        if not self.answer.split("{content}")[1].strip():
            raise ConfigError(f"chat template {self.name}: answer must end with {{eos}} or what else ends a turn")


TEMPLATES = {
    template.name: template
    for template in (
        ChatTemplate(
            name="tulu",
            system="<|system|>\n{content}\n",
            user="<|user|>\n{content}\n",
            assistant="<|assistant|>\n",
            answer="{content}{eos}",
            separator="\n",
            strip=("system", "user", "assistant"),
        ),
        ChatTemplate(
            name="gritlm",
            user="<|user|>\n{content}\n",
            assistant="<|assistant|>\n",
            answer="{content}{eos}",
            separator="\n",
        ),
        ChatTemplate(
            name="zephyr",
            system="<|system|>\n{content}{eos}\n",
            user="<|user|>\n{content}{eos}\n",
            assistant="<|assistant|>\n",
            answer="{content}{eos}",
            separator="\n",
        ),
        ChatTemplate(
            name="llama2",
            user="[INST] {content} [/INST]",
            user_with_system="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{content} [/INST]",
            assistant="",
            answer=" {content} {eos}",
            strip=("user", "assistant"),
        ),
        ChatTemplate(
            name="chatml",
            system="<|im_start|>system\n{content}<|im_end|>\n",
            user="<|im_start|>user\n{content}<|im_end|>\n",
            assistant="<|im_start|>assistant\n",
            answer="{content}<|im_end|>",
            separator="\n",
            bos=False,
            special_tokens=("<|im_start|>", "<|im_end|>"),
        ),
    )
}


def load_chat_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """A template for a tokenizer.

    Args:
        name: one of ``TEMPLATES``, "tokenizer" for the tokenizer's own, or the path of a YAML file with the fields of
            :class:`ChatTemplate`.
        tokenizer: the tokenizer.

    Raises:
        ConfigError: no such template, or a YAML file that is not one.
        DataError: the tokenizer has no template of its own.
    """
    return JinjaChatFormat(tokenizer) if name == TOKENIZER else BoundTemplate(find_template(name), tokenizer)


def find_template(name: str) -> ChatTemplate:
    """A template by its name, or of a YAML file.

    Raises:
        ConfigError: no such template, or a YAML file that is not one.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name.endswith((".yaml", ".yml")):
        return _read_template(Path(name))
    raise ConfigError(
        f"no chat template {name}; there are {', '.join(TEMPLATES)}, {TOKENIZER}, and your own .yaml file"
    )


def _read_template(path: Path) -> ChatTemplate:
    import yaml

    from megatron_grit.config.locate import load_yaml

    try:
        content = path.read_bytes()
        values: Any = load_yaml(content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    known = {field.name for field in fields(ChatTemplate)}
    if not isinstance(values, dict) or not set(values) <= known:
        raise ConfigError(f"{path}: a chat template has the keys {', '.join(sorted(known))} and no others")
    for key, value in values.items():
        if key in ("strip", "special_tokens"):
            values[key] = tuple(value) if isinstance(value, list) else value
            good = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        else:
            good = isinstance(value, bool) if key == "bos" else isinstance(value, str)
        if not good:
            raise ConfigError(f"{path}: {key} has a value of the wrong type")
    missing = {"user", "assistant", "answer"} - set(values)
    if missing:
        raise ConfigError(f"{path}: {', '.join(sorted(missing))} is missing")
    label = f"{values.get('name', path.stem)}:{hashlib.sha256(content).hexdigest()[:12]}"
    return ChatTemplate(**{**values, "name": label})


class BoundTemplate:
    """A template with the ids of a tokenizer. See :class:`ChatFormat`."""

    rewrites = False
    read: frozenset[str] = frozenset()
    date_in_data: str | None = None

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self.name = template.name
        slots = {"{content}": _CONTENT, "{system}": _SYSTEM, "{eos}": tokenizer.eos_id, "{bos}": tokenizer.bos_id}
        self._special = SpecialTokens(tokenizer, slots)
        self._bos: list[Piece] = [(Role.TEMPLATE, tokenizer.bos_id)] if template.bos else []
        self._eos_id = tokenizer.eos_id
        self._strip = frozenset(template.strip)
        self._user = self._parts(template.user, Role.USER)
        self._assistant = self._parts(template.assistant)
        self._answer = self._parts(template.answer, Role.ANSWER, Role.ANSWER)
        self._separator = self._parts(template.separator)
        self._system = None if template.system is None else self._parts(template.system, Role.SYSTEM)
        joint = template.user_with_system
        self._user_with_system = None if joint is None else self._parts(joint, Role.USER)

    def _parts(self, text: str, content: Role = Role.TEMPLATE, literal: Role = Role.TEMPLATE) -> list[_Part]:
        parts: list[_Part] = []
        for part in self._special.split(text):
            if part == _CONTENT:
                parts.append((content, _Slot.CONTENT))
            elif part == _SYSTEM:
                parts.append((Role.SYSTEM, _Slot.SYSTEM))
            else:
                parts.append((literal, part))
        return parts

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        pieces = [*self._bos]
        waiting: list[str] = []  # system messages for the next user turn
        answered = False
        for message in messages:
            content = message.content.strip() if message.role in self._strip else message.content
            if message.role == "system" and self._system is None:
                waiting.append(content)
                continue
            if answered:
                _fill(pieces, self._separator)
                answered = False
            if message.role == "system" and self._system is not None:
                _fill(pieces, self._system, content)
            elif message.role == "assistant":
                _fill(pieces, self._assistant)
                _fill(pieces, self._answer, content)
                answered = True
            elif waiting and self._user_with_system is not None:
                _fill(pieces, self._user_with_system, content, "\n".join(waiting))
                waiting = []
            else:
                _fill(pieces, self._user, "\n".join([*waiting, content]))
                waiting = []
        return pieces

    def of(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> ChatFormat:
        check_keys(messages, tools, None, self.name)
        return self

    def by_answer(self, messages: Sequence[Message]) -> bool:
        return False

    def prompt(self, messages: Sequence[Message], date: datetime | None = None) -> list[Piece]:
        pieces = self.pieces(messages)
        _fill(pieces, self._assistant)
        return pieces

    def completion(self, prompt: str, completion: str) -> list[Piece]:
        return [*self._bos, *join_completion(prompt, completion), (Role.ANSWER, self._eos_id)]


def _fill(pieces: list[Piece], parts: Sequence[_Part], content: str = "", system: str = "") -> None:
    for role, part in parts:
        value = part
        if part is _Slot.CONTENT:
            value = content
        elif part is _Slot.SYSTEM:
            value = system
        if value != "" and not isinstance(value, _Slot):
            pieces.append((role, value))
