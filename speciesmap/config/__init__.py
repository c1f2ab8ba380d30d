"""Training configurations: their keys, and how they are read."""

from speciesmap.config.reading import load_config, shipped_config
from speciesmap.config.sections import (
    STAGES,
    AnyConfig,
    ClassifyConfig,
    ContrastiveConfig,
    CrossViewConfig,
    DataConfig,
    FinetuneConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    SplitsConfig,
    TrainerConfig,
    ValidationConfig,
    ViewsConfig,
)

__all__ = [
    "STAGES",
    "AnyConfig",
    "ClassifyConfig",
    "ContrastiveConfig",
    "CrossViewConfig",
    "DataConfig",
    "FinetuneConfig",
    "HeadConfig",
    "ModelConfig",
    "OptimConfig",
    "PretrainConfig",
    "SplitsConfig",
    "TrainerConfig",
    "ValidationConfig",
    "ViewsConfig",
    "load_config",
    "shipped_config",
]
