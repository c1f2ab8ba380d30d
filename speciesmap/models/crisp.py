"""The joint space of CRISP: aerial windows, ground photos and names in one place.

Contrastive ground-level image and remote sensing pre-training (Huynh et al. 2024), with a third,
text tower on lineage prompts after BioCLIP (Stevens et al. 2024).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from speciesmap.errors import ModelError
from speciesmap.models.crossview import PairMatcher
from speciesmap.models.encoders import ImageTower
from speciesmap.models.environment import Environment
from speciesmap.models.factored import FactoredTower
from speciesmap.models.heads import TaxonHead
from speciesmap.models.metadata import MetadataEncoder
from speciesmap.models.text import HubTextTower, TextTower
from speciesmap.models.trust import Trust
from speciesmap.rasters.values import Values
from speciesmap.taxa import Taxon

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
START_LOG_SCALE = math.log(
    1 / 0.07
)  # CLIP (Radford et al. 2021, section 2.5) and CRISP's prototype
MAX_LOGIT_SCALE = 100.0


@dataclass(frozen=True)
class Architecture:
    """What is needed to build a `SpeciesModel` before its weights are read.

    Attributes:
        dim: Size of the joint space.
        bands: Names of the aerial bands, in order.
        window_px: Side of the aerial window.
        resolution_m: Side of a pixel of the imagery trained on, in metres.
        mean: Of each band, in raw pixel units.
        std: Of each band, in raw pixel units.
        aerial: `backbone` and `kwargs` of the aerial `ImageTower`; with `factored`, the further
            arguments of a `FactoredTower`, it is one.
        ground: `backbone`, `kwargs` and `image_px` of the ground tower, if there is one.
        text: `width`, `layers` and `heads` of the text tower, or `hub`, if there is one.
        metadata: `dropout` of the layers for place and date, if there are any.
        matcher: Whether the towers share one transformer that also scores pairs (CVM-MAE).
    """

    dim: int
    bands: tuple[str, ...]
    window_px: int
    resolution_m: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    aerial: dict[str, Any]
    ground: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    matcher: bool = False


class SpeciesModel(nn.Module):
    """Towers into one joint space, and learned embeddings of taxa in it.

    Args:
        architecture: What to build.
        taxa: Taxa with a learned embedding; none before fine-tuning.
        prevalence: Share of places where a taxon is present that its calibration was made
            against, by name; a taxon left out is uncalibrated.
        references: How many windows of the training landscape `reference` holds.
        pretrained: Names of the towers, `aerial` or `ground`, that start from timm's weights.
        environment: Covariates that the heads read beside embeddings, if any.

    Attributes:
        head: Learned embeddings of `taxa`.
        reference: Unit embeddings of random windows of the training landscape, shape (R, D): the
            yardstick of queries that were not trained.
        trust: How far maps of `taxa` can be trusted, where that was measured.
        values: Histograms of the pixels trained on, where they were measured.
        names: What the text tower learned to read; empty of a hub's tower, which reads any
            language, and where it is not known.
    """

    reference: Tensor

    def __init__(
        self,
        architecture: Architecture,
        taxa: Sequence[Taxon] = (),
        prevalence: dict[str, float] | None = None,
        references: int = 0,
        pretrained: Collection[str] = (),
        environment: Environment | None = None,
    ) -> None:
        super().__init__()
        self.architecture = a = architecture
        self.taxa = tuple(taxa)
        self.prevalence = dict(prevalence or {})
        tower = FactoredTower if a.aerial.get("factored") else ImageTower
        self.aerial: FactoredTower | ImageTower = tower(
            image_px=a.window_px,
            mean=a.mean,
            std=a.std,
            dim=a.dim,
            pretrained="aerial" in pretrained,
            **{name: value for name, value in a.aerial.items() if name != "factored"},
            **a.aerial.get("factored", {}),
        )
        self.ground = (
            ImageTower(
                mean=IMAGENET_MEAN,
                std=IMAGENET_STD,
                dim=a.dim,
                pretrained="ground" in pretrained,
                **a.ground,
            )
            if a.ground
            else None
        )
        self.text: nn.Module | None = None
        if a.text:
            hub = a.text.get("hub")
            self.text = HubTextTower(a.dim, hub) if hub else TextTower(a.dim, **a.text)
        self.metadata = MetadataEncoder(a.dim, **a.metadata) if a.metadata else None
        self.matcher: PairMatcher | None = None
        if a.matcher:
            if self.ground is None or not isinstance(self.aerial, ImageTower):
                raise ModelError(
                    "one transformer that scores pairs needs a ground tower and an aerial tower "
                    "that is not factored"
                )
            self.matcher = PairMatcher(self.aerial, self.ground, a.metadata)
        self.environment = environment
        beside = environment.expansion.width if environment else 0
        self.head = TaxonHead(len(self.taxa), a.dim, beside=beside)
        self.trust: Trust | None = None
        self.values: Values | None = None
        self.names: tuple[str, ...] = ()
        self.log_scale = nn.Parameter(torch.tensor(START_LOG_SCALE))
        self.register_buffer("reference", torch.zeros(references, a.dim))

    @property
    def bands(self) -> tuple[str, ...]:
        """Names of the aerial bands, in order."""
        return self.architecture.bands

    @property
    def window_px(self) -> int:
        """Side of the aerial window in pixels."""
        return self.architecture.window_px

    @property
    def resolution_m(self) -> float:
        """Side of a pixel of the imagery trained on, in metres."""
        return self.architecture.resolution_m

    @property
    def dim(self) -> int:
        """Size of the joint space."""
        return self.architecture.dim

    @property
    def fill(self) -> tuple[float, ...]:
        """What stands in for an invalid pixel, per band in raw units: the training mean."""
        return self.architecture.mean

    @property
    def factored(self) -> FactoredTower | None:
        """The aerial tower, if it is one that can share work between windows."""
        return self.aerial if isinstance(self.aerial, FactoredTower) else None

    @property
    def logit_scale(self) -> Tensor:
        """Positive multiplier of the cosine in contrastive losses, at most 100."""
        return self.log_scale.exp().clamp(max=MAX_LOGIT_SCALE)

    @property
    def joined(self) -> bool:
        """Whether a contrastive loss has brought the views together: no other moves its scale."""
        return not torch.equal(self.log_scale.detach().cpu(), torch.tensor(START_LOG_SCALE))

    @property
    def dated(self) -> bool:
        """Whether a loss has moved what a date adds to an embedding, which starts as nothing."""
        return self.metadata is not None and bool(self.metadata.date.weight.any())

    @property
    def fingerprint(self) -> str:
        """Hash of all that an aerial embedding depends on; new taxa leave it as it is."""
        digest = hashlib.sha256(
            json.dumps(asdict(self.architecture), sort_keys=True, default=list).encode()
        )
        for name, tensor in sorted(self.aerial.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def encode_aerial(self, windows: Tensor, metadata: Tensor | None = None) -> Tensor:
        """Embed aerial windows.

        Args:
            windows: Raw pixel values of any number type, shape (N, B, P, P).
            metadata: Where and when, columns as in `metadata.FIELDS`, shape (N, 4).

        Returns:
            Unit embeddings, float32, shape (N, D).

        Raises:
            ModelError: Metadata are given and the model has no layers for them.
        """
        embedded = F.normalize(self.aerial(windows).float(), dim=1)  # (N, D)
        return embedded if metadata is None else self.add_metadata(embedded, metadata)

    def add_metadata(self, embedded: Tensor, metadata: Tensor) -> Tensor:
        """Move aerial embeddings to where and when they are asked for.

        The vector is added to the unit embedding, so stored embeddings need no second encoding.

        Args:
            embedded: Unit embeddings without metadata, shape (N, D).
            metadata: Columns as in `metadata.FIELDS`, shape (N, 4).

        Returns:
            Unit embeddings, float32, shape (N, D).

        Raises:
            ModelError: The model has no layers for metadata.
        """
        if self.metadata is None:
            raise ModelError(
                "this model was trained without metadata, so places and dates mean nothing to it; "
                "train one with model.metadata"
            )
        return F.normalize(embedded.float() + self.metadata(metadata).float(), dim=1)  # (N, D)

    def match(self, photos: Tensor, windows: Tensor, metadata: Tensor | None = None) -> Tensor:
        """Score whether photos and windows show one place, pair by pair.

        Args:
            photos: Raw RGB values, shape (N, 3, P, P).
            windows: Raw pixel values, shape (N, B, W, W).
            metadata: Of the windows, as for `encode_aerial`.

        Returns:
            Logits, shape (N,).

        Raises:
            ModelError: The model does not score pairs.
        """
        if self.matcher is None:
            raise ModelError("this model does not score pairs; train one with method: cvm_mae")
        return self.matcher(photos, windows, metadata).float()  # type: ignore[no-any-return]

    def encode_ground(self, photos: Tensor | Sequence[Image.Image]) -> Tensor:
        """Embed ground photos.

        Args:
            photos: Raw RGB values, shape (N, 3, P, P) with P the tower's `image_px`; or images of
                any size, which are resized to cover that square and cropped at the centre.

        Returns:
            Unit embeddings, float32, shape (N, D).

        Raises:
            ModelError: The model has no ground tower.
        """
        if self.ground is None:
            raise ModelError("this model has no ground tower, so photos mean nothing to it")
        if not isinstance(photos, Tensor):
            photos = to_square(photos, self.ground.image_px).to(self.log_scale.device)
        return F.normalize(self.ground(photos).float(), dim=1)  # (N, D)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Embed names or any text.

        Args:
            prompts: Best in the form trained on: lineages, `Taxon.prompt`.

        Returns:
            Unit embeddings, float32, shape (N, D).

        Raises:
            ModelError: The model has no text tower.
        """
        if self.text is None:
            raise ModelError("this model has no text tower, so text means nothing to it")
        return F.normalize(self.text(prompts).float(), dim=1)  # (N, D)


def to_square(photos: Sequence[Image.Image], image_px: int) -> Tensor:
    """Resize photos to cover a square and crop its centre, uint8, shape (N, 3, P, P)."""
    arrays = []
    for photo in photos:
        scale = image_px / min(photo.size)
        width, height = (max(image_px, round(side * scale)) for side in photo.size)
        left, top = (width - image_px) // 2, (height - image_px) // 2
        resized = photo.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        arrays.append(np.asarray(resized.crop((left, top, left + image_px, top + image_px))))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)  # (N, 3, P, P)
