"""Roles: the values on disk and the grammar of records."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_grit.data.indexed.roles import Role, RowKind, check_grammar, pooled, split_segments, supervised
from megatron_grit.errors import DataError

TEXT, TEMPLATE, ANSWER = Role.TEXT, Role.TEMPLATE, Role.ANSWER
TEXTS = {
    Role.QUERY: Role.QUERY_INSTRUCTION,
    Role.POSITIVE: Role.POSITIVE_INSTRUCTION,
    Role.NEGATIVE: Role.NEGATIVE_INSTRUCTION,
}


def test_values_on_disk_never_change() -> None:
    assert [(role.name, int(role)) for role in Role] == [
        ("TEXT", 0),
        ("TEMPLATE", 1),
        ("ANSWER", 2),
        ("QUERY_INSTRUCTION", 3),
        ("QUERY", 4),
        ("POSITIVE_INSTRUCTION", 5),
        ("POSITIVE", 6),
        ("NEGATIVE_INSTRUCTION", 7),
        ("NEGATIVE", 8),
        ("SYSTEM", 9),
        ("USER", 10),
        ("CHOSEN", 11),
        ("REJECTED", 12),
    ]


def test_what_roles_are_for() -> None:
    assert [role for role in Role if supervised(role)] == [TEXT, ANSWER, Role.CHOSEN, Role.REJECTED]
    assert [role for role in Role if pooled(role)] == list(TEXTS)


@st.composite
def embedding_roles(draw: st.DrawFn) -> list[Role]:
    texts = [Role.QUERY] + [Role.POSITIVE] * draw(st.integers(1, 4)) + [Role.NEGATIVE] * draw(st.integers(0, 4))
    roles = []
    for text in texts:
        roles += [TEXTS[text], text] if draw(st.booleans()) else [text]
    return roles


@given(roles=embedding_roles())
def test_every_embedding_record_passes_and_splits(roles: list[Role]) -> None:
    check_grammar(roles, RowKind.EMBEDDING, "r")
    segments = split_segments(roles)
    assert [place for start, stop in segments for place in range(start, stop)] == list(range(len(roles)))
    assert all(pooled(roles[stop - 1]) and not any(map(pooled, roles[start : stop - 1])) for start, stop in segments)


@given(turns=st.lists(st.lists(st.sampled_from([TEMPLATE, Role.SYSTEM, Role.USER]), min_size=1), min_size=1))
def test_every_conversation_passes(turns: list[list[Role]]) -> None:
    check_grammar([role for prompt in turns for role in [*prompt, ANSWER]], RowKind.GENERATIVE, "r")


@pytest.mark.parametrize(
    ("kind", "roles"),
    [
        (RowKind.GENERATIVE, []),
        (RowKind.GENERATIVE, [TEXT, TEXT]),
        (RowKind.GENERATIVE, [TEMPLATE]),
        (RowKind.GENERATIVE, [ANSWER, TEMPLATE]),
        (RowKind.GENERATIVE, [TEMPLATE, ANSWER, TEMPLATE]),
        (RowKind.GENERATIVE, [Role.QUERY, Role.POSITIVE]),
        (RowKind.EMBEDDING, [TEXT]),
        (RowKind.EMBEDDING, [Role.QUERY]),
        (RowKind.EMBEDDING, [Role.QUERY, Role.NEGATIVE]),
        (RowKind.EMBEDDING, [Role.POSITIVE, Role.QUERY]),
        (RowKind.EMBEDDING, [Role.QUERY, Role.POSITIVE_INSTRUCTION]),
        (RowKind.EMBEDDING, [Role.QUERY, Role.NEGATIVE_INSTRUCTION, Role.POSITIVE]),
        (RowKind.EMBEDDING, [Role.QUERY, Role.POSITIVE, Role.NEGATIVE, Role.POSITIVE]),
    ],
)
def test_other_orders_are_refused(kind: RowKind, roles: list[Role]) -> None:
    with pytest.raises(DataError, match=f"record file#3 is not a record of kind {kind.value}"):
        check_grammar(roles, kind, "file#3")


def test_unknown_role_is_named() -> None:
    with pytest.raises(DataError, match="record file#3 holds role 99"):
        check_grammar([TEMPLATE, 99], RowKind.GENERATIVE, "file#3")
