"""CRISP's loss over several processes, in chunks, and with places and taxa that repeat."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import ended, start
from tiny import TAXA, tiny_model
from torch import Tensor

from speciesmap.config import ContrastiveConfig, load_config
from speciesmap.errors import ConfigError
from speciesmap.learning.data import Batch
from speciesmap.learning.modules import Prompts, crisp_loss, in_chunks
from speciesmap.models import SpeciesModel
from speciesmap.models.losses import info_nce

ROWS, BACKGROUND = 6, 3
NORMLESS = {"backbone": "test_vit", "kwargs": {"patch_size": 4}}  # layer norm: rows are alone


def model() -> SpeciesModel:
    return tiny_model(aerial=NORMLESS, ground={**NORMLESS, "image_px": 16})


def batch(rows: int = ROWS, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    return {
        "aerial": torch.rand(rows + BACKGROUND, 4, 16, 16, generator=g) * 255,
        "ground": torch.rand(rows, 3, 16, 16, generator=g) * 255,
        "taxon": torch.randint(len(TAXA), (rows,), generator=g),
        "place": torch.arange(rows) // 2,
    }


def share(whole: Batch, rank: int, world: int) -> Batch:
    """A process's part: presences and background are each dealt out evenly."""
    rows, count = len(whole["taxon"]) // world, len(whole["taxon"])
    own = slice(rank * rows, (rank + 1) * rows)
    behind = (len(whole["aerial"]) - count) // world
    away = slice(count + rank * behind, count + (rank + 1) * behind)
    part = {name: whole[name][own] for name in ("ground", "taxon", "place")}
    return {**part, "aerial": torch.cat([whole["aerial"][own], whole["aerial"][away]])}


def loss_and_gradients(
    network: SpeciesModel, data: Batch, contrastive: ContrastiveConfig, chunk_size: int | None
) -> tuple[Tensor, dict[str, Tensor]]:
    network.zero_grad()
    aerial = in_chunks(network.encode_aerial, data["aerial"], chunk_size)
    torch.manual_seed(int(data["place"][0]))  # processes draw other names, and must share one
    loss, _ = crisp_loss(network, aerial, data, Prompts(TAXA), contrastive, chunk_size)
    loss.backward()  # type: ignore[no-untyped-call]
    grads = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def one_process(rank: int, whole: Batch, out: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{out / 'meet'}", rank=rank, world_size=2
    )
    network = model()
    loss, grads = loss_and_gradients(network, share(whole, rank, 2), ContrastiveConfig(), None)
    for grad in grads.values():  # as data-parallel training does
        torch.distributed.all_reduce(grad)
        grad /= 2
    torch.save({"loss": loss, "grads": grads}, out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def differ(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp(min=1e-12))


def assert_equal_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Relative difference of all gradients together, and of each that is not next to nothing."""
    assert set(found) == set(wanted)
    assert differ(joined(found), joined(wanted)) < 1e-5
    scale = joined(wanted).norm()
    for name, grad in wanted.items():
        if grad.norm() > 1e-3 * scale:
            assert differ(found[name], grad) < 1e-4, name


def joined(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([grads[name].flatten().double() for name in sorted(grads)])


def test_two_processes_give_the_loss_and_gradients_of_one_with_the_joined_batch(
    tmp_path: Path,
) -> None:
    whole = batch(rows=8)
    whole["aerial"] = whole["aerial"][:-1]  # two of the background for each process
    both = [start(one_process, rank, whole, tmp_path) for rank in range(2)]
    assert [ended(process) for process in both] == [0, 0]
    wanted_loss, wanted = loss_and_gradients(model(), whole, ContrastiveConfig(), None)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert differ(found["loss"], wanted_loss) < 1e-5
        assert_equal_gradients(found["grads"], wanted)
    alone, _ = loss_and_gradients(model(), share(whole, 0, 2), ContrastiveConfig(), None)
    assert differ(alone, wanted_loss) > 1e-2, "half a batch has another loss"


@pytest.mark.parametrize("chunk_size", [1, 2, 4])
def test_chunks_give_the_loss_and_gradients_of_the_whole_batch(chunk_size: int) -> None:
    data = batch()
    wanted_loss, wanted = loss_and_gradients(model(), data, ContrastiveConfig(), None)
    loss, found = loss_and_gradients(model(), data, ContrastiveConfig(), chunk_size)
    assert differ(loss, wanted_loss) < 1e-5
    assert_equal_gradients(found, wanted)


def test_chunks_keep_no_more_than_their_own_activations() -> None:
    network, images = model(), batch(rows=32)["aerial"][:32]

    def kept(chunk_size: int | None) -> int:
        numbers: list[int] = []

        def count(tensor: Tensor) -> Tensor:
            numbers.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            in_chunks(network.encode_aerial, images, chunk_size)
        return sum(numbers)

    assert kept(4) < kept(None) / 10


def test_random_layers_repeat_their_draws_in_chunks() -> None:
    dropping = {"backbone": "test_vit", "kwargs": {"patch_size": 4, "proj_drop_rate": 0.3}}
    network = tiny_model(aerial=dropping, ground=None, text=None).train()
    torch.manual_seed(3)
    embedded = in_chunks(network.encode_aerial, batch()["aerial"], 3)
    embedded[:, 0].sum().backward()  # type: ignore[no-untyped-call]
    weight: Any = network.aerial.project.weight
    found = weight.grad.clone()
    network.zero_grad()
    torch.manual_seed(3)
    parts = [network.encode_aerial(part) for part in torch.split(batch()["aerial"], 3)]
    torch.cat(parts)[:, 0].sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(torch.cat(parts), embedded)
    assert torch.allclose(found, weight.grad, rtol=1e-5)


def parts(data: Batch, contrastive: ContrastiveConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of photos against windows, and the embeddings it is made of."""
    network = tiny_model(aerial=NORMLESS, ground={**NORMLESS, "image_px": 16}, text=None)
    with torch.no_grad():
        aerial = network.encode_aerial(data["aerial"][: len(data["taxon"])])
        loss, _ = crisp_loss(network, aerial, data, Prompts(TAXA), contrastive)
        return loss, aerial, network.encode_ground(data["ground"])


@pytest.mark.parametrize("same_place", ["ignored", "positive"])
@pytest.mark.parametrize("same_taxon", ["negative", "ignored"])
def test_options_say_which_pairs_attract_and_which_are_left_out(
    same_place: Any, same_taxon: Any
) -> None:
    data = batch()
    options = ContrastiveConfig(same_place=same_place, same_taxon=same_taxon)
    loss, aerial, ground = parts(data, options)
    place, taxon = data["place"], data["taxon"]
    beside = place[:, None] == place
    alike = taxon[:, None] == taxon
    positive = beside if same_place == "positive" else torch.eye(ROWS, dtype=torch.bool)
    left_out = beside | alike if same_taxon == "ignored" else beside
    scale = torch.tensor(1 / 0.07)
    assert torch.allclose(loss, info_nce(aerial, ground, scale, positive, left_out), rtol=1e-5)
    others = [
        parts(data, ContrastiveConfig(same_place=p, same_taxon=t))[0]
        for p in ("ignored", "positive")
        for t in ("negative", "ignored")
        if (p, t) != (same_place, same_taxon)
    ]
    assert all(abs(float(loss - other)) > 1e-4 for other in others), "each option tells"


def test_rows_without_a_taxon_are_not_of_one_taxon() -> None:
    data = batch()
    unnamed = copy.deepcopy(data)
    unnamed["taxon"] = torch.full((ROWS,), -1)
    ignoring = ContrastiveConfig(same_taxon="ignored")
    assert torch.equal(parts(unnamed, ignoring)[0], parts(unnamed, ContrastiveConfig())[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.text={width: 20, heads: 3}", "heads = 3 does not divide width = 20"),
        ("masked={decoder_dim: 20, decoder_heads: 16}", "decoder_heads = 16 does not divide"),
        ("contrastive.same_place=repelled", "contrastive.same_place"),
        ("optim.chunk_size=0", "optim.chunk_size"),
    ],
)
def test_what_cannot_be_is_refused_in_words(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(Path(__file__).parent.parent / "configs" / "demo_crisp.yaml", [change])
    assert "\n" not in str(caught.value)
