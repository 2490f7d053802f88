"""Chat templates as Jinja: what :mod:`megatron_grit.data.chat.chat_templates` writes as ids and text, as text."""

from __future__ import annotations

import re

from megatron_grit.data.chat.chat import Chat, template_of
from megatron_grit.data.chat.chat_templates import ChatTemplate

_NAMES = {"{eos}": "eos_token", "{bos}": "bos_token", "{content}": "content", "{system}": "ns.waiting | join('\\n')"}
_PARTS = re.compile("({eos}|{bos}|{content}|{system})")


def chat_template(chat: Chat) -> str:
    """The Jinja source of a model's template."""
    return chat.source if isinstance(chat.source, str) else jinja_of(template_of(chat.template, chat.source))


def jinja_of(template: ChatTemplate) -> str:
    """Jinja of a template.

    Rendered for a conversation and tokenised, it gives the ids of ``encode_chat``; with ``add_generation_prompt``, and
    a conversation that ends with the user, those of ``encode_prompt``.
    """
    strip = list(template.strip)
    lines = [
        "{%- set ns = namespace(waiting=[], answered=false) -%}",
        "{{- bos_token -}}" if template.bos else "",
        "{%- for message in messages -%}",
        "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}",
        "{{- raise_exception('there is no role ' + message['role'] + ' here') -}}",
        "{%- endif -%}",
        f"{{%- set content = (message['content'] | trim) if message['role'] in {strip} else message['content'] -%}}",
    ]
    separator = [
        "{%- if ns.answered -%}",
        _write(template.separator),
        "{%- set ns.answered = false -%}",
        "{%- endif -%}",
    ]
    assistant = [_write(template.assistant), _write(template.answer), "{%- set ns.answered = true -%}"]
    lines.append("{%- if message['role'] == 'system' -%}")
    if template.system is None:
        lines.append("{%- set ns.waiting = ns.waiting + [content] -%}")
    else:
        lines += [*separator, _write(template.system)]
    lines += ["{%- elif message['role'] == 'assistant' -%}", *separator, *assistant, "{%- else -%}", *separator]
    if template.system is None and template.user_with_system is not None:
        lines += ["{%- if ns.waiting -%}", _write(template.user_with_system), "{%- else -%}", _write(template.user)]
        lines.append("{%- endif -%}")
    elif template.system is None:
        lines += ["{%- set content = (ns.waiting + [content]) | join('\\n') -%}", _write(template.user)]
    else:
        lines.append(_write(template.user))
    lines += ["{%- set ns.waiting = [] -%}", "{%- endif -%}", "{%- endfor -%}"]
    lines += ["{%- if add_generation_prompt -%}", _write(template.assistant), "{%- endif -%}"]
    return "\n".join(line for line in lines if line)


def _write(text: str) -> str:
    """An expression that writes a part of a template."""
    parts = [_NAMES.get(part) or repr(part) for part in _PARTS.split(text) if part]
    # join() binds weaker than +, so each part stands in brackets.
    return "{{- " + " + ".join(f"({part})" for part in parts) + " -}}" if parts else ""
