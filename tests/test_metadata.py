"""Where and when: waves without aliases, vectors that add, absence that is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model
from torch import Tensor

from speciesmap.errors import ConfigError, ModelError
from speciesmap.models import SpeciesModel, load_model, save_model
from speciesmap.models.metadata import MetadataEncoder, date_waves, location_waves

NAN = float("nan")


def trained(dropout: float = 0.25, dim: int = 8) -> MetadataEncoder:
    """Layers with weights that say something, in evaluation mode."""
    torch.manual_seed(0)
    encoder = MetadataEncoder(dim, dropout)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter)
    return encoder.eval()


def model_with_metadata() -> SpeciesModel:
    model = tiny_model(metadata={"dropout": 0.25})
    assert model.metadata is not None
    for parameter in model.metadata.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def windows(count: int) -> Tensor:
    return torch.randint(0, 255, (count, 4, 16, 16), generator=torch.manual_seed(1))


def waves_at(latitude: float, longitude: float) -> Tensor:
    return location_waves(torch.tensor([[latitude, longitude, NAN, NAN]], dtype=torch.float64))[0]


latitudes = st.floats(-90, 90)
longitudes = st.floats(-180, 180)


@given(latitudes, latitudes, longitudes)
def test_no_two_latitudes_share_their_waves(one: float, other: float, longitude: float) -> None:
    gap = torch.dist(waves_at(one, longitude), waves_at(other, longitude))
    expected = 2 * torch.sin(torch.tensor(abs(one - other) / 2).deg2rad())
    assert torch.allclose(gap, expected, atol=1e-5), "a chord, which grows with the angle to 180"


def test_the_poles_are_opposite_and_the_date_line_is_no_gap() -> None:
    assert torch.dist(waves_at(90, 0), waves_at(-90, 0)) == pytest.approx(2)
    assert torch.dist(waves_at(10, -180), waves_at(10, 180)) < 1e-6
    assert torch.dist(waves_at(10, -179.9), waves_at(10, 179.9)) < 0.01


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 31), st.integers(1, 31))
def test_dates_differ_unless_they_are_one(a: int, b: int, c: int, d: int) -> None:
    dates = torch.tensor([[NAN, NAN, a, c], [NAN, NAN, b, d]])
    first, second = date_waves(dates)
    assert (torch.dist(first, second) < 1e-5) == ((a, c) == (b, d))


def test_january_follows_december() -> None:
    months = date_waves(torch.tensor([[NAN, NAN, m, NAN] for m in range(1, 13)]))
    steps = (months - months.roll(-1, 0)).norm(dim=1)
    assert torch.allclose(steps, steps[0].expand(12), atol=1e-5)


def test_a_month_is_the_mean_of_its_days() -> None:
    encoder = trained()
    days = torch.tensor([[NAN, NAN, 5.0, day] for day in range(1, 32)])
    with torch.inference_mode():
        assert torch.allclose(encoder(days).mean(0), encoder.month(5), atol=1e-5)
    for number in (0, 13):
        with pytest.raises(ConfigError, match=f"no month {number}; give 1 to 12"):
            encoder.month(number)


def test_before_training_and_where_nothing_is_known_nothing_is_added() -> None:
    rows = torch.tensor([[40.0, -120.0, 5.0, 3.0]])
    assert not MetadataEncoder(8)(rows).any()
    assert not trained()(torch.full((2, 4), NAN)).any()


def test_place_and_date_are_known_or_missing_each_by_itself() -> None:
    encoder = trained()
    both, place, date = encoder(
        torch.tensor([[40, -120, 5, 3], [40, -120, NAN, 3], [NAN, -120, 5, 3]])
    )
    assert torch.allclose(both, place + date, atol=1e-5)
    assert place.any()
    assert date.any()


def test_metadata_are_dropped_row_by_row_in_training_and_never_at_evaluation() -> None:
    encoder = trained()
    rows = torch.tensor([[40.0, -120.0, 5.0, 3.0]]).expand(4000, 4)
    assert torch.allclose(encoder(rows), encoder(rows[:1]).expand(4000, 8), atol=1e-5)
    torch.manual_seed(0)
    drawn = encoder.train()(rows)
    place = torch.tensor([[40, -120, NAN, NAN]])
    parts = encoder.eval()(torch.cat([rows[:1], place, rows[:1] * 0 + NAN]))
    parts = torch.cat([parts, parts[:1] - parts[1:2]])  # both, place, none, date
    share = [((drawn - part).norm(dim=1) < 1e-4).float().mean().item() for part in parts]
    assert share == pytest.approx([0.5625, 0.1875, 0.0625, 0.1875], abs=0.03)


def test_gradients_reach_the_layers_from_zero_and_stay_finite_where_values_are_missing() -> None:
    encoder = MetadataEncoder(8, dropout=0.0)
    rows = torch.tensor([[40.0, -120.0, 5.0, 3.0], [NAN, NAN, NAN, NAN]])
    F.normalize(torch.ones(2, 8) + encoder(rows), dim=1)[:, 0].sum().backward()  # type: ignore[no-untyped-call]
    for parameter in encoder.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


def test_a_month_added_to_stored_embeddings_is_what_encoding_with_it_gives() -> None:
    model = model_with_metadata()
    rows = torch.tensor([[NAN, NAN, 7.0, NAN]]).expand(5, 4)
    with torch.inference_mode():
        stored = model.encode_aerial(windows(5))
        assert torch.equal(model.add_metadata(stored, rows), model.encode_aerial(windows(5), rows))
        added = F.normalize(stored.half().float() + model.metadata.month(7), dim=1)  # type: ignore[union-attr]
        assert torch.allclose(added, model.encode_aerial(windows(5), rows), atol=1e-3)
        assert torch.allclose(model.encode_aerial(windows(5), rows).norm(dim=1), torch.ones(5))
        assert not torch.allclose(added, stored, atol=0.05)
        nothing = model.encode_aerial(windows(5), torch.full((5, 4), NAN))
    assert torch.allclose(nothing, stored, atol=1e-6)


def test_metadata_travel_in_the_checkpoint(tmp_path: Path) -> None:
    model = model_with_metadata()
    save_model(model, tmp_path / "run", {})
    again = load_model(tmp_path / "run")
    rows = torch.tensor([[40.0, -120.0, 5.0, 3.0]]).expand(3, 4)
    with torch.inference_mode():
        wanted = model.encode_aerial(windows(3), rows)
        assert torch.equal(again.encode_aerial(windows(3), rows), wanted)
    assert again.architecture.metadata == {"dropout": 0.25}
    assert load_model(save_model(tiny_model(), tmp_path / "none", {})).metadata is None


def test_a_model_without_metadata_refuses_them() -> None:
    with pytest.raises(ModelError, match=r"trained without metadata.*model\.metadata"):
        tiny_model().encode_aerial(windows(2), torch.zeros(2, 4))
