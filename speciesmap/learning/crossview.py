"""Pre-training that hides patches: MAE of one view, and BirdSAT's CVE-MAE and CVM-MAE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speciesmap.config import CrossViewConfig, OptimConfig, PretrainConfig, ViewsConfig
from speciesmap.errors import ConfigError, ModelError
from speciesmap.learning.data import Batch
from speciesmap.learning.modules import Prompts, Stage, crisp_loss, in_chunks, seen
from speciesmap.learning.views import aerial_view, ground_view
from speciesmap.models import SpeciesModel, load_model
from speciesmap.models.crossview import CrossViewAutoencoder
from speciesmap.models.encoders import ImageTower
from speciesmap.models.masked import MaskedAutoencoder
from speciesmap.taxa import Taxon


def masked_stage(
    model: SpeciesModel, taxa: Sequence[Taxon], config: PretrainConfig, steps: int
) -> Stage:
    """Make the training stage of a method that hides patches.

    Args:
        model: New; for method cvm_mae one that scores pairs.
        taxa: What `batch["taxon"]` counts.
        config: The stage.
        steps: Of the whole run.

    Raises:
        ConfigError: The model lacks a tower, or would freeze an encoder that knows nothing.
        ModelError: A tower is no vision transformer, or `crossview.aerial_init` does not fit.
    """
    masked, towers = config.masked, config.model
    decoder = (
        masked.mask_ratio,
        masked.decoder_dim,
        masked.decoder_depth,
        masked.decoder_heads,
        masked.standardise,
    )
    if config.method == "mae" and masked.view == "aerial":
        if not isinstance(model.aerial, ImageTower):
            raise ConfigError(
                "method mae hides patches of whole windows, which a factored encoder never sees; "
                "choose model.aerial.encoder: plain, or method: crisp"
            )
        network = MaskedAutoencoder(model.aerial, *decoder, keep_positions=towers.aerial.pretrained)
        return Masked(network, config.optim, steps, config.views)
    if model.ground is None or towers.ground is None:
        raise ConfigError(
            f"method {config.method} needs photos here; give model.ground, or method: mae with "
            "masked.view: aerial"
        )
    if config.method == "cvm_mae":
        assert isinstance(model.aerial, ImageTower)  # as a matcher demands
        both = CrossViewAutoencoder(
            model.aerial, model.ground, *decoder, keep_positions=towers.aerial.pretrained
        )
        return CvmMae(model, both, config.optim, steps, config.crossview, config.views)
    network = MaskedAutoencoder(model.ground, *decoder, keep_positions=towers.ground.pretrained)
    if config.method == "mae":
        return Masked(network, config.optim, steps, config.views)
    start = config.crossview.aerial_init
    if start:
        take_aerial(model, start)
    elif config.crossview.freeze_aerial and not towers.aerial.pretrained:
        raise ConfigError(
            "crossview.freeze_aerial would keep an aerial encoder of random weights; give "
            "crossview.aerial_init, model.aerial.pretrained: true, or freeze_aerial: false"
        )
    return CveMae(model, network, taxa, config, steps)


def take_aerial(model: SpeciesModel, start: str) -> None:
    """Start the aerial encoder from that of another model, with its band statistics.

    Raises:
        ModelError: The two encoders differ.
    """
    other = load_model(start)
    kept = [
        {
            name: value
            for name, value in m.aerial.state_dict().items()
            if not name.startswith("project.")
        }
        for m in (model, other)
    ]
    shapes = [{name: tuple(value.shape) for name, value in state.items()} for state in kept]
    if shapes[0] != shapes[1]:
        raise ModelError(
            f"crossview.aerial_init: {start} has the aerial encoder {other.architecture.aerial} of "
            f"{other.window_px} px and {len(other.bands)} bands, the model "
            f"{model.architecture.aerial} of {model.window_px} px and {len(model.bands)} bands; "
            "give both the same"
        )
    model.aerial.load_state_dict(kept[1], strict=False)
    mean, std = other.architecture.mean, other.architecture.std
    model.architecture = replace(model.architecture, mean=mean, std=std)


class Masked(Stage):
    """Masked image modelling of photos where batches hold any, else of windows."""

    network: MaskedAutoencoder

    def __init__(
        self, network: MaskedAutoencoder, optim: OptimConfig, steps: int, views: ViewsConfig
    ) -> None:
        super().__init__(network, optim, steps)
        self.views = views

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Hide patches and paint them."""
        tower, views = self.network.tower, self.views
        if "ground" in batch:
            drawn = ground_view(batch["ground"], **dict(views.ground))
        else:
            drawn = aerial_view(batch["aerial"], tower.std, tower.image_px, **dict(views.aerial))
        return self.report(self.network(drawn))


class ModelAndDecoder(nn.Module):
    """What is kept of a training and what is not, trained together."""

    def __init__(
        self, model: SpeciesModel, autoencoder: MaskedAutoencoder | CrossViewAutoencoder
    ) -> None:
        super().__init__()
        self.model, self.autoencoder = model, autoencoder


class CveMae(Stage):
    """Contrast of both views, whole, beside the painting of photos whose patches are hidden.

    Args:
        model: To train.
        autoencoder: Of its ground tower.
        taxa: What `batch["taxon"]` counts.
        config: The stage.
        steps: Of the whole run.
    """

    network: ModelAndDecoder

    def __init__(
        self,
        model: SpeciesModel,
        autoencoder: MaskedAutoencoder,
        taxa: Sequence[Taxon],
        config: PretrainConfig,
        steps: int,
    ) -> None:
        super().__init__(ModelAndDecoder(model, autoencoder), config.optim, steps)
        self.prompts, self.config = Prompts(taxa), config
        if config.crossview.freeze_aerial:
            model.aerial.requires_grad_(False)
            model.aerial.project.requires_grad_(True)

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        """Hold a frozen encoder in evaluation mode: its norms and dropout must rest too."""
        if self.config.crossview.freeze_aerial:
            self.network.model.aerial.eval().project.train()

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Pull the views of one place together, and paint what is hidden of the photos."""
        model, config = self.network.model, self.config
        drawn = seen(model, batch, config.views)
        chunk_size = config.optim.chunk_size
        aerial = in_chunks(model.encode_aerial, drawn["aerial"], chunk_size)  # (N, D)
        if model.metadata is not None:
            aerial = model.add_metadata(aerial, drawn["metadata"])
        contrast, parts = crisp_loss(
            model, aerial, drawn, self.prompts, config.contrastive, chunk_size
        )
        painted = self.network.autoencoder(drawn["ground"])
        weight = config.crossview
        loss = weight.contrastive * contrast + weight.reconstruction * painted
        return self.report(loss, reconstruction=painted, **parts)


class CvmMae(Stage):
    """Matching of pairs, whole, beside the painting of pairs whose patches are hidden.

    Args:
        model: One that scores pairs.
        autoencoder: Of its towers.
        optim: Optimiser.
        steps: Of the whole run.
        crossview: Weights, and how many windows are tried as negatives.
        views: Random views.
    """

    network: ModelAndDecoder

    def __init__(
        self,
        model: SpeciesModel,
        autoencoder: CrossViewAutoencoder,
        optim: OptimConfig,
        steps: int,
        crossview: CrossViewConfig,
        views: ViewsConfig,
    ) -> None:
        super().__init__(ModelAndDecoder(model, autoencoder), optim, steps)
        self.crossview, self.views = crossview, views

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Tell pairs of one place from pairs of two, and paint what is hidden."""
        drawn = seen(self.network.model, batch, self.views)
        metadata = drawn["metadata"] if self.network.model.metadata is not None else None
        other, known = self.negatives(drawn, metadata)
        photos, windows = drawn["ground"], drawn["aerial"]
        own = self.network.model.match(photos, windows, metadata)  # (N,)
        wrong = self.network.model.match(
            photos[known],
            windows[other[known]],
            None if metadata is None else metadata[other[known]],
        )
        logits = torch.cat([own, wrong])
        matching = F.binary_cross_entropy_with_logits(
            logits, torch.cat([torch.ones_like(own), torch.zeros_like(wrong)])
        )
        ground, aerial = self.network.autoencoder(photos, windows)
        painted = (ground + aerial) / 2
        weight = self.crossview
        loss = weight.matching * matching + weight.reconstruction * painted
        return self.report(loss, matching=matching, ground=ground, aerial=aerial)

    @torch.no_grad()
    def negatives(self, drawn: Batch, metadata: Tensor | None) -> tuple[Tensor, Tensor]:
        """Choose for each photo a window of another place: of those tried, the likeliest match.

        Args:
            drawn: The batch, as the model is to see it.
            metadata: Of the windows, if the model takes any.

        Returns:
            Row of each photo's window, shape (N,), and which photos have one, bool, shape (N,).
        """
        count, place = len(drawn["place"]), drawn["place"]
        rows = torch.arange(count, device=place.device)
        tried = [
            (rows + shift) % count
            for shift in range(1, min(self.crossview.negatives, count - 1) + 1)
        ]
        scores = []
        for other in tried:
            score = torch.zeros(count, device=place.device)
            if len(tried) > 1:
                score = self.network.model.match(
                    drawn["ground"],
                    drawn["aerial"][other],
                    None if metadata is None else metadata[other],
                )
            scores.append(score.masked_fill(place[other] == place, -torch.inf))
        best, chosen = torch.stack(scores).max(0)  # (N,)
        return torch.stack(tried)[chosen, rows], best > -torch.inf
