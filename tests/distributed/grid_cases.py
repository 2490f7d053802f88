"""Cases of the layout grid: a model, a layout, what is trained and on which rows. Named ones, and any number drawn."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from megatron_grit.config.checks.run import find_problems
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.loss import RoleWeightsConfig
from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.config.schema.teacher import TeacherConfig
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.rows.batch import PackedRow, StepBatch
from tests.neighbors import with_neighbors
from tests.rows import VOCAB, grit_batch, make_row, tiny_config

SP = {"parallel.tensor": 2, "parallel.sequence_parallel": True}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison with the reference."""

    processes: int
    settings: dict[str, Any] = field(default_factory=dict)
    """What is not as in :func:`config_of`: "section.name" and its value."""
    row_lengths: tuple[int, ...] = (64,) * 4
    """Of the rows of each kind in the global batch; data parallel ranks take them in turn."""
    num_queries: int = 4
    group_size: int = 2
    seed: int = 0
    """Of the rows, and the first that is tried for the weights."""

    def reference_key(self) -> str:
        """Equal for cases that have the same reference: the layout is not part of it."""
        without = ("parallel.", "training.recompute", "training.grad_cache")
        kept = {key: value for key, value in self.settings.items() if not key.startswith(without)}
        rows = self.row_lengths, self.second().row_lengths
        return repr((sorted(kept.items()), rows, self.num_queries, self.group_size, self.seed))

    def second(self) -> Case:
        """The rows of the second step: others, and with overlap more of them.

        It counts the gradients of the first step's rows to tell when it may reduce them.
        """
        one_row = self.settings.get("training.grad_cache") == "off"
        times = 2 if self.settings.get("parallel.overlap") and not one_row else 1
        queries = times * self.num_queries
        return replace(self, row_lengths=times * self.row_lengths, num_queries=queries, seed=self.seed + 1)

    def describe(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        return asdict(self)


def layout(**sizes: Any) -> dict[str, Any]:
    """Settings of the parallel section."""
    return {f"parallel.{name}": value for name, value in sizes.items()}


DENSE: dict[str, Any] = {"embedding.projection_dim": 12}
TIED: dict[str, Any] = {"model.tie_embeddings": True}
MOE: dict[str, Any] = {"model.num_experts": 4, "model.moe_aux_loss_coeff": 0.01}
EMBEDDING: dict[str, Any] = DENSE | {"training.objective": "embedding"}
GENERATIVE: dict[str, Any] = DENSE | {"training.objective": "generative"}
RETRO: dict[str, Any] = {"model.retro": RetroConfig(num_neighbors=2, chunk_length=8, layers=[0, 1], gate=None)}
WEIGHED: dict[str, Any] = {"loss.role_weights": RoleWeightsConfig(user=0.25)}
MEANS: dict[str, Any] = GENERATIVE | WEIGHED | {"loss.loss_gen_type": "microbatch_mean", "loss.microbatch_sequences": 3}
NOISE: dict[str, Any] = {"training.neftune_alpha": 20.0}
SUMS: dict[str, Any] = MEANS | {"loss.loss_gen_type": "sum"}
TAUGHT: dict[str, Any] = MEANS | {"loss.teacher": TeacherConfig(kind="full", weight=0.5, temperature=1.5)}
KEPT_NEAR: dict[str, Any] = DENSE | {"loss.teacher": TeacherConfig(kind="full", weight=2.0, direction="reverse")}
CACHED: dict[str, Any] = GENERATIVE | {"loss.teacher": TeacherConfig(kind="topk", temperature=2.0, label_weight=0.5)}
CACHED_REVERSE: dict[str, Any] = DENSE | WEIGHED | {"loss.teacher": TeacherConfig(kind="topk", direction="reverse")}
GOLD: dict[str, Any] = DENSE | {"loss.teacher": TeacherConfig(kind="gold", weight=0.25)}
DEEP: dict[str, Any] = {  # the encoder, and all that reads, in later stages
    "model.retro": RetroConfig(num_neighbors=3, chunk_length=8, layers=[2, 3], encoder_conditioning="none", gate=0.5),
    "model.num_layers": 4,
    "model.add_bias_linear": True,
    "model.normalization": "layernorm",
    "model.layernorm_zero_centered_gamma": True,
    "model.activation": "gelu",
    "model.position_embedding": "learned_absolute",
}
# Each chunk of each stage has a layer; two in all otherwise.

# Number of processes, model, layout. What is left over of the processes is data parallel.
_NAMED: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp2": (2, DENSE, layout(tensor=2)),
    "tp2_sp": (2, DENSE, SP),
    "dp2": (2, DENSE, {}),
    "dp2_overlap": (2, DENSE, layout(overlap=True)),
    "cp2": (2, DENSE, layout(context=2)),
    "pp2": (2, DENSE, layout(pipeline=2)),
    "pp2_vpp2": (2, DENSE, layout(pipeline=2, virtual_pipeline=2)),
    "pp2_vpp4": (2, TIED, layout(pipeline=2, virtual_pipeline=4)),
    "moe_tp2_sp": (2, MOE, SP),
    "moe_ep2": (2, MOE, layout(expert=2)),
    "moe_ep2_overlap": (2, MOE, layout(expert=2, overlap=True)),
    "moe_dp2": (2, MOE, {}),
    "moe_pp2": (2, MOE, layout(pipeline=2)),
    "moe_cp2": (2, MOE, layout(context=2)),
    "moe_cp2_ep2": (2, MOE, layout(context=2, expert=2)),
    "moe_pp2_vpp2": (2, MOE, layout(pipeline=2, virtual_pipeline=2)),
    "moe_tp2_sp_ep2": (2, MOE, SP | layout(expert=2, expert_tensor=1)),
    "moe_etp2": (2, MOE, layout(expert_tensor=2)),
    "moe_tp2_sp_etp1": (2, MOE | {"model.moe_z_loss_coeff": 0.01}, SP | layout(expert_tensor=1)),
    "moe_cp2_etp2": (2, MOE | {"model.moe_z_loss_coeff": 0.01}, layout(context=2, expert_tensor=2)),
    "embedding_tp2_sp": (2, EMBEDDING, SP),
    "embedding_cp2": (2, EMBEDDING, layout(context=2)),
    "embedding_pp2_vpp2": (2, EMBEDDING, layout(pipeline=2, virtual_pipeline=2)),
    "embedding_moe_ep2": (2, MOE | {"training.objective": "embedding"}, layout(expert=2)),
    "generative_tp2_sp": (2, GENERATIVE, SP),
    "generative_cp2": (2, GENERATIVE, layout(context=2)),
    "generative_pp2_vpp2": (2, GENERATIVE, layout(pipeline=2, virtual_pipeline=2)),
    "generative_moe_ep2": (2, MOE | {"training.objective": "generative"}, layout(expert=2)),
    "weights_tp2_sp": (2, DENSE | WEIGHED, SP),
    "weights_retro_pp2": (2, RETRO | WEIGHED, layout(pipeline=2)),
    "means_tp2": (2, MEANS, layout(tensor=2)),
    "means_cp2": (2, MEANS, layout(context=2)),
    "means_pp2": (2, MEANS, layout(pipeline=2)),
    "means_dp2": (2, MEANS, {}),
    "noise_tp2_sp": (2, DENSE | NOISE, SP),
    "noise_cp2": (2, GENERATIVE | NOISE, layout(context=2)),
    "noise_retro_pp2": (2, DEEP | NOISE, layout(pipeline=2)),
    "noise_dp2": (2, GENERATIVE | NOISE | {"training.recompute": "full"}, {}),
    "sums_cp2": (2, SUMS, layout(context=2)),
    "teacher_tp2_sp": (2, TAUGHT, SP),
    "teacher_dp2": (2, TAUGHT, {}),
    "teacher_pp2_vpp2": (2, TAUGHT, layout(pipeline=2, virtual_pipeline=2)),
    "teacher_dp2_overlap": (2, KEPT_NEAR | {"training.recompute": "full"}, layout(overlap=True)),
    "teacher_tp2": (2, KEPT_NEAR, layout(tensor=2)),
    "teacher_pp2": (2, KEPT_NEAR, layout(pipeline=2)),
    "teacher_cp2": (2, KEPT_NEAR, layout(context=2)),
    "teacher_moe_ep2": (2, MOE | KEPT_NEAR, layout(expert=2)),
    "teacher_top_tp2": (2, CACHED, layout(tensor=2)),
    "teacher_top_dp2": (2, CACHED, {}),
    "teacher_top_tp2_sp": (2, CACHED_REVERSE, SP),
    "teacher_top_pp2": (2, CACHED_REVERSE, layout(pipeline=2)),
    "teacher_top_cp2": (2, CACHED_REVERSE, layout(context=2)),
    "teacher_gold_cp2": (2, GOLD, layout(context=2)),
    "retro_tp2": (2, RETRO, layout(tensor=2)),
    "retro_tp2_sp": (2, RETRO, SP),
    "retro_dp2": (2, RETRO, {}),
    "retro_dp2_overlap": (2, DEEP | TIED, layout(overlap=True)),
    "retro_pp2": (2, DEEP, layout(pipeline=2)),
    "retro_pp2_full": (2, RETRO | {"training.recompute": "full"}, layout(pipeline=2)),
    "retro_pp2_vpp2": (2, RETRO, layout(pipeline=2, virtual_pipeline=2)),
    "retro_cp2": (2, RETRO, layout(context=2)),
    "retro_cp2_full": (2, DEEP | {"training.recompute": "full"}, layout(context=2)),
    "retro_moe_ep2": (2, RETRO | MOE, layout(expert=2)),
    "retro_generative_tp2_sp": (2, DEEP | {"training.objective": "generative"}, SP),
    "retro_cp2_tp2_sp": (4, RETRO | TIED, SP | layout(context=2)),
    "retro_cp2_pp2": (4, DEEP, layout(context=2, pipeline=2)),
    "retro_pp4": (4, DEEP, layout(pipeline=4)),
    "retro_tp2_sp_pp2": (4, RETRO | {"training.recompute": "selective"}, SP | layout(pipeline=2)),
    "pp4": (4, DENSE, layout(pipeline=4)),
    "pp4_vpp2": (4, DENSE, layout(pipeline=4, virtual_pipeline=2)),
    "tied_pp4": (4, TIED, layout(pipeline=4)),
    "cp4": (4, DENSE, layout(context=4)),
    "tp4_sp": (4, DENSE, layout(tensor=4, sequence_parallel=True)),
    "cp2_tp2": (4, DENSE, layout(context=2, tensor=2)),
    "cp2_tp2_sp": (4, TIED, SP | layout(context=2)),
    "cp2_pp2": (4, DENSE, layout(context=2, pipeline=2)),
    "cp2_dp2": (4, DENSE, layout(context=2)),
    "pp2_vpp2_dp2": (4, DENSE, layout(pipeline=2, virtual_pipeline=2)),
    "pp2_dp2_overlap": (4, DENSE, layout(pipeline=2, overlap=True)),
    "moe_ep4": (4, MOE, layout(expert=4)),
    "moe_pp4_vpp2": (4, MOE, layout(pipeline=4, virtual_pipeline=2)),
    "moe_cp2_tp2_sp_ep2": (4, MOE, SP | layout(context=2, expert=2)),
    "moe_cp2_pp2_ep2": (4, MOE, layout(context=2, pipeline=2, expert=2)),
    "moe_etp2_ep2": (4, MOE, layout(expert=2, expert_tensor=2)),
    "embedding_pp4": (4, EMBEDDING, layout(pipeline=4)),
    "embedding_tp2_sp_dp2": (4, EMBEDDING, SP),
    "generative_pp4": (4, GENERATIVE, layout(pipeline=4)),
    "generative_cp2_tp2_sp": (4, GENERATIVE, SP | layout(context=2)),
    "tp2_sp_pp2_dp2": (8, DENSE, SP | layout(pipeline=2)),
    "tp2_sp_pp2_vpp2_cp2": (8, DENSE, SP | layout(pipeline=2, virtual_pipeline=2, context=2)),
    "pp4_vpp2_dp2": (8, DENSE, layout(pipeline=4, virtual_pipeline=2)),
    "pp4_cp2": (8, TIED, layout(pipeline=4, context=2)),
    "pp8": (8, DENSE, layout(pipeline=8)),
    "cp4_tp2_sp": (8, DENSE, SP | layout(context=4)),
    "moe_tp2_sp_pp2_ep2": (8, MOE, SP | layout(pipeline=2, expert=2)),
    "moe_cp2_tp2_sp_ep4": (8, MOE, SP | layout(context=2, expert=4, expert_tensor=1)),
    "moe_pp4_vpp2_cp2_ep2": (8, MOE, layout(pipeline=4, virtual_pipeline=2, context=2, expert=2)),
    "embedding_pp2_vpp2_cp2_dp2": (8, EMBEDDING, layout(pipeline=2, virtual_pipeline=2, context=2)),
    "generative_tp2_sp_pp2_cp2": (8, GENERATIVE, SP | layout(pipeline=2, context=2)),
}


def _named(processes: int, model: dict[str, Any], mesh: dict[str, Any]) -> Case:
    chunks = mesh.get("parallel.pipeline", 1) * mesh.get("parallel.virtual_pipeline", 1)
    return Case(processes=processes, settings={"model.num_layers": max(2, chunks)} | model | mesh)


NAMED: dict[str, Case] = {name: _named(*case) for name, case in _NAMED.items()}


def config_of(case: Case) -> RunConfig:
    """The run of a case."""
    config = tiny_config(
        hidden_size=32, ffn_hidden_size=64, num_attention_heads=8, num_query_groups=4, max_position_embeddings=256
    )
    config.data.tokenizer, config.data.embedding, config.data.generative = "tokenizer", ["texts"], ["sequences"]
    config.data.num_rows_multiple = len(case.row_lengths)
    # Adam divides a gradient by its own size: of one near zero it would blow up the rounding.
    config.optimizer.eps, config.optimizer.weight_decay = 1e-5, 0.1
    config.data.train_group_size = case.group_size
    for key, value in case.settings.items():
        section, name = key.split(".")
        assert hasattr(getattr(config, section), name), key
        setattr(getattr(config, section), name, value)
    return config


def make_rows(case: Case) -> list[PackedRow]:
    """The rows of the global batch, embedding rows first: uneven segments, some rows without padding, some with much.

    Texts have instructions, of which nothing is pooled, and some of them are equal. Labels are supervised in stretches,
    and a row may have none.
    """
    rng = random.Random(f"rows {case.seed}")
    objective = case.settings.get("training.objective", "unified")
    texts = list(range(case.num_queries * (1 + case.group_size)))
    rng.shuffle(texts)
    rows = []
    num_rows = len(case.row_lengths)
    if objective != "generative":
        cuts = sorted(rng.sample(range(1, len(texts)), num_rows - 1))
        shares = [texts[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(texts)], strict=True)]
        for number, (length, slots) in enumerate(zip(case.row_lengths, shares, strict=True)):
            row = make_row(RowKind.EMBEDDING, _lengths(rng, length, len(slots)), length, slots, seed=number)
            _leave_out_instructions(row, rng)
            rows.append(row)
    if objective != "embedding":
        for number, length in enumerate(case.row_lengths):
            row = make_row(RowKind.GENERATIVE, _lengths(rng, length, rng.randint(1, 5)), length, seed=100 + number)
            _supervise_answers(row, rng, nothing=number == 1 and rng.random() < 0.3)
            if case.settings.get("training.neftune_alpha"):
                row.noise_keys = [100 * number + segment for segment in range(len(row.record_ids))]
            if (weights := case.settings.get("loss.role_weights")) is not None:  # prompts alternate with answers
                assert row.loss_mask_1T is not None
                row.loss_mask_1T[0, ::3] *= weights.user
            if (retro := case.settings.get("model.retro")) is not None:
                # A row in which nothing is read, too, and one in which tokens of one context parallel rank read alone.
                missing = {1: 0.0, 2: 1.0}.get(number, 0.3)
                row = with_neighbors(row, retro.chunk_length, retro.num_neighbors, missing=missing, seed=number)
                if number == 1 and row.neighbors is not None:
                    row.neighbors.text_of_Ck[1:] = -1
            if (teacher := case.settings.get("loss.teacher")) is not None and teacher.kind == "topk":
                _draw_top(row, seed=number)
            rows.append(row)
    return rows


def _draw_top(row: PackedRow, seed: int, size: int = 5) -> None:
    """What a cache of a teacher says of a row, of tokens all over the vocabulary."""
    generator, length = torch.Generator().manual_seed(seed), row.tokens_1T.shape[1]
    row.teacher_ids_TK = torch.rand(length, VOCAB, generator=generator).argsort(1)[:, :size].int()
    row.teacher_log_probs_TK1 = (3 * torch.randn(length, size + 1, generator=generator)).log_softmax(1)
    row.teacher_ids_TK[row.cu_seqlens[1:].long() - 1] = -1  # nothing follows


def _lengths(rng: random.Random, row_length: int, count: int) -> list[int]:
    """Uneven lengths of at least two tokens that fill the row, or leave padding."""
    padding = rng.choice([0, rng.randint(1, 4), row_length // 3])
    spare = row_length - min(padding, row_length - 2 * count) - 2 * count
    cuts = sorted(rng.randint(0, spare) for _ in range(count - 1))
    return [2 + end - begin for begin, end in zip([0, *cuts], [*cuts, spare], strict=True)]


def _leave_out_instructions(row: PackedRow, rng: random.Random) -> None:
    assert row.pool_mask_T is not None and row.slots_S is not None
    bounds = row.cu_seqlens.tolist()
    for begin, end in zip(bounds[: len(row.slots_S)], bounds[1:], strict=False):
        instruction = rng.randint(0, min(4, end - begin - 1))
        row.pool_mask_T[begin : begin + instruction] = 0
        if rng.random() < 0.3:  # the same text as others of its length
            row.tokens_1T[0, begin + instruction : end] = torch.arange(end - begin - instruction) % 3


def _supervise_answers(row: PackedRow, rng: random.Random, nothing: bool) -> None:
    assert row.loss_mask_1T is not None
    bounds = row.cu_seqlens.tolist()
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        row.loss_mask_1T[0, begin : rng.randint(begin, max(begin, end - 2))] = 0
    if nothing:
        row.loss_mask_1T.zero_()


def batch_of(case: Case, rows: list[PackedRow], data_rank: int, data_size: int) -> StepBatch:
    """A data parallel rank's part of the global batch."""
    embedding, generative = ([row for row in rows if row.embeds is embeds] for embeds in (True, False))
    return grit_batch(
        embedding,
        generative,
        case.num_queries,
        case.group_size,
        data_rank=data_rank,
        data_size=data_size,
        microbatch_sequences=case.settings.get("loss.microbatch_sequences", 1),
    )


def draw_case(seed: int, index: int, processes: tuple[int, ...] = (1, 2, 4, 8)) -> Case:
    """Case ``index`` of a series: any layout, model and kind of training that config/checks/run.py lets through."""
    rng = random.Random(f"case {seed} {index}")
    while True:
        case = _draw(rng, rng.choice(processes))
        if not list(find_problems(config_of(case), case.processes, files=False)):
            return case


def _draw(rng: random.Random, processes: int) -> Case:
    sizes = {"tensor": 1, "pipeline": 1, "context": 1, "data": 1}
    rest = processes
    for factor in (2, 3, 5, 7):
        while rest % factor == 0:
            sizes[rng.choice(list(sizes))] *= factor
            rest //= factor
    data = sizes.pop("data")
    experts = rng.choice([None, None, 4, 8])
    mesh: dict[str, Any] = dict(sizes)
    mesh["sequence_parallel"] = sizes["tensor"] > 1 and (experts is not None or rng.random() < 0.7)
    if sizes["pipeline"] > 1:
        mesh["virtual_pipeline"] = rng.choice([None, 2, 2, 4 if sizes["pipeline"] == 2 else 2])
    if experts is not None:
        mesh["expert"] = rng.choice([size for size in (1, 2, 4, 8) if processes // sizes["pipeline"] % size == 0])
        mesh["expert_tensor"] = rng.choice([None, 1, 2])
    mesh["overlap"] = rng.random() < 0.2
    chunks = sizes["pipeline"] * (mesh.get("virtual_pipeline") or 1)
    rows_of_a_rank = rng.choice([1, 1, 2, 2, 3, 5])
    multiple = 8 * sizes["tensor"] * sizes["context"]  # ParallelContext.row_multiple
    shortest = max(1, 48 // multiple)
    lengths = [multiple * rng.choice([shortest, shortest, shortest + 1]) for _ in range(rows_of_a_rank * data)]
    if sizes["pipeline"] > 1:  # stages expect rows of one length
        lengths = [max(lengths)] * len(lengths)
    group_size = rng.choice([1, 2, 3])
    fewest = -(-len(lengths) // (1 + group_size))  # a text for each row
    most = (16 + len(lengths) - 1) // (1 + group_size)  # and at most 16 in one
    settings = _draw_model(rng, experts, chunks * rng.choice([1, 1, 2]) if chunks < 8 else chunks, sizes["tensor"])
    settings |= layout(**mesh) | _draw_training(rng, rows_of_a_rank)
    return Case(
        processes=processes,
        settings=settings,
        row_lengths=tuple(lengths),
        num_queries=max(3, fewest, min(most, rng.randint(2, 8))),
        group_size=group_size,
        seed=rng.randrange(1 << 30),
    )


def _draw_model(rng: random.Random, experts: int | None, num_layers: int, tensor: int) -> dict[str, Any]:
    heads = rng.choice([4, 8, 12] if tensor % 3 else [6, 12])
    settings = {
        "num_layers": num_layers,
        "hidden_size": 48 if heads % 3 == 0 else 32,
        "ffn_hidden_size": rng.choice([48, 96]),
        "num_attention_heads": heads,
        "num_query_groups": rng.choice([size for size in range(1, heads + 1) if heads % size == 0]),
        "kv_channels": rng.choice([None, None, 8]),
        "normalization": rng.choice(["rmsnorm", "rmsnorm", "layernorm"]),
        "activation": rng.choice(["swiglu", "swiglu", "gelu"]),
        "position_embedding": rng.choice(["rope", "rope", "rope", "learned_absolute", "none"]),
        "rotary_percent": rng.choice([1.0, 1.0, 0.5]),
        "add_bias_linear": experts is None and rng.random() < 0.3,
        "add_qkv_bias": rng.random() < 0.3,
        "tie_embeddings": rng.random() < 0.4,
        "sliding_window": rng.choice([None, None, 6]),
        "num_experts": experts,
    }
    if experts is not None:
        settings |= {
            "moe_top_k": rng.choice([1, 2, 2, 3]),
            "moe_aux_loss_coeff": rng.choice([0.0, 0.01, 0.01]),
            "moe_z_loss_coeff": rng.choice([0.0, 0.0, 0.001]),
        }
    return {f"model.{name}": value for name, value in settings.items()}


def _draw_training(rng: random.Random, rows_of_a_rank: int) -> dict[str, Any]:
    hard, normalize = rng.random() < 0.2, rng.random() < 0.85
    return {
        "training.objective": rng.choice(["unified", "unified", "embedding", "generative"]),
        "training.recompute": rng.choice(["none", "none", "selective", "full"]),
        "training.grad_cache": rng.choice(["auto", "on", "off" if rows_of_a_rank == 1 else "auto"]),
        "embedding.pooling": rng.choice(["mean", "mean", "weightedmean", "cls", "lasttoken"]),
        "embedding.projection_dim": rng.choice([None, None, 12, 20]),
        "embedding.normalize": normalize,
        "embedding.causal": rng.random() < 0.2,
        # Logits that fp32 has six decimals of: products of vectors that are not normalised are of the order of 30.
        "loss.temperature": rng.choice([0.2, 0.5]) if normalize else 20.0,
        "loss.negatives": "hard" if hard else "batch",
        "loss.symmetric": not hard and rng.random() < 0.3,
        "loss.same_side_negatives": not hard and rng.random() < 0.3,
        "loss.mask_equal_texts": rng.random() < 0.4,
        "loss.false_negative_margin": rng.choice([None, None, 0.05, 0.3]),
        "loss.matryoshka_dims": rng.choice([[], [], [8], [4, 12]]),
        "loss.loss_emb_factor": rng.choice([1.0, 1.0, 0.5]),
        "loss.loss_gen_factor": rng.choice([1.0, 1.0, 2.0]),
        "loss.loss_gen_type": rng.choice(["token", "token", "mixed", "sequence"]),
    } | ({"loss.emb_grad_scale": "grit", "loss.grit_world_size": 4} if rng.random() < 0.15 else {})
