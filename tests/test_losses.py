"""Losses equal what one computes by hand, and their gradients stay finite."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from speciesmap.models.losses import assume_negative, info_nce


def unit(rows: int, seed: int, dim: int = 8) -> Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.manual_seed(seed)), dim=1)


def by_hand(
    left: Tensor,
    right: Tensor,
    scale: float,
    positives: NDArray[np.bool_],
    ignored: NDArray[np.bool_],
) -> float:
    """Row by row, in words: -log of the share of exp that falls on each positive."""
    similarity = scale * (left.double() @ right.double().T).numpy()

    def towards(s: NDArray[np.float64], pos: NDArray[np.bool_], out: NDArray[np.bool_]) -> float:
        rows = []
        for i in range(len(s)):
            if not pos[i].any():
                continue
            total = sum(math.exp(s[i, j]) for j in range(s.shape[1]) if pos[i, j] or not out[i, j])
            rows.append(
                np.mean([-math.log(math.exp(s[i, j]) / total) for j in np.flatnonzero(pos[i])])
            )
        return float(np.mean(rows))

    return (
        towards(similarity, positives, ignored) + towards(similarity.T, positives.T, ignored.T)
    ) / 2


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10_000), st.floats(0.5, 20))
def test_info_nce_is_what_one_computes_by_hand(n: int, m: int, seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    positives = rng.random((n, m)) < 0.3
    positives[rng.integers(n), rng.integers(m)] = True  # several positives, and rows with none
    ignored = rng.random((n, m)) < 0.3
    left, right = unit(n, seed), unit(m, seed + 1)
    loss = info_nce(
        left, right, torch.tensor(scale), torch.from_numpy(positives), torch.from_numpy(ignored)
    )
    assert math.isclose(
        float(loss), by_hand(left, right, scale, positives, ignored), rel_tol=1e-4, abs_tol=1e-5
    )


def test_info_nce_pairs_the_diagonal_by_default_and_is_symmetric() -> None:
    left, right, scale = unit(5, 0), unit(5, 1), torch.tensor(4.0)
    eye = np.eye(5, dtype=bool)
    loss = float(info_nce(left, right, scale))
    assert math.isclose(loss, by_hand(left, right, 4.0, eye, ~eye & False), rel_tol=1e-5)
    assert math.isclose(loss, float(info_nce(right, left, scale)), rel_tol=1e-6)
    assert math.isclose(float(info_nce(unit(1, 0), unit(1, 1), scale)), 0.0, abs_tol=1e-6)


def test_ignored_pairs_do_not_count_even_when_they_are_most_alike() -> None:
    left, right, scale = unit(4, 0), unit(4, 1), torch.tensor(10.0)
    ignored = torch.zeros(4, 4, dtype=torch.bool)
    ignored[0, 1] = ignored[1, 0] = True
    loss = info_nce(left, right, scale, ignored=ignored)
    assert loss < info_nce(left, right, scale)
    eye = torch.eye(4, dtype=torch.bool)
    with_positives = info_nce(left, right, scale, eye, ignored | eye)
    assert torch.equal(loss, with_positives), "a positive is never ignored"


def test_a_row_without_positives_is_a_negative_only() -> None:
    left, right, scale = unit(5, 0), unit(3, 1), torch.tensor(5.0)
    positives = torch.eye(5, 3, dtype=torch.bool)
    loss = info_nce(left, right, scale, positives)
    forward_only_three = -F.log_softmax(5 * left[:3] @ right.T, 1).diagonal().mean()
    backward_all_five = -F.log_softmax(5 * right @ left.T, 1).diagonal().mean()
    assert torch.allclose(loss, (forward_only_three + backward_all_five) / 2)


def test_gradients_are_finite_at_the_sharpest_scale() -> None:
    rough = unit(6, 0).to(torch.bfloat16).float()
    for right in (rough, -rough, unit(6, 1)):
        left = rough.clone().requires_grad_(True)
        scale = torch.tensor(100.0, requires_grad=True)
        eye = torch.eye(6, dtype=torch.bool)
        nothing, everything = torch.zeros_like(eye), torch.ones_like(eye)
        for positives in (eye, eye & (torch.arange(6) < 2)):
            for ignored in (nothing, everything):  # then rows without a positive have no pair
                loss = info_nce(left, right, scale, positives, ignored)
                by_left, by_scale = torch.autograd.grad(loss, (left, scale))
                assert loss.isfinite()
                assert by_left.isfinite().all()
                assert by_scale.isfinite()


def test_assume_negative_is_what_one_computes_by_hand() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
    away = torch.tensor([[1.0, -1.0, 0.0]])
    taxon = torch.tensor([2, 0])

    def p(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    first = -4 * math.log(p(0.5)) - math.log(1 - p(2.0)) - math.log(1 - p(-1.0))
    second = -4 * math.log(p(0.0)) - math.log(1 - p(3.0)) - math.log(1 - p(-2.0))
    background = -math.log(1 - p(1.0)) - math.log(1 - p(-1.0)) - math.log(1 - p(0.0))
    wanted = ((first + second) / 2 + background) / (2 * 3)
    assert math.isclose(float(assume_negative(logits, taxon, away, 4.0)), wanted, rel_tol=1e-5)


def test_assume_negative_pulls_presences_up_and_all_else_down() -> None:
    logits = torch.full((2, 3), 80.0, requires_grad=True)
    away = torch.full((4, 3), -80.0, requires_grad=True)
    assume_negative(logits, torch.tensor([0, 1]), away, 3.0).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert away.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[[0, 1], [0, 1]] <= 0).all()
    assert (logits.grad[0, 1:] > 0).all()
    assert (away.grad >= 0).all()
