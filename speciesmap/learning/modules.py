"""Training steps: what one batch does to a model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from speciesmap.config import ContrastiveConfig, OptimConfig, ViewsConfig
from speciesmap.errors import ConfigError
from speciesmap.learning.data import Batch
from speciesmap.learning.views import aerial_view, ground_view, random_crop
from speciesmap.models.crisp import SpeciesModel
from speciesmap.models.losses import assume_negative, info_nce
from speciesmap.taxa import Taxon

log = logging.getLogger("speciesmap")


class Stage(L.LightningModule):
    """AdamW with linear warm-up and cosine decay, by the step.

    Biases, norms and the scalars of heads are not decayed.

    Args:
        network: What is trained.
        optim: Optimiser.
        steps: Of the whole run, on one device; several share them.
    """

    def __init__(self, network: nn.Module, optim: OptimConfig, steps: int) -> None:
        super().__init__()
        self.network = network
        self.optim = optim
        self.steps = steps
        self.before: dict[str, float] = {}

    def losses(self) -> dict[str, float]:
        """The last losses by name; those before the interruption where no step was left after."""
        return {name: float(v) for name, v in self.trainer.callback_metrics.items()} or self.before

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the losses, which Lightning forgets."""
        checkpoint["losses"] = self.losses()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the losses back."""
        self.before = checkpoint.get("losses", {})

    def configure_optimizers(self) -> Any:
        """Set up the optimiser and its schedule."""
        used = [p for p in self.network.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in used if p.ndim > 1], "weight_decay": self.optim.weight_decay},
            {"params": [p for p in used if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(groups, lr=self.optim.lr)
        steps = max(1, self.steps // self.trainer.world_size)
        warmup = max(1, round(self.optim.warmup * steps))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            done = (step - warmup) / max(1, steps - warmup)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Draw other views and masks in each process, which Lightning starts from one seed."""
        if self.global_rank:
            torch.manual_seed(torch.initial_seed() + self.global_rank)

    def report(self, loss: Tensor, **parts: Tensor) -> Tensor:
        """Log the loss and its parts, their means over processes, and give the loss back."""
        self.log_dict({"loss": loss, **parts}, prog_bar=True, batch_size=1, sync_dist=True)
        return loss


class Crisp(Stage):
    """Contrastive pre-training of aerial windows, ground photos and names.

    Args:
        model: Towers to train; those that are absent are left out of the loss.
        taxa: What `batch["taxon"]` counts.
        optim: Optimiser.
        steps: Of the whole run.
        contrastive: Which pairs attract and repel.
        views: Random views.
    """

    network: SpeciesModel

    def __init__(
        self,
        model: SpeciesModel,
        taxa: Sequence[Taxon],
        optim: OptimConfig,
        steps: int,
        contrastive: ContrastiveConfig | None = None,
        views: ViewsConfig | None = None,
    ) -> None:
        super().__init__(model, optim, steps)
        self.prompts = Prompts(taxa)
        self.contrastive = contrastive or ContrastiveConfig()
        self.views = views or ViewsConfig()

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Pull the views of one place together and push those of other places apart."""
        model = self.network
        batch = seen(model, batch, self.views)
        aerial = in_chunks(model.encode_aerial, batch["aerial"], self.optim.chunk_size)  # (N, D)
        if model.metadata is not None:
            aerial = model.add_metadata(aerial, batch["metadata"])
        loss, parts = crisp_loss(
            model, aerial, batch, self.prompts, self.contrastive, self.optim.chunk_size
        )
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
        views: Random views.
    """

    network: SpeciesModel

    def __init__(
        self,
        model: SpeciesModel,
        optim: OptimConfig,
        steps: int,
        positive_weight: float | None,
        align: float,
        views: ViewsConfig | None = None,
    ) -> None:
        super().__init__(model, optim, steps)
        self.positive_weight = positive_weight or float(len(model.taxa))
        self.align = align
        self.views = views or ViewsConfig()
        self.prompts = Prompts(model.taxa)

    def training_step(self, batch: dict[str, Batch], index: int) -> Tensor:
        """Tell presences from background."""
        model = self.network
        presences, background = batch["presences"], batch["background"]
        count = len(presences["aerial"])
        here = random_crop(presences["aerial"], model.window_px)
        windows = torch.cat([here, background["aerial"]])
        aligns = self.align > 0 and (model.text is not None or "ground" in presences)
        raw = {**presences, "aerial": windows} if aligns else {"aerial": windows}
        drawn = seen(model, raw, self.views)
        chunk_size = self.optim.chunk_size
        embedded = in_chunks(model.encode_aerial, drawn["aerial"], chunk_size)  # (N + M, D)
        if model.metadata is not None:
            embedded = model.add_metadata(embedded, dates(presences["metadata"], len(embedded)))
        with torch.autocast(self.device.type, enabled=False):
            logits = model.head(embedded)  # (N + M, T)
            head = assume_negative(
                logits[:count], presences["taxon"], logits[count:], self.positive_weight
            )
        if not aligns:
            return self.report(head)
        aligned, parts = crisp_loss(model, embedded, drawn, self.prompts, chunk_size=chunk_size)
        return self.report(head + self.align * aligned, head=head, **parts)


class Prompts:
    """Lineage prompts of a batch, all cut at one rank.

    Half of the batches name species; the others only the genus or a higher rank, half of those with
    a made-up epithet behind. So the names of higher ranks mean something by themselves, and an
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


def seen(model: SpeciesModel, batch: Batch, views: ViewsConfig) -> Batch:
    """Draw a random view of each image of a batch; the aerial ones have the model's window."""
    window_px, std = model.window_px, model.aerial.std
    drawn = dict(batch)
    if "aerial" in batch:
        drawn["aerial"] = aerial_view(batch["aerial"], std, window_px, **dict(views.aerial))
    if model.ground is not None and "ground" in batch:
        drawn["ground"] = ground_view(batch["ground"], **dict(views.ground))
    return drawn


def dates(metadata: Tensor, count: int) -> Tensor:
    """Give presences their dates, and background the date of one of them drawn at random.

    Places are left out: they would tell the two apart, since background is drawn evenly.

    Args:
        metadata: Of the presences, shape (N, 4).
        count: Rows wanted, N presences and then background.

    Returns:
        Shape (count, 4).
    """
    drawn = torch.randint(len(metadata), (count - len(metadata),), device=metadata.device)
    rows = torch.cat([metadata, metadata[drawn]])  # (count, 4)
    return torch.cat([torch.full_like(rows[:, :2], torch.nan), rows[:, 2:]], 1)


def check_chunks(network: nn.Module, chunk_size: int | None) -> None:
    """Say what chunks change in a network with batch norm.

    Raises:
        ConfigError: Some chunk would be a single row, which has no variance.
    """
    if chunk_size is None or not any(isinstance(m, _BatchNorm) for m in network.modules()):
        return
    if chunk_size < 3:
        raise ConfigError(
            f"optim.chunk_size = {chunk_size} can leave batch norm a single row; give 3 or more, "
            "or choose a backbone with layer or group norm"
        )
    log.warning(
        "optim.chunk_size: batch norm takes its statistics from a chunk, not from the batch; "
        "a backbone with layer or group norm learns the same in chunks"
    )


def in_chunks(encode: Callable[[Tensor], Tensor], images: Tensor, chunk_size: int | None) -> Tensor:
    """Embed a batch in chunks whose activations are not kept but computed again to go back.

    This is gradient caching (Gao et al. 2021): the loss sees the embeddings of the whole batch,
    while memory holds the activations of one chunk. Random layers repeat their draws. The gradients
    are those of the whole batch, except through batch norm, whose statistics are those of a chunk.

    Args:
        encode: Images to embeddings.
        images: Shape (N, B, P, P).
        chunk_size: Rows at a time; all at once by default.

    Returns:
        Embeddings, shape (N, D).
    """
    if chunk_size is None or len(images) <= chunk_size:
        return encode(images)
    chunks = torch.tensor_split(images, -(-len(images) // chunk_size))  # as even as can be
    embedded = [checkpoint(encode, chunk, use_reentrant=False) for chunk in chunks]
    return torch.cat(embedded)  # (N, D)


def gathered(rows: Tensor) -> Tensor:
    """Join the rows of all processes, N on each, through which gradients flow back to each.

    Every process then computes the loss of the joined batch, and the mean of their gradients, as
    data-parallel training takes it, is the gradient of that loss.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    return torch.cat(all_gather(rows))  # type: ignore[no-untyped-call]  # (processes * N, ...)


def named_alike(prompts: Callable[[Tensor], Any], taxon: Tensor) -> Any:
    """Name the joined batch in the words of the first process, whose random cut all must share."""
    drawn = [prompts(taxon)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(drawn, src=0, device=taxon.device)
    names, named = drawn[0]
    return names, named.to(taxon.device)


def crisp_loss(
    model: SpeciesModel,
    aerial: Tensor,
    batch: Batch,
    prompts: Callable[[Tensor], Any],
    contrastive: ContrastiveConfig | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Contrastive loss over all pairs of views that a batch and a model have.

    Where several processes train together, the pairs are those of their joined batch.

    Args:
        model: Its ground and text towers, where present, encode the batch.
        aerial: Unit embeddings of the batch's windows, shape (N, D), or of those and of
            background windows behind, which are negatives only, shape (N + M, D).
        batch: `taxon`, `place` and perhaps `ground`, the photos as the tower is to see them.
        prompts: Names rows by their taxon.
        contrastive: Which pairs attract and repel.
        chunk_size: Photos embedded at a time.

    Returns:
        The mean over the pairs of views, and each by name.
    """
    contrastive = contrastive or ContrastiveConfig()
    parts: dict[str, Tensor] = {}
    local = len(batch["taxon"])
    place, taxon = gathered(batch["place"]), gathered(batch["taxon"])  # (N,)
    aerial = torch.cat([gathered(aerial[:local]), gathered(aerial[local:])])  # (N + M, D)
    count, device = len(taxon), aerial.device

    def padded(pairs: Tensor) -> Tensor:
        return torch.nn.functional.pad(pairs, (0, 0, 0, len(aerial) - count))  # (N + M, ...)

    ground = None
    if model.ground is not None and "ground" in batch:
        ground = gathered(in_chunks(model.encode_ground, batch["ground"], chunk_size))  # (N, D)
        positive = torch.eye(count, dtype=torch.bool, device=device)
        ignored = place[:, None] == place
        if contrastive.same_place == "positive":
            positive = positive | ignored
        if contrastive.same_taxon == "ignored":
            ignored = ignored | (taxon[:, None] == taxon) & (taxon >= 0)
        with torch.autocast(device.type, enabled=False):
            parts["aerial_ground"] = info_nce(
                aerial, ground, model.logit_scale, padded(positive), padded(ignored)
            )
    if model.text is not None:
        names, named = named_alike(prompts, taxon)
        text = model.encode_text(names)  # (T, D)
        with torch.autocast(device.type, enabled=False):
            parts["aerial_text"] = info_nce(aerial, text, model.logit_scale, padded(named))
            if ground is not None:
                parts["ground_text"] = info_nce(ground, text, model.logit_scale, named)
    return torch.stack(list(parts.values())).mean(), parts
