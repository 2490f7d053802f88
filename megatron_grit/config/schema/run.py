"""A training run: its sections."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_grit.config.knob import knob
from megatron_grit.config.schema.adapter import AdapterConfig
from megatron_grit.config.schema.checkpoint import CheckpointConfig
from megatron_grit.config.schema.data import DataConfig
from megatron_grit.config.schema.embedding import EmbeddingConfig
from megatron_grit.config.schema.evaluation import EvaluationConfig
from megatron_grit.config.schema.logging import LoggingConfig
from megatron_grit.config.schema.loss import LossConfig
from megatron_grit.config.schema.model import ModelConfig
from megatron_grit.config.schema.optimizer import OptimizerConfig
from megatron_grit.config.schema.parallel import ParallelConfig
from megatron_grit.config.schema.training import TrainingConfig


@dataclass(kw_only=True)
class RunConfig:
    """A training run."""

    output_dir: str = knob("runs/grit", path=True)
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
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Evaluations inside the run."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and loading."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Metrics."""
