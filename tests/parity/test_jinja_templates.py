"""Tokenizers' own chat templates against transformers: the text, the ids, and what is supervised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.data.chat.jinja_template import JinjaChatFormat
from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.text.records import Message
from megatron_grit.data.text.spans import encode_units
from megatron_grit.data.text.templates import encode_prompt
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_grit.errors import DataError
from tests.unit.data.json_tokenizers import CHATML, chat_json
from tests.unit.data.samples import TEXT

transformers = pytest.importorskip("transformers")

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|tail|>"]
# Written for these tests, each in a manner that public templates have: headers, trimming, white space between blocks
# that the environment removes, messages joined in advance, marks for answers, loop control, JSON.
TEMPLATES = {
    "chatml": CHATML,
    "headers": "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|tail|>\n\n' + m['content'] | trim "
    "+ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|tail|>\n\n' }}{% endif %}",
    "blocks": "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ '<|user|>\n' + m.content + eos_token }}\n"
    "  {% elif m.role == 'system' %}\n{{ '<|system|>\n' + m.content + eos_token }}\n  {% else %}\n"
    "{{ '<|assistant|>\n' + m.content + eos_token }}\n  {% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "instruct": "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + "
    "'\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}"
    "{% endif %}{% for m in rest %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + "
    "(system if loop.first else '') + m['content'] | trim + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
    "{{ ' ' + m['content'] | trim + ' ' + "
    "eos_token }}{% endif %}{% endfor %}",
    "marked": "{{- bos_token }}{%- for m in messages %}{%- if loop.index0 > 90 %}{% break %}{% endif %}"
    "{%- if m.role == 'assistant' %}{{- 'A:' }}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{%- else %}{{- m.role[0] | upper + ':' + m.content + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'A:' }}{%- endif %}",
    "json": "{% for m in messages %}{{ '<|im_start|>' + ({'role': m.role} | tojson) + '\n' + m.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}",
}
CONVERSATIONS = [
    [("user", "Hi there"), ("assistant", "Hello, é 漢 🙂!")],
    [("system", "be brief"), ("user", "the fox\n\njumps"), ("assistant", "over"), ("user", "a"), ("assistant", "dog.")],
    [("user", " the </s> <|im_end|><s>  "), ("assistant", "  over\nthe <|im_start|>assistant\n dog \n")],
    [("user", "the"), ("assistant", "the"), ("user", "the"), ("assistant", "the")],
]


@pytest.fixture(scope="module", params=TEMPLATES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tokenizer, Any]:
    """A tokenizer with one of the templates, in our hands and in those of transformers."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": TEMPLATES[request.param],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    path = chat_json(folder, [TEXT] * 3, special_tokens=SPECIAL, settings=settings)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    return request.param, load_tokenizer(path), theirs


def messages_of(turns: list[tuple[str, str]]) -> tuple[list[Message], list[dict[str, str]]]:
    return [Message(*turn) for turn in turns], [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_text(pair: tuple[str, Tokenizer, Any], turns: list[tuple[str, str]]) -> None:
    _, ours, theirs = pair
    messages, values = messages_of(turns)
    for prompt, count in ((False, len(turns)), (True, len(turns) - 1)):
        expected = theirs.apply_chat_template(values[:count], tokenize=False, add_generation_prompt=prompt)
        assert JinjaChatFormat(ours).render(messages[:count], add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_ids_and_labels(pair: tuple[str, Tokenizer, Any], turns: list[tuple[str, str]]) -> None:
    name, ours, theirs = pair
    messages, values = messages_of(turns)
    chat_format = JinjaChatFormat(ours)
    try:
        pieces = chat_format.pieces(messages)
        table = encode_units(ours, [pieces])
    except DataError as error:
        pytest.fail(str(error))
    answers = [content for role, content in turns if role == "assistant"]
    trims = name in ("headers", "instruct")
    if table.problems:  # white space that an answer begins with, in one token with the template's newline
        assert not trims and answers[0][0].isspace()
        return
    spans = table.spans(0)
    supervised = [ours.decode(ids) for role, ids in spans if role is Role.ANSWER]
    expected = [answer.strip() if trims else answer for answer in answers]
    ends = [ids[-1] for role, ids in spans if role is Role.ANSWER]
    around = " {} " if name == "instruct" else "{}"
    assert supervised == [around.format(answer) for answer in expected]
    assert ends == [ours.special_tokens["<|im_end|>" if name in ("chatml", "json") else "</s>"]] * len(answers)
    ids = [index for _, span in spans for index in span]
    assert ids.count(ours.bos_id) <= 1
    if turns is not CONVERSATIONS[2]:  # where transformers reads special tokens from what a message says
        whole = theirs.apply_chat_template(values, tokenize=False)
        if name == "instruct":  # never more than one BOS
            whole = "<s>" + whole.replace("<s>", "")
        assert ids == theirs(whole, add_special_tokens=False)["input_ids"]
        prompt = theirs.apply_chat_template(values[:-1], tokenize=False, add_generation_prompt=True)
        if name == "instruct":
            prompt = "<s>" + prompt.replace("<s>", "")
        assert encode_prompt(ours, messages[:-1], "tokenizer") == theirs(prompt, add_special_tokens=False)["input_ids"]


OWN_DATE = (
    "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}"
    "{% else %}{% set day = '1 May' %}{% endif %}"
)
DATED = "{{ bos_token + 'Today: ' + DAY + '\n' }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "date_in_data"),
    [
        (OWN_DATE + DATED.replace("DAY", "day"), "1 May"),
        (DATED.replace("DAY", "strftime_now('%d %b %Y')"), "26 Jul 2024"),
    ],
    ids=["its own", "none"],
)
def test_dates(template: str, date_in_data: str, tmp_path: Path) -> None:
    """A prompt has today's, as in transformers; data has the same one whenever it is built."""
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer = load_tokenizer(chat_json(tmp_path, [TEXT] * 3, special_tokens=SPECIAL, settings=settings))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    ours = JinjaChatFormat(tokenizer)
    messages, values = messages_of(CONVERSATIONS[0])
    for _ in range(2):  # midnight may fall between the two
        expected = theirs.apply_chat_template(values[:1], tokenize=False, add_generation_prompt=True)
        found = encode_prompt(tokenizer, messages[:1], ours)
        if found == theirs(expected, add_special_tokens=False)["input_ids"]:
            break
    else:
        raise AssertionError(f"{found} is not {expected!r}")
    text = "".join(part for _, part in ours.pieces(messages) if isinstance(part, str))
    assert text.startswith(f"Today: {date_in_data}\n") and date_in_data not in expected


def with_template(tmp_path: Path, template: str) -> Tokenizer:
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": [{"name": "default", "template": template}]}
    return load_tokenizer(chat_json(tmp_path, [TEXT], special_tokens=SPECIAL, settings=settings))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}", "changes, repeats or leaves out"),
        ("{% for m in messages %}{{ m.content + m.content }}</s>{% endfor %}", "changes, repeats or leaves out"),
        ("{{ messages[0].content }}</s>", "changes, repeats or leaves out"),
        ("{% for m in messages %}{{ m.role + m.content }}\n{% endfor %}", "and not a special token"),
        ("{% for m in messages %}{{ bos_token + m.content }}{% endfor %}", "and not a special token"),
        ("{{ raise_exception('no thanks') }}", "refuses the conversation: no thanks"),
        ("{{ messages.append(1) }}", "refuses the conversation"),
        ("{{ ''.__class__.__mro__ }}", "refuses the conversation"),
    ],
)
def test_templates_that_do_not_do(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        JinjaChatFormat(with_template(tmp_path, template)).pieces([Message("user", "u"), Message("assistant", "a")])


def test_not_jinja(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="its chat template is not Jinja"):
        JinjaChatFormat(with_template(tmp_path, "{% for"))


def test_a_file_beside_the_tokenizer_comes_first(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    turns = [Message("user", "u"), Message("assistant", "a")]
    assert JinjaChatFormat(tokenizer).render(turns) == "u</s>a</s>"
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content + '!' + eos_token }}{% endfor %}"
    )
    with pytest.raises(DataError, match="writes '!</s>' after an answer"):
        JinjaChatFormat(tokenizer)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["chat_template"][0]["name"] == "default"
