"""Training steps: what one batch does to a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from speciesmap.config import OptimConfig
from speciesmap.learning.data import Batch
from speciesmap.learning.views import aerial_view, ground_view
from speciesmap.models.crisp import SpeciesModel
from speciesmap.models.losses import assume_negative, info_nce
from speciesmap.models.masked import MaskedAutoencoder
from speciesmap.taxa import Taxon


class Stage(L.LightningModule):
    """AdamW with linear warm-up and cosine decay, by the step.

    Biases, norms and the scalars of heads are not decayed.
    """

    def __init__(self, network: nn.Module, optim: OptimConfig, steps: int) -> None:
        super().__init__()
        self.network = network
        self.optim = optim
        self.steps = steps

    def configure_optimizers(self) -> Any:
        """Set up the optimiser and its schedule."""
        used = [p for p in self.network.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in used if p.ndim > 1], "weight_decay": self.optim.weight_decay},
            {"params": [p for p in used if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(groups, lr=self.optim.lr)
        warmup = max(1, round(self.optim.warmup * self.steps))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            done = (step - warmup) / max(1, self.steps - warmup)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def report(self, loss: Tensor, **parts: Tensor) -> Tensor:
        """Log the loss and its parts, and give the loss back."""
        self.log_dict({"loss": loss, **parts}, prog_bar=True, batch_size=1)
        return loss


class Masked(Stage):
    """Masked image modelling of aerial windows."""

    network: MaskedAutoencoder

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Hide patches and paint them."""
        tower = self.network.tower
        return self.report(self.network(aerial_view(batch["aerial"], tower.std)))


class Crisp(Stage):
    """Contrastive pre-training of aerial windows, ground photos and names.

    Args:
        model: Towers to train; those that are absent are left out of the loss.
        taxa: What `batch["taxon"]` counts.
        optim: Optimiser.
        steps: Of the whole run.
    """

    network: SpeciesModel

    def __init__(
        self, model: SpeciesModel, taxa: Sequence[Taxon], optim: OptimConfig, steps: int
    ) -> None:
        super().__init__(model, optim, steps)
        self.prompts = Prompts(taxa)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Pull the views of one place together and push those of other places apart."""
        model = self.network
        aerial = model.encode_aerial(aerial_view(batch["aerial"], model.aerial.std))  # (N, D)
        loss, parts = crisp_loss(model, aerial, batch, self.prompts)
        return self.report(loss, **parts)


class Finetune(Stage):
    """Learned embeddings of taxa from presences against background.

    The contrastive loss goes on beside, so that photos and names keep their meaning while the
    aerial tower moves; background windows are its further negatives.

    Args:
        model: With a head of as many taxa as `taxa`.
        optim: Optimiser.
        steps: Of the whole run.
        positive_weight: Weight of a presence; the number of taxa by default, which balances
            presences and assumed absences.
        align: Weight of the contrastive loss.
    """

    network: SpeciesModel

    def __init__(
        self,
        model: SpeciesModel,
        optim: OptimConfig,
        steps: int,
        positive_weight: float | None,
        align: float,
    ) -> None:
        super().__init__(model, optim, steps)
        self.positive_weight = positive_weight or float(len(model.taxa))
        self.align = align
        self.prompts = Prompts(model.taxa)

    def training_step(self, batch: dict[str, Batch], index: int) -> Tensor:
        """Tell presences from background."""
        model = self.network
        presences, background = batch["presences"], batch["background"]
        count = len(presences["aerial"])
        windows = torch.cat([presences["aerial"], background["aerial"]])
        embedded = model.encode_aerial(aerial_view(windows, model.aerial.std))  # (N + M, D)
        with torch.autocast(self.device.type, enabled=False):
            logits = model.head(embedded)  # (N + M, T)
            head = assume_negative(
                logits[:count], presences["taxon"], logits[count:], self.positive_weight
            )
        if not self.align or (model.text is None and "ground" not in presences):
            return self.report(head)
        aligned, parts = crisp_loss(model, embedded, presences, self.prompts)
        return self.report(head + self.align * aligned, head=head, **parts)


class Prompts:
    """Lineage prompts of a batch, all cut at one rank.

    Most batches name species; some name only the genus or a higher rank, half of those with a
    made-up epithet behind. So the names of higher ranks mean something by themselves, and an
    unknown species of a known genus falls back on its genus.

    Args:
        taxa: What is named.
        full: Share of batches that name species.
    """

    def __init__(self, taxa: Sequence[Taxon], full: float = 0.5) -> None:
        self.taxa = list(taxa)
        self.full = full
        self.depth = min((len(taxon.lineage) for taxon in taxa), default=0)

    def __call__(self, taxon: Tensor) -> tuple[list[str], Tensor]:
        """Name a batch.

        Args:
            taxon: Positions in `taxa`, shape (N,).

        Returns:
            Distinct prompts, M strings, and which of them names each row, bool, shape (N, M).
        """
        ranks: int | None = None
        epithet = ""
        if self.depth > 1 and torch.rand(()) > self.full:
            ranks = int(torch.randint(2, self.depth + 1, ()))
            if torch.rand(()) < 0.5:
                letters = torch.randint(97, 123, (int(torch.randint(4, 11, ())),))
                epithet = " " + "".join(map(chr, letters.tolist()))
        names = [self.taxa[k].prompt(ranks) + epithet for k in taxon.tolist()]
        distinct, which = np.unique(names, return_inverse=True)
        columns = torch.arange(len(distinct), device=taxon.device)
        named = torch.from_numpy(which).to(taxon.device)[:, None] == columns  # (N, M)
        return distinct.tolist(), named


def crisp_loss(
    model: SpeciesModel, aerial: Tensor, batch: Batch, prompts: Callable[..., Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Contrastive loss over all pairs of views that a batch and a model have.

    Args:
        model: Its ground and text towers, where present, encode the batch.
        aerial: Unit embeddings of the batch's windows, shape (N, D), or of those and of
            background windows behind, which are negatives only, shape (N + M, D).
        batch: `taxon`, `place` and perhaps `ground`.
        prompts: Names rows by their taxon.

    Returns:
        The mean over the pairs of views, and each by name.
    """
    parts: dict[str, Tensor] = {}
    count = len(batch["taxon"])
    device = aerial.device
    ground = None
    if model.ground is not None and "ground" in batch:
        ground = model.encode_ground(ground_view(batch["ground"]))  # (N, D)
        same = torch.eye(len(aerial), count, dtype=torch.bool, device=device)
        place = batch["place"]
        shared = torch.zeros_like(same)
        shared[:count] = place[:, None] == place
        with torch.autocast(device.type, enabled=False):
            parts["aerial_ground"] = info_nce(aerial, ground, model.logit_scale, same, shared)
    if model.text is not None:
        names, named = prompts(batch["taxon"])
        text = model.encode_text(names)  # (M, D)
        padded = torch.zeros(len(aerial), len(names), dtype=torch.bool, device=device)
        padded[:count] = named
        with torch.autocast(device.type, enabled=False):
            parts["aerial_text"] = info_nce(aerial, text, model.logit_scale, padded)
            if ground is not None:
                parts["ground_text"] = info_nce(ground, text, model.logit_scale, named)
    return torch.stack(list(parts.values())).mean(), parts
