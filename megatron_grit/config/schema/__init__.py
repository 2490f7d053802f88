"""Every knob of a run, declared once.

The string under a field is its documentation, its ``--help`` and its entry in docs/configuration.md. YAML
files and command-line overrides are read into these classes by :mod:`megatron_grit.config.parse`;
checks that involve more than one section are in :mod:`megatron_grit.config.checks.run`. Nothing here imports
torch, so a configuration can be resolved on a login node.
"""

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
from megatron_grit.config.schema.run import RunConfig
from megatron_grit.config.schema.training import TrainingConfig

__all__ = [
    "AdapterConfig",
    "CheckpointConfig",
    "DataConfig",
    "EmbeddingConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainingConfig",
]
