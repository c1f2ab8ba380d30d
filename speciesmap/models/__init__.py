"""Neural networks of the joint space; losses are functions of tensors and know no config."""

from speciesmap.models import torchvision_guard  # noqa: F401  (before timm and open_clip)
from speciesmap.models.checkpoint import load_model, read_facts, save_model
from speciesmap.models.crisp import Architecture, SpeciesModel

__all__ = ["Architecture", "SpeciesModel", "load_model", "read_facts", "save_model"]
