"""Every knob of a run, declared once.

The string under a field is its documentation, its ``--help`` and its entry in docs/configuration.md. YAML
files and command-line overrides are read into these classes by :mod:`megatron_grit.config.parse`;
checks that involve more than one section are in :mod:`megatron_grit.config.checks`. Nothing here imports
torch, so a configuration can be resolved on a login node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(kw_only=True)
class ModelConfig:
    """Shape of the decoder. The defaults are Mistral-7B's."""

    architecture: str | None = None
    """Architecture of transformers that exports are written as, such as LlamaForCausalLM. Converting sets it. null:
    the first that has such a shape."""
    pretrained: str | None = None
    """Directory of a Hugging Face model to start from, or its name on the hub, organisation/name or
    organisation/name@revision. Its config.json fills the keys of this section, data.tokenizer is its own where none is
    given, and each rank reads its part of the weights. A larger vocab_size adds tokens. null: random weights, or those
    of checkpoint.load."""
    num_layers: int = 32
    """Transformer layers."""
    hidden_size: int = 4096
    """Width of the residual stream."""
    ffn_hidden_size: int = 14336
    """Width of the feed-forward layer (of each expert in a mixture, unless moe_ffn_hidden_size is set)."""
    num_attention_heads: int = 32
    """Query heads."""
    num_query_groups: int | None = 8
    """Key-value heads (grouped-query attention). null: one for each query head."""
    kv_channels: int | None = None
    """Channels of one head. null: hidden_size / num_attention_heads."""
    vocab_size: int | None = None
    """Rows of the embedding before padding. null: the tokenizer's size."""
    vocab_multiple: int = 64
    """The embedding is padded to a multiple of this x tensor parallel size; the extra rows are never predicted."""
    max_position_embeddings: int = 32768
    """Longest segment that the model may see."""
    normalization: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before attention, before the feed-forward layer and at the end."""
    norm_epsilon: float = 1e-5
    """Added to the variance."""
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    """Feed-forward activation; gelu_tanh is GPT-2's approximation of gelu."""
    parallel_residual: Literal["none", "two_norms", "one_norm"] = "none"
    """Attention and feed-forward layer side by side, x + attention(norm(x)) + feed_forward(norm(x)): with a norm each
    (GPT-NeoX) or one for both (GPT-J). none: one after the other."""
    position_embedding: Literal["rope", "learned_absolute", "none"] = "rope"
    """How positions enter. Positions restart in each packed segment."""
    rotary_base: float = 10000.0
    """Base period of RoPE."""
    rotary_percent: float = 1.0
    """Share of a head's channels that RoPE turns."""
    rotary_interleaved: bool = False
    """RoPE turns neighbouring channels (GPT-J). false: each channel of a half with its counterpart in the other."""
    rope_type: Literal["default", "linear", "llama3", "yarn"] = "default"
    """How RoPE is stretched beyond the length of pretraining, as in transformers' rope_parameters."""
    rope_factor: float = 1.0
    """By how much it is stretched."""
    rope_original_length: int | None = None
    """Length of pretraining, original_max_position_embeddings. For llama3 and yarn."""
    rope_low_freq_factor: float = 1.0
    """llama3: periods above rope_original_length / this are stretched."""
    rope_high_freq_factor: float = 4.0
    """llama3: periods below rope_original_length / this are not."""
    rope_beta_fast: float = 32.0
    """yarn: channels that turn more often than this over rope_original_length are not stretched."""
    rope_beta_slow: float = 1.0
    """yarn: channels that turn less often than this are stretched whole."""
    rope_attention_factor: float | None = None
    """yarn: queries and keys are multiplied by this. null: 0.1 ln(rope_factor) + 1."""
    add_bias_linear: bool = False
    """Biases in all linear layers of attention and feed-forward layers."""
    add_qkv_bias: bool = False
    """Biases in the query-key-value projection."""
    add_attention_output_bias: bool = False
    """Biases in the output projection of attention."""
    add_mlp_bias: bool = False
    """Biases in the feed-forward layers."""
    add_output_bias: bool = False
    """A bias for each token of the vocabulary in the output layer (GPT-J)."""
    qk_norm: bool = False
    """Normalise the channels of each query and key head before RoPE (Qwen3)."""
    attention_scale: float | None = None
    """Multiplies the products of queries and keys. null: 1 / sqrt(kv_channels). GPT-Neo: 1."""
    tie_embeddings: bool = False
    """Use the input embedding as the output layer."""
    sliding_window: int | None = None
    """Causal attention sees this many positions back, its own included. The bidirectional pass has no window."""
    window_layers: list[int] | None = None
    """Layers, from 0, that the sliding window is for. null: all."""
    num_experts: int | None = None
    """Experts of a mixture layer. null: a dense model."""
    moe_top_k: int = 2
    """Experts that each token visits."""
    moe_normalize_top_k: bool = True
    """The weights of the visited experts add up to 1. false, and with moe_top_k 1: they are the router's probabilities
    over all experts."""
    moe_ffn_hidden_size: int | None = None
    """Width of each expert. null: ffn_hidden_size."""
    moe_shared_ffn_hidden_size: int | None = None
    """Width of an expert that every token visits besides (Qwen2-MoE). null: none."""
    moe_shared_expert_gate: bool = False
    """Weigh the shared expert by a sigmoid of the token."""
    moe_dense_layers: list[int] | None = None
    """Layers, from 0, with one feed-forward layer of ffn_hidden_size in place of experts. null: none."""
    moe_aux_loss_coeff: float = 0.0
    """Weight of the load-balancing loss, counted on embedding and generative micro-batches."""
    moe_z_loss_coeff: float = 0.0
    """Weight of the router z-loss."""
    hidden_dropout: float = 0.0
    """Dropout after attention and feed-forward layers."""
    attention_dropout: float = 0.0
    """Dropout on attention probabilities."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    attention_backend: Literal["auto", "sdpa", "varlen", "te"] = "auto"
    """Core attention: torch SDPA (any device), torch variable-length flash attention (CUDA), TransformerEngine
    (CUDA). auto: te where it is installed, else varlen, on CUDA; sdpa on CPU."""


@dataclass(kw_only=True)
class EmbeddingConfig:
    """How token states become one embedding."""

    pooling: Literal["mean", "weightedmean", "weightedmean_sgpt", "learnedmean", "max", "cls", "lasttoken"] = "mean"
    """Which states of the text are averaged; the instruction is attended and never pooled. weightedmean: weights 1, 2,
    3 ... over the text (GRIT). weightedmean_sgpt: each state's position in its segment, instruction counted (SGPT).
    learnedmean: a trained weight for each position in the segment, 1 at first. max: of each channel."""
    projection_dim: int | None = None
    """Width of the embedding: outputs of the last linear layer. null: hidden_size."""
    num_linear_layers: int | None = None
    """Linear layers on top of the decoder, hidden_size wide but for the last one's outputs. null: one where
    projection_dim is set, else none."""
    linear_place: Literal["before_pooling", "after_pooling"] = "before_pooling"
    """Whether they are applied to each token state or to the pooled vector."""
    linear_activation: Literal["none", "gelu", "tanh"] = "none"
    """After each of them, the last one included."""
    linear_bias: bool = True
    """They have biases."""
    asymmetric: Literal["none", "heads"] = "none"
    """heads: queries and passages go through linear layers of their own, which start out equal; the decoder is
    shared."""
    brackets: Literal["none", "specb", "speca"] = "none"
    """Tokens around each text, put in as ids, attended and pooled. specb: the vocabulary's [ ] around queries and { }
    around passages. speca: four new tokens, which are trained; model.vocab_size must have room for them."""
    side_tokens: bool = False
    """Put a new token in front of each query ([QRY]) and passage ([DOC]); model.vocab_size must have room for two."""
    normalize: bool = True
    """L2-normalise the pooled vector."""
    causal: bool = False
    """Embed with causal attention (GritLM's cccc). false: bidirectional (bbcc)."""


@dataclass(kw_only=True)
class AdapterConfig:
    """Low-rank adapters beside frozen linear layers. Checkpoints then hold what is trained, and name the base."""

    kind: Literal["none", "lora", "dora"] = "none"
    """lora: arXiv 2106.09685. dora: with a trained length for each row of the adapted weights, arXiv 2402.09353."""
    rank: int = 16
    """Rank of each adapter."""
    alpha: float = 32
    """Adapters are multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout on an adapter's input."""
    targets: list[str] | None = None
    """Projections with an adapter, of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj, in attention,
    feed-forward layers and experts. null: all that the model has."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    quantize: Literal["none", "nf4"] = "none"
    """Hold the adapted layers' frozen weights in 4 bits (QLoRA, arXiv 2305.14314)."""
    double_quantize: bool = True
    """With quantize, hold the scales of blocks in 8 bits."""
    load: str | None = None
    """Adapters to start from: a checkpoint of a run with adapters, or its output_dir. null: fresh ones."""


@dataclass(kw_only=True)
class ParallelConfig:
    """The mesh. Data parallel size = processes / (tensor x pipeline x context)."""

    tensor: int = 1
    """Tensor parallel size."""
    sequence_parallel: bool = False
    """Shard activations along the sequence between tensor parallel layers."""
    pipeline: int = 1
    """Pipeline stages."""
    virtual_pipeline: int | None = None
    """Chunks of layers that each stage holds (interleaved schedule): stages wait less and exchange more. null: one. A
    step needs at least as many rows on each data parallel rank as there are stages."""
    context: int = 1
    """Context parallel size: processes that hold a part of each row's tokens. They gather keys and values."""
    expert: int = 1
    """Expert parallel size; divides the processes of a pipeline stage by expert_tensor."""
    expert_tensor: int | None = None
    """Tensor parallel size of the experts. null: that of the rest."""
    overlap: bool = False
    """Reduce gradients while the last row's backward pass goes on, and gather updated weights while the next forward
    pass goes on. false: both in one piece at the end of a step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA with NCCL where there is a GPU, else CPU with gloo."""
    timeout_minutes: float = 10.0
    """A collective that waits longer than this ends the job."""


@dataclass(kw_only=True)
class DataConfig:
    """What is read and how it is packed."""

    tokenizer: str | None = None
    """SentencePiece .model file, tokenizer.json, or a directory that holds one."""
    embedding: list[str] = field(default_factory=list)
    """Indexed files with queries and passages (tools/preprocess/build_grit.py): prefixes, each a source of its own; or
    weights and prefixes in turn, "0.7 a 0.3 b"; or a .yaml file, a list of path with weight or epochs, and cap
    (docs/data_formats.md). A batch comes from one source. Without weights a source comes up in proportion to its size.
    """
    generative: list[str] = field(default_factory=list)
    """Indexed files with texts or conversations, likewise. A batch mixes all sources."""
    retro_project: str | None = None
    """Directory of a retrieval database (tools/retro/build_db.py): the run trains on the documents that get neighbors
    there, with their tokenizer. generative, where it is given, takes the place of these documents."""
    embedding_temperature: float = 1.0
    """An embedding source comes up in proportion to its weight ** (1 / embedding_temperature). Above 1 small sources
    come up more often."""
    allow_shared_texts: bool = False
    """Let records with the same query or positive stand in one batch, as negatives of each other. false: they are kept
    apart, and what cannot be placed is left out of that epoch."""
    packing: Literal["step", "window"] = "step"
    """step: the generative_batch_size sequences of a step are packed into as few, nearly equal rows as hold them.
    window: a step has generative_rows rows of exactly tokens_per_row tokens, filled from the stream of sequences."""
    packing_window: int = 1024
    """Sequences that are packed together with packing window."""
    over_long: Literal["stop", "drop", "truncate", "split"] = "stop"
    """Generative records above tokens_per_row or max_position_embeddings: end the run, leave them out, cut off their
    end, or split them into pieces that overlap by one token, so that each label is trained once. A piece counts as a
    sequence; one without labels is left out."""
    over_long_texts: Literal["stop", "truncate"] = "stop"
    """Queries and passages above tokens_per_row or max_position_embeddings: end the run, or cut off their end."""
    cache_dir: str | None = None
    """Folder for what is computed once from the data: rows of packing window, shared texts of large sources. null:
    output_dir/cache."""
    checksum: bool = False
    """Read every indexed file at the start and compare it with its checksums."""
    tokens_per_row: int = 2048
    """Token budget of one packed row, which is one micro-batch."""
    train_group_size: int = 2
    """Passages of a query: one positive and train_group_size - 1 negatives."""
    num_rows_multiple: int | None = None
    """Rows of a step are rounded up to a multiple of this. null: the data parallel size. Set it to a multiple of
    every data parallel size in use to keep rows, and so the expert balancing loss, the same on all of them."""
    prefetch_steps: int = 2
    """Steps that are packed ahead of time in a background thread."""


@dataclass(kw_only=True)
class LossConfig:
    """The two losses and how they are weighed."""

    temperature: float = 0.02
    """Divides the similarities in the contrastive loss: 1 / the scale of sentence-transformers' ranking losses."""
    symmetric: bool = False
    """Also find the query of each positive among all queries; the loss is the mean of both directions."""
    negatives: Literal["batch", "hard"] = "batch"
    """batch: every passage of the global batch. hard: only the train_group_size - 1 of the query's own record."""
    num_blocks: int = 1
    """The global batch is cut into so many blocks of consecutive queries, and negatives come from the query's own
    block. For GritLM without --negatives_cross_device: its GPUs x gradient accumulation steps. 1: all of the batch."""
    same_side_negatives: bool = False
    """Other queries are negatives of a query too."""
    mask_equal_texts: bool = False
    """Leave out negatives whose text, instruction aside, is that of the positive or of the query itself."""
    false_negative_margin: float | None = None
    """Leave out negatives that are more similar to the query than its positive is by more than this. Cosines are
    compared where embedding.normalize is set. null: none are."""
    matryoshka_dims: list[int] = field(default_factory=list)
    """Also train the first so many channels of the embedding, normalised anew."""
    gradient_sides: Literal["both", "queries", "passages"] = "both"
    """queries or passages: the embeddings of the other side count as constants (GritLM's emb_q_only, emb_p_only)."""
    loss_emb_factor: float = 1.0
    """Weight of the contrastive loss."""
    loss_gen_factor: float = 1.0
    """Weight of the next-token loss."""
    loss_gen_type: Literal["token", "mixed", "sequence"] = "token"
    """token: mean over the supervised tokens of the global batch. mixed: mean over rows of each row's mean (GritLM's
    mixed). sequence: sum over tokens divided by the number of sequences (GritLM's token)."""
    emb_grad_scale: Literal["exact", "grit"] = "exact"
    """exact: the gradient of the global contrastive loss. grit: divided by grit_world_size, as data parallel averaging
    did in GritLM; use it to reproduce its published ratio of the two losses."""
    grit_world_size: int | None = None
    """Number of GPUs whose ratio emb_grad_scale=grit reproduces. null: the data parallel size."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW, its schedule and clipping. Its states and fp32 main weights are sharded over data parallel ranks."""

    lr: float = 2e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after warm-up."""
    warmup_ratio: float = 0.03
    """Share of the steps over which the rate rises from 0."""
    warmup_steps: int | None = None
    """Overrides warmup_ratio."""
    weight_decay: float = 0.0
    """Decoupled weight decay; biases and norms have none."""
    beta1: float = 0.9
    """Adam's first decay."""
    beta2: float = 0.999
    """Adam's second decay."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm. 0: no clipping."""


@dataclass(kw_only=True)
class TrainingConfig:
    """The loop."""

    objective: Literal["unified", "embedding", "generative"] = "unified"
    """Which losses are trained."""
    steps: int = 1253
    """Optimizer steps."""
    embedding_batch_size: int = 2048
    """Queries of a global batch; every passage of it is a candidate for each of them."""
    generative_batch_size: int = 256
    """Sequences of a global batch, with data.packing step."""
    generative_rows: int | None = None
    """Generative rows of a global batch, with data.packing window."""
    grad_cache: Literal["auto", "on", "off"] = "auto"
    """Embed the batch twice so that the contrastive loss sees all of it in the memory of one row. auto: on when a rank
    has more than one embedding row. off needs a row that holds a rank's share of the batch."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Compute precision. bf16 keeps fp32 main weights, fp32 gradients and fp32 pooling."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recompute: none, core attention, or whole layers."""
    seed: int = 42
    """Seed of the initial weights, the data order and dropout."""
    trainable: list[str] = field(default_factory=list)
    """Train these parameters, adapters and the embedding head, and freeze all others: patterns of names such as
    decoder.layers.0.* with layers and experts by their number in the whole model, or biases (BitFit), norms,
    embeddings, head. Empty: all parameters, and with adapters these alone."""
    frozen: list[str] = field(default_factory=list)
    """Freeze these of the trained parameters; likewise."""
    on_nan: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: end the run, or leave the step out, note it in output_dir/skipped.jsonl
    and go on with the next batch. Either way weights and optimizer stay as before the step."""
    max_skipped_steps: int = 5
    """With on_nan skip, so many steps in a row that are not finite end the run."""
    audit: Literal["on", "off"] = "on"
    """Before the first step, prove on this run's model and data that no token sees another segment, padding, or the
    future in a causal pass, that the bidirectional pass sees all of a text, that pooling and labels follow the roles,
    that ranks with the same weights hold the same, and that weights are finite (docs/audit.md)."""
    max_minutes: float | None = None
    """Save and end after the step during which so many minutes have passed since the start; the same command goes on.
    null: no limit."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """Saving and loading."""

    load: str | None = None
    """Checkpoint to start from: weights only, optimizer and step start afresh. One of ours, the output_dir of a run, or
    what Megatron-LM wrote with --ckpt-format torch_dist."""
    resume: bool = True
    """Go on from the newest checkpoint under output_dir, if there is one."""
    same_data: bool = True
    """Refuse to go on where the next step's records are not those that the checkpoint announced: data files, blend,
    batch sizes or seed are others. false: they were changed on purpose."""
    save_interval: int = 500
    """Steps between checkpoints; one is always written at the end. 0: none but the last."""
    keep: int = 2
    """Newest checkpoints that are kept. 0: all."""
    asynchronous: bool = True
    """Train on while a checkpoint is written; training waits only for a copy of the state, which takes as much of the
    host's memory as the checkpoint does on disk. The last checkpoint of a run is always waited for. false: write, then
    train on."""


@dataclass(kw_only=True)
class LoggingConfig:
    """What is written about a run, besides metrics.jsonl."""

    interval: int = 1
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = False
    """Write TensorBoard events under output_dir/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project. null: off. Needs the wandb package."""
    progress: bool = True
    """Progress bar on rank 0."""


@dataclass(kw_only=True)
class RunConfig:
    """A training run."""

    output_dir: str = "runs/grit"
    """Checkpoints, metrics.jsonl and the resolved config.yaml are written here."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the decoder."""
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    """Pooling."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Adapters."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The mesh."""
    data: DataConfig = field(default_factory=DataConfig)
    """Input and packing."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Losses."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The loop."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and loading."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Metrics."""
