"""Training and evaluation."""

from speciesmap.models import torchvision_guard  # noqa: F401  (before lightning)
