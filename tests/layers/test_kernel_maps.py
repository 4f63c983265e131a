"""Maps that approximate exp(q . k / sqrt(D)): Performer, Taylor, landmarks. Formulas, starts, limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from equipoise.layers.feature_maps import FEATURE_MAPS, FeatureMap, orthogonal_gaussian
from support import normal

DIM, HEADS = 8, 2
NAMES = ("performer", "taylor", "landmark")


def pair(name: str, features: int, *, seed: int = 0, maps: int = HEADS) -> tuple[FeatureMap, FeatureMap]:
    """The maps of queries and keys of one layer, started as the mixer starts them, in float64."""
    generator = torch.Generator().manual_seed(seed)
    phi_q, phi_k = FEATURE_MAPS[name](maps, DIM, features), FEATURE_MAPS[name](maps, DIM, features).for_keys()
    for phi in (phi_q, phi_k):
        phi.double().reset_parameters(generator)
    return phi_q, phi_k


def normalised(phi_q: Tensor, phi_k: Tensor) -> Tensor:
    weights = phi_q @ phi_k.mT
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_shapes(name: str, multiple: int) -> None:
    for phi in pair(name, multiple * DIM, maps=4):
        assert phi(normal(2, 4, 5, DIM)).shape == (2, 4, 5, multiple * DIM)
        assert phi(normal(2, 2, 0, DIM)).shape == (2, 4, 0, multiple * DIM)
        assert phi(normal(2, 4, 5, DIM, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_queries_keys_and_heads_start_alike(name: str) -> None:
    phi_q, phi_k = pair(name, 2 * DIM, seed=3)
    assert torch.equal(phi_q.weight, phi_k.weight)
    assert torch.equal(phi_q.weight[0], phi_q.weight[1])
    assert not torch.equal(phi_q.weight, pair(name, 2 * DIM, seed=4)[0].weight)


@pytest.mark.parametrize("name", NAMES)
def test_groups_share_keys(name: str) -> None:
    phi, k = pair(name, 2 * DIM, maps=4)[1], normal(2, 2, 5, DIM)
    torch.testing.assert_close(phi(k), phi(k.repeat_interleave(2, 1)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_positive_for_any_parameters(name: str) -> None:
    phi_q, phi_k = pair(name, 4 * DIM)
    with torch.no_grad():
        for parameter in (*phi_q.parameters(), *phi_k.parameters()):
            parameter.add_(normal(*parameter.shape, seed=5))
    q, k = 5 * normal(1, HEADS, 40, DIM), 5 * normal(1, HEADS, 40, DIM, seed=1)
    assert (phi_q(q) @ phi_k(k).mT).min() > 0


def test_performer() -> None:
    phi_q, phi_k = pair("performer", 2 * DIM)
    with torch.no_grad():  # away from where both are alike
        phi_k.weight.add_(normal(*phi_k.weight.shape, seed=9))
    x = normal(1, HEADS, 5, DIM)
    for phi in (phi_q, phi_k):
        for head in range(HEADS):
            for token in range(5):
                scaled = x[0, head, token] / DIM**0.25
                plain = torch.exp(scaled @ phi.weight[head] - scaled.dot(scaled) / 2) / (2 * DIM) ** 0.5
                if phi is phi_q:  # up to its largest feature
                    plain = plain / plain.max() / (2 * DIM) ** 0.5
                torch.testing.assert_close(phi(x)[0, head, token], plain)


def test_performer_directions_are_orthogonal_and_as_long_as_gaussian_ones() -> None:
    drawn = orthogonal_gaussian(DIM, 3 * DIM - 2, torch.Generator().manual_seed(0))
    assert drawn.shape == (DIM, 3 * DIM - 2)
    for block in drawn.split(DIM, 1):
        products = block.mT @ block
        torch.testing.assert_close(products, products.diagonal().diag(), rtol=0, atol=1e-12)
    many = orthogonal_gaussian(DIM, 4000, torch.Generator().manual_seed(0))
    assert many.square().sum(0).mean().item() == pytest.approx(DIM, rel=0.05)
    assert many.square().sum(0).var().item() == pytest.approx(2 * DIM, rel=0.15)  # chi-squared, D degrees
    assert many.mean(1).abs().max().item() < 0.05


def test_performer_estimates_the_softmax_kernel_without_bias() -> None:
    x = 0.5 * normal(1, 1, 6, DIM)
    expected = torch.exp(x @ x.mT / DIM**0.5)
    sums = torch.zeros_like(expected)
    for seed in range(200):
        features = pair("performer", 4 * DIM, seed=seed, maps=1)[1](
            x
        )  # of keys, which no maximum is taken off
        sums += features @ features.mT
    assert (sums / 200 / expected - 1).abs().max() < 0.1


@pytest.mark.parametrize("name", ["performer", "taylor"])
def test_more_features_come_closer_to_softmax(name: str) -> None:
    """Mean distance of rows in total variation, over seeds."""
    q, k = 0.6 * normal(1, HEADS, 30, DIM), 0.6 * normal(1, HEADS, 30, DIM, seed=1)
    expected = (q @ k.mT / DIM**0.5).softmax(-1)

    def distance(features: int) -> float:
        rows: list[Tensor] = []
        for seed in range(5):
            phi_q, phi_k = pair(name, features, seed=seed)
            rows.append((normalised(phi_q(q), phi_k(k)) - expected).abs().sum(-1) / 2)
        return torch.stack(rows).mean().item()

    largest = {"performer": 1024, "taylor": 1 + DIM + DIM**2}[name]
    assert distance(2 * DIM) > 0.1
    assert distance(largest) < 0.04


def test_taylor() -> None:
    for features, columns in ((DIM, 2), (2 * DIM, 3), (4 * DIM, 5), (73, 8)):
        phi_q, phi_k = pair("taylor", features)
        assert phi_q.weight.shape == (HEADS, DIM, columns)
        with torch.no_grad():
            phi_k.weight.add_(normal(*phi_k.weight.shape, seed=9))
        q, k = normal(1, HEADS, 5, DIM), normal(1, HEADS, 6, DIM, seed=1)
        s = (q @ phi_q.weight) @ (k @ phi_k.weight).mT / DIM**0.5
        torch.testing.assert_close(phi_q(q) @ phi_k(k).mT, 1 + s + s.square() / 2)
        used = 1 + columns + columns**2
        assert used <= features < 1 + (columns + 1) + (columns + 1) ** 2
        assert torch.equal(phi_q(q)[..., used:], torch.zeros(1, HEADS, 5, features - used, dtype=q.dtype))
    torch.testing.assert_close(  # as it starts, with all D directions, s is q . k / sqrt(D)
        pair("taylor", 73)[0](q) @ pair("taylor", 73)[1](k).mT,
        1 + q @ k.mT / DIM**0.5 + (q @ k.mT / DIM**0.5).square() / 2,
    )


def test_landmark() -> None:
    phi_q, phi_k = pair("landmark", 2 * DIM)
    assert phi_k.inverse is None
    with torch.no_grad():
        phi_k.weight.add_(0.1 * normal(*phi_k.weight.shape, seed=9))
    x = normal(1, HEADS, 5, DIM)
    for head in range(HEADS):
        landmarks = phi_q.weight[head].T
        similar = torch.exp((x[0, head] @ landmarks.T - landmarks.square().sum(1) / 2) / DIM**0.5)
        kernel = torch.exp(-(landmarks[:, None] - landmarks[None]).square().sum(-1) / (2 * DIM**0.5))
        expected = similar / similar.sum(-1, keepdim=True) @ torch.linalg.inv(kernel)
        torch.testing.assert_close(phi_q(x)[0, head], expected.clamp_min(1e-12), rtol=1e-3, atol=1e-4)
        landmarks = phi_k.weight[head].T
        similar = torch.exp((x[0, head] @ landmarks.T - landmarks.square().sum(1) / 2) / DIM**0.5)
        torch.testing.assert_close(phi_k(x)[0, head], similar)


def test_landmarks_attend_as_softmax_does() -> None:
    phi_q, phi_k = pair("landmark", 2 * DIM)
    q, k = phi_q.weight.detach().mT[None], normal(1, HEADS, 30, DIM)
    expected = (q @ k.mT / DIM**0.5).softmax(-1)
    torch.testing.assert_close(normalised(phi_q(q), phi_k(k)), expected, rtol=1e-3, atol=1e-5)
