"""Training: from a configuration to a checkpoint that knows how far it can be trusted."""

import warnings

from speciesmap.models import torchvision_guard  # noqa: F401  (before lightning)

warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # lightning 2.6 beside torch 2.13
