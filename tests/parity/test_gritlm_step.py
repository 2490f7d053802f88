"""Our unified step against the GritLM step in plain transformers: same tiny Mistral, same texts.

The reference pads, one text a row; ours packs. Both see instructions that are attended and not pooled, chats with
unsupervised turns, and texts of very different lengths.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_grit.config.schema import RunConfig
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.rows.batch import PackedRow, StepBatch
from tests.parity.gritlm_reference import (
    GritBatch,
    Sequence,
    Text,
    accumulate_gradients,
    adamw,
    collate,
    contrastive,
    embed,
    grit_step,
)
from tests.rows import grit_batch

transformers = pytest.importorskip("transformers", reason="the reference is written in transformers")

VOCAB, GROUP_SIZE, TEMPERATURE, STEPS, LR = 101, 2, 0.05, 3, 1e-3
NUM_QUERIES, NUM_SEQUENCES, ROW_LENGTH = 5, 6, 600
TOLERANCE = 1e-5


PAIRS: list[dict[str, Any]] = [
    {
        "query": ["Find the sentence that says it in other words", f"What is {what}?"],
        "pos": [["", f"{what.capitalize()} is {answer}. " * repeats]],
        "neg": [["Another sentence", f"Nobody knows of {what} in the land of {answer}"]],
    }
    for what, answer, repeats in (
        ("a sampler", "a rule that says which record comes next", 1),
        ("packing", "putting several texts into one row", 4),
        ("a query", "what one asks", 2),
        ("padding", "work for nothing", 1),
        ("a passage", "what answers a query", 7),
    )
]
CHATS = [
    ["Say something short.", "No."],
    ["Count to ten.", " ".join(map(str, range(1, 11)))],
    ["Name two\ncolours, one a line.", "red\nblue"],
    ["Repeat after me: padding is work for nothing", "Padding is work for nothing. " * 5 + "Amen"],
]


@dataclass
class Samples:
    """The global batch before either side lays it out."""

    queries: list[Text]
    passages: list[Text]
    sequences: list[Sequence]

    def padded(self) -> GritBatch:
        """The reference's batch."""
        return collate(self.queries, self.passages, self.sequences, GROUP_SIZE)


def make_samples(seed: int) -> Samples:
    """Random tokens; instructions of 0 to 9 tokens; every fourth sequence is plain text, the others are chats."""
    draw = random.Random(seed)

    def ids(shortest: int, longest: int) -> list[int]:
        return [draw.randrange(3, VOCAB) for _ in range(draw.randint(shortest, longest))]

    def text(longest: int) -> Text:
        instruction = ids(0, 9)
        return Text(instruction + ids(1, longest), len(instruction))

    def sequence(index: int) -> Sequence:
        turns = [(ids(2, 12), index % 4 == 0 or turn % 2 == 1) for turn in range(4)]
        return Sequence([i for turn, _ in turns for i in turn], [s for turn, s in turns for _ in turn])

    return Samples(
        [text(10) for _ in range(NUM_QUERIES)],
        [text(60) for _ in range(NUM_QUERIES * GROUP_SIZE)],
        [sequence(i) for i in range(NUM_SEQUENCES)],
    )


def pack(samples: Samples, num_rows: int) -> StepBatch:
    """Our batch: segments dealt to rows in turn."""
    texts = samples.queries + samples.passages
    embedding = [_embedding_row(texts, list(range(r, len(texts), num_rows))) for r in range(num_rows)]
    generative = [_generative_row(samples.sequences[r::num_rows]) for r in range(num_rows)]
    return grit_batch(embedding, generative, NUM_QUERIES, GROUP_SIZE)


def _row(kind: RowKind, segments: list[list[int]], **fields: Any) -> PackedRow:
    lengths = [len(segment) for segment in segments]
    padding = ROW_LENGTH - sum(lengths)
    assert padding > 0
    lengths.append(padding)
    return PackedRow(
        kind=kind.value,
        embeds=kind is RowKind.EMBEDDING,
        tokens_1T=torch.tensor([sum(segments, []) + [0] * padding]),
        positions_1T=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=max(lengths),
        record_ids=[f"segment {number}" for number in range(len(segments))],
        padding_mask_1T=(torch.arange(ROW_LENGTH) >= ROW_LENGTH - padding)[None],
        segment_ids_T=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        **fields,
    )


def _embedding_row(texts: list[Text], slots: list[int]) -> PackedRow:
    chosen = [texts[slot] for slot in slots]
    pooled = [float(i >= text.num_instruction) for text in chosen for i in range(len(text.ids))]
    return _row(
        RowKind.EMBEDDING,
        [text.ids for text in chosen],
        pool_mask_T=torch.tensor(pooled + [0.0] * (ROW_LENGTH - len(pooled))),
        slots_S=torch.tensor(slots),
    )


def _generative_row(sequences: list[Sequence]) -> PackedRow:
    labels = [i for sequence in sequences for i in [*sequence.ids[1:], 0]]
    mask = [float(s) for sequence in sequences for s in [*sequence.supervised[1:], False]]
    padding = [0] * (ROW_LENGTH - len(labels))
    return _row(
        RowKind.GENERATIVE,
        [sequence.ids for sequence in sequences],
        labels_1T=torch.tensor([labels + padding]),
        loss_mask_1T=torch.tensor([mask + [0.0] * len(padding)]),
    )


@pytest.fixture(scope="module")
def reference_model() -> Any:
    """A tiny Mistral with weights large enough for attention to matter."""
    torch.manual_seed(11)
    config = transformers.MistralConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        sliding_window=None,
        initializer_range=0.1,
        attn_implementation="sdpa",
    )
    return transformers.MistralForCausalLM(config)


@pytest.fixture(scope="module")
def job() -> Iterator[Any]:
    """One process, one mesh."""
    from megatron_grit.config.schema import ParallelConfig
    from megatron_grit.parallel.launch import parallel_job

    with parallel_job(ParallelConfig(device="cpu"), seed=1) as context:
        yield context


def our_config(model: Any) -> RunConfig:
    from megatron_grit.convert.families import mistral

    config = RunConfig(model=mistral.model_config(model.config.to_dict()))
    config.training.precision = "fp32"
    config.loss.temperature = TEMPERATURE
    config.parallel.device = "cpu"
    config.optimizer.lr, config.optimizer.schedule, config.optimizer.warmup_ratio = LR, "constant", 0.0
    config.training.steps = STEPS
    return config


def run_ours(
    model: Any, job: Any, batches: list[StepBatch], loss_gen_type: str, attend: str | None = None
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Metrics of each step, and the weights at the end under transformers' names."""
    from megatron_grit.convert.families.registry import family_of_model, hf_state_dict_to_megatron
    from megatron_grit.models.decoder import build_model
    from megatron_grit.training.optimizer import build_optimizer, build_schedule, set_learning_rate, wrap_model
    from megatron_grit.training.step import TrainStep

    config = our_config(model)
    config.loss.loss_gen_type = loss_gen_type  # type: ignore[assignment]
    config.embedding.causal = attend == "causal"
    assert config.model.vocab_size is not None
    ours = build_model(config, config.model.vocab_size, job)
    ours.load_state_dict(hf_state_dict_to_megatron(model.state_dict(), config.model), strict=False)
    wrapped = wrap_model(ours)
    optimizer = build_optimizer(config, wrapped)
    optimizer.reload_model_params()
    schedule = build_schedule(config, optimizer)
    step = TrainStep(config, job, wrapped, optimizer)
    records = []
    for number, batch in enumerate(batches):
        set_learning_rate(schedule, number)
        records.append(step(batch))
    weights = {name: tensor for name, tensor in ours.state_dict().items() if tensor is not None}
    return records, dict(family_of_model(config.model).to_hf(weights, config.model))


def run_reference(
    model: Any, samples: list[Samples], loss_gen_kind: str, chunk_size: int | None = 4
) -> tuple[list[tuple[float, float, float]], dict[str, torch.Tensor]]:
    """(loss_emb, loss_gen, gradient norm) of each step, and the weights at the end."""
    trained = copy.deepcopy(model)
    optimizer = adamw(trained, LR)
    records = [
        grit_step(
            trained,
            sample.padded(),
            optimizer,
            temperature=TEMPERATURE,
            chunk_size=chunk_size,
            loss_gen_kind=loss_gen_kind,
        )
        for sample in samples
    ]
    return records, trained.state_dict()


@pytest.mark.parametrize("num_rows", [1, 3], ids=["one_graph", "grad_cache"])
@pytest.mark.parametrize(("loss_gen_type", "theirs"), [("token", "mixed"), ("sequence", "token")])
def test_three_steps(reference_model: Any, job: Any, num_rows: int, loss_gen_type: str, theirs: str) -> None:
    """Losses, gradient norms and trained weights are the reference's.

    On one undivided generative batch GritLM's "mixed" is the mean over supervised tokens, our "token"; its "token"
    is our "sequence".
    """
    samples = [make_samples(seed) for seed in range(STEPS)]
    expected, expected_weights = run_reference(reference_model, samples, theirs)
    got, weights = run_ours(reference_model, job, [pack(sample, num_rows) for sample in samples], loss_gen_type)
    for record, (loss_emb, loss_gen, grad_norm) in zip(got, expected, strict=True):
        assert record["loss_emb"] == pytest.approx(loss_emb, rel=TOLERANCE)
        assert record["loss_gen"] == pytest.approx(loss_gen, rel=TOLERANCE)
        assert record["grad_norm"] == pytest.approx(grad_norm, rel=TOLERANCE * 10)
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        # Adam moves a weight by up to its rate whatever the gradient's size, so near-zero gradients amplify rounding.
        difference = (tensor - expected_weights[name]).abs()
        assert difference.mean() < LR * 1e-3, name
        assert difference.max() < LR * STEPS, name


def test_from_text(reference_model: Any, job: Any, tmp_path: Path) -> None:
    """From JSONL through indexed files and the loader, against one-go tokenisation of GritLM's strings.

    The batch is all there is of the data, and rows are short, so that the contrastive loss spans several of them.
    """
    import sentencepiece

    from megatron_grit.data.builders.grit_builder import build_grit, read_texts
    from megatron_grit.data.rows.loader import GritDataLoader
    from megatron_grit.data.text.tokenizer import load_tokenizer, train_sentencepiece

    pairs, chats = tmp_path / "pairs.jsonl", tmp_path / "chats.jsonl"
    pairs.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    chats.write_text("".join(json.dumps({"text": turns}) + "\n" for turns in CHATS))
    path = train_sentencepiece(read_texts([pairs, chats]), tmp_path / "tokenizer", 320)
    for file in (pairs, chats):
        build_grit([file], file.with_suffix(""), path)
    config = our_config(reference_model)
    config.data.embedding, config.data.generative = [str(pairs.with_suffix(""))], [str(chats.with_suffix(""))]
    config.data.tokens_per_row = 400
    config.training.embedding_batch_size, config.training.generative_batch_size = len(PAIRS), len(CHATS)
    batch = GritDataLoader(config, load_tokenizer(path)).batch(0)
    assert len(batch.rows_of("embedding")) > 1

    encode = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode

    def text(pair: list[str]) -> Text:
        prefix = f"<|user|>\n{pair[0]}\n<|embed|>\n" if pair[0] else "<|embed|>\n"
        return Text([1, *encode(prefix + pair[1])], 1 + len(encode(prefix)))

    def chat(turns: list[str]) -> Sequence:
        prompt = [1, *encode(f"<|user|>\n{turns[0]}\n<|assistant|>\n")]
        whole = [1, *encode(f"<|user|>\n{turns[0]}\n<|assistant|>\n{turns[1]}"), 2]
        assert whole[: len(prompt)] == prompt
        return Sequence(whole, [place >= len(prompt) for place in range(len(whole))])

    padded = collate(
        [text(pair["query"]) for pair in PAIRS],
        [text(passage) for pair in PAIRS for passage in (pair["pos"][0], pair["neg"][0])],
        [chat(turns) for turns in CHATS],
        GROUP_SIZE,
    )
    torch.manual_seed(12)
    model = type(reference_model)(
        transformers.MistralConfig(
            **reference_model.config.to_dict() | {"vocab_size": 320, "attn_implementation": "sdpa"}
        )
    )
    expected = accumulate_gradients(model, padded, temperature=TEMPERATURE, chunk_size=2)
    (got,), _ = run_ours(model, job, [batch], "token")
    assert (batch.num_tokens, batch.counts_of("generative").num_sequences) == (padded.num_tokens, len(CHATS))
    assert (got["loss_emb"], got["loss_gen"]) == pytest.approx(expected, rel=TOLERANCE)


def test_causal_embedding_is_told_apart(reference_model: Any, job: Any) -> None:
    """The control: with causal attention on our side the embedding loss is another, the generative one is not."""
    samples = make_samples(0)
    (expected,), _ = run_reference(reference_model, [samples], "mixed")
    (got,), _ = run_ours(reference_model, job, [pack(samples, 2)], "token", attend="causal")
    assert abs(got["loss_emb"] - expected[0]) > 1e-2 * expected[0]
    assert got["loss_gen"] == pytest.approx(expected[1], rel=TOLERANCE)


def test_reference_attends_both_ways(reference_model: Any) -> None:
    """A later token changes an earlier state in the embedding pass and not in the generative one; padding neither."""
    padded = make_samples(3).padded().passages
    ids, mask, _ = next(padded.chunks(2))
    first_only = torch.zeros_like(mask)
    first_only[:, 0] = True
    changed = ids.clone()
    changed[:, mask.sum(1).min() - 1] += 1
    beyond = torch.where(mask, ids, 7)
    with torch.no_grad():
        before = embed(reference_model, ids, mask, first_only)
        assert (embed(reference_model, changed, mask, first_only) - before).abs().max() > 1e-3
        assert torch.equal(embed(reference_model, beyond, mask, first_only), before)
        causal = reference_model.model(ids, attention_mask=mask.long()).last_hidden_state[:, 0]
        assert torch.equal(reference_model.model(changed, attention_mask=mask.long()).last_hidden_state[:, 0], causal)


def test_reference_grad_cache_equals_one_graph(reference_model: Any) -> None:
    """Chunks of GradCache give the loss and gradients of one graph; a chunk that forgets the others does not."""
    batch = make_samples(4).padded()
    gradients, losses = [], []
    for chunk_size in (None, 1, 4):
        model = copy.deepcopy(reference_model)
        losses.append(accumulate_gradients(model, batch, temperature=TEMPERATURE, chunk_size=chunk_size))
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=TOLERANCE)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        halves = [
            contrastive(embed(reference_model, *query), embed(reference_model, *passage), TEMPERATURE, GROUP_SIZE)
            for query, passage in zip(batch.queries.chunks(1), batch.passages.chunks(GROUP_SIZE), strict=True)
        ]
    assert abs(float(sum(halves)) / len(halves) - losses[0][0]) > 0.1
