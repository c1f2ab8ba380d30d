"""Training and evaluation."""

import warnings

from speciesmap.models import torchvision_guard  # noqa: F401  (before lightning)

warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # lightning 2.6 beside torch 2.13
