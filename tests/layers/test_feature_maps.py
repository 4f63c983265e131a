"""Feature maps: sizes, initialisation, formulas."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from equipoise.config import HybridConfig
from equipoise.layers.feature_maps import FEATURE_MAPS, FeatureMap
from equipoise.layers.mixer import HybridMixer, LayerInputs
from equipoise.ops import Branches
from equipoise.registry import UnknownNameError
from support import normal

DIM = 8


def made(name: str, *, heads: int = 4, features: int = 2 * DIM, seed: int = 0) -> FeatureMap:
    phi = FEATURE_MAPS[name](heads, DIM, features)
    phi.reset_parameters(torch.Generator().manual_seed(seed))
    return phi.double()


def mixer(layer_idx: int = 0, seed: int = 0, **settings: object) -> HybridMixer:
    built = HybridMixer(HybridConfig(**settings), heads=4, kv_heads=2, head_dim=DIM, layer_idx=layer_idx)
    built.reset_parameters(seed)
    return built


@pytest.mark.parametrize("name", ["hedgehog", "hedgehog-joint", "exp", "relu", "elu", "none"])
@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_shapes(name: str, multiple: int) -> None:
    phi = made(name, features=multiple * DIM)
    columns = multiple * DIM // (2 if phi.two_sided else 1)
    assert phi.weight.shape == (4, DIM, columns)
    assert (phi.bias is not None) == (name == "relu")
    assert phi.two_sided == (name in ("hedgehog", "hedgehog-joint", "exp", "elu"))
    assert phi(normal(2, 4, 5, DIM)).shape == (2, 4, 5, multiple * DIM)
    assert phi(normal(2, 4, 0, DIM)).shape == (2, 4, 0, multiple * DIM)  # blocks may be empty


@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_starts_at_the_identity_plus_noise(multiple: int) -> None:
    phi = made("hedgehog", heads=64, features=multiple * DIM)
    columns = multiple * DIM // 2
    identity = torch.zeros(DIM, columns, dtype=torch.float64)
    for column in range(columns):
        identity[column % DIM, column] = 1  # cut off at D / 2 columns, repeated at 2 D
    noise = (phi.weight - identity).flatten()
    assert noise.std().item() == pytest.approx(0.1, rel=0.05)
    assert abs(noise.mean().item()) < 0.01
    assert torch.equal(made("relu").bias, torch.zeros(4, 1, 2 * DIM, dtype=torch.float64))


def test_initialisation_depends_on_seed_and_layer_only() -> None:
    torch.manual_seed(1)
    first = mixer(layer_idx=3, seed=7)
    torch.manual_seed(2)
    again = mixer(layer_idx=3, seed=7)
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(first.phi_q.weight, first.phi_k.weight)
    assert not torch.equal(first.phi_q.weight, mixer(layer_idx=4, seed=7).phi_q.weight)
    assert not torch.equal(first.phi_q.weight, mixer(layer_idx=3, seed=8).phi_q.weight)
    assert not torch.equal(first.phi_q.weight[0], first.phi_q.weight[1])


def test_initialisation_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    mixer()
    assert torch.equal(before, torch.get_rng_state())


def test_hedgehog() -> None:
    phi, x = made("hedgehog"), normal(2, 4, 5, DIM)
    projected = torch.einsum("bhtd,hdf->bhtf", x, phi.weight)
    expected = torch.cat([projected.softmax(-1), (-projected).softmax(-1)], -1)
    torch.testing.assert_close(phi(x), expected)
    far = phi(100 * x)
    assert far.min() == 1e-12
    assert torch.equal(far, phi(100 * x).clamp(1e-12))


def test_one_softmax_over_both_signs_can_let_a_pair_vanish() -> None:
    apart, joint, x = made("hedgehog"), made("hedgehog-joint"), normal(2, 4, 5, DIM)
    joint.load_state_dict(apart.state_dict())
    projected = torch.einsum("bhtd,hdf->bhtf", x, joint.weight)
    torch.testing.assert_close(joint(x), torch.cat([projected, -projected], -1).softmax(-1))
    # a query and a key that share no sign pattern, both far out
    joint.weight.data = torch.eye(DIM, dtype=x.dtype).expand_as(joint.weight).clone()
    apart.load_state_dict(joint.state_dict())
    q, k = (20 * torch.eye(DIM, dtype=x.dtype)[i].expand(1, 4, 1, DIM) for i in (0, 1))
    assert (joint(q) * joint(k)).sum(-1).max() < 1e-7
    assert (apart(q) * apart(k)).sum(-1).min() > 0.9 / DIM


def test_exp_maximum_cancels_in_queries_not_in_keys() -> None:
    phi, q, k, v = made("exp"), *(normal(1, 4, 6, DIM, seed=s) for s in range(3))
    both = torch.cat([q @ phi.weight, -(q @ phi.weight)], -1)
    top = both.amax(-1, keepdim=True)
    torch.testing.assert_close(phi(q), torch.exp(both - top))
    assert phi(q).max() == 1

    def attend(phi_q: torch.Tensor, phi_k: torch.Tensor) -> torch.Tensor:
        weights = (phi_q @ phi_k.mT).tril()
        return weights @ v / weights.sum(-1, keepdim=True)

    torch.testing.assert_close(attend(phi(q), phi(k)), attend(torch.exp(both), phi(k)))
    raw_keys = torch.exp(torch.cat([k @ phi.weight, -(k @ phi.weight)], -1))
    assert (attend(phi(q), phi(k)) - attend(phi(q), raw_keys)).abs().max() > 0.01


def test_relu_is_one_sided_and_learns_a_bias() -> None:
    phi, x = made("relu"), normal(1, 4, 5, DIM)
    with torch.no_grad():
        phi.bias.fill_(0.3)
    torch.testing.assert_close(phi(x), (x @ phi.weight + 0.3).relu())


def test_elu_and_none() -> None:
    x = normal(1, 4, 5, DIM)
    elu, none = made("elu"), made("none")
    projected = x @ elu.weight
    both = torch.cat([projected, -projected], -1)
    torch.testing.assert_close(elu(x), torch.where(both > 0, both + 1, both.exp()))
    torch.testing.assert_close(none(x), x @ none.weight)


@pytest.mark.parametrize("features", [DIM, 2 * DIM, 4 * DIM])
def test_products_of_neighbours(features: int) -> None:
    phi, x = made("dpfp", features=features), normal(2, 4, 5, DIM)
    projected = x @ phi.weight
    parts = torch.cat([projected, -projected], -1).clamp_min(0)
    products = torch.stack([parts[..., i] * parts[..., (i - 1) % features] for i in range(features)], -1)
    torch.testing.assert_close(phi(x), products / products.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(phi(3 * x), phi(x))
    phi.log_scale.data.fill_(0.5)
    torch.testing.assert_close(phi(x).norm(dim=-1), torch.full((2, 4, 5), 0.5).double().exp())
    keys = made("dpfp", features=features).for_keys()
    assert list(dict(keys.named_parameters())) == ["weight"]
    assert torch.equal(keys(x.double()), made("dpfp", features=features)(x))  # queries and keys start alike


@pytest.mark.parametrize("features", [DIM // 2, DIM, 2 * DIM])
def test_products_of_three(features: int) -> None:
    phi, x = made("trilinear", features=features), normal(2, 4, 5, DIM)
    with torch.no_grad():
        phi.log_scale.fill_(0.3)
    a, b, c = (torch.stack([x[0, 1, 2] @ w for w in part.T]) for part in phi.weight[1].split(features, -1))
    expected = a * b * c / (a * b * c).norm() * torch.tensor(0.3).exp()
    torch.testing.assert_close(phi(x)[0, 1, 2], expected)
    keys = made("trilinear", features=features).for_keys()
    assert keys.log_scale is None
    assert torch.equal(keys(x), made("trilinear", features=features)(x))  # queries and keys start alike
    torch.testing.assert_close(keys(-x), -keys(x))
    blocks = keys.weight[0].T.split(DIM)
    for block in blocks:  # of D directions at right angles to one another
        torch.testing.assert_close(block @ block.T, torch.eye(len(block)).double(), rtol=0, atol=1e-6)


def test_keys_half_alike_are_an_eighth_alike_in_products_of_three() -> None:
    phi = made("trilinear", heads=1, features=4096).for_keys()
    one, other = functional.normalize(normal(2, 1, 1, 200, DIM, seed=5), dim=-1)
    for alike in (0.5, 0.8):
        across = functional.normalize(other - (other * one).sum(-1, keepdim=True) * one, dim=-1)
        second = alike * one + (1 - alike**2) ** 0.5 * across
        found = (phi(one) * phi(second)).sum(-1).mean().item()
        assert found == pytest.approx(alike**3, abs=0.05)


def test_features_of_products_tell_more_keys_apart_than_linear_ones() -> None:
    """Of 2 D random keys, features to 2 D: overlaps of linear ones are those of D dimensions."""
    keys = normal(1, 1, 2 * DIM, DIM, seed=3)
    found: dict[str, float] = {}
    for name in ("unit", "dpfp", "trilinear"):
        features = made(name, heads=1, features=2 * DIM).for_keys()(keys)[0, 0]
        assert torch.linalg.matrix_rank(features) == (DIM if name == "unit" else 2 * DIM)
        overlaps = features @ features.mT
        found[name] = float((overlaps - torch.eye(2 * DIM)).square().mean().detach())
    assert found["dpfp"] < 0.8 * found["unit"]
    assert found["trilinear"] < 0.8 * found["unit"]


def test_a_key_without_features_writes_nothing() -> None:
    """Where three signs alternate all the way round, every product is 0, and so is its gradient."""
    phi = made("dpfp", heads=1, features=6).for_keys()
    phi.weight.data = torch.eye(DIM, 3).double()[None]
    x = torch.tensor([1.0, -2.0, 3.0, 0, 0, 0, 0, 0], dtype=torch.float64)[None, None, None].requires_grad_()
    out = phi(x)
    out.sum().backward()
    assert not out.any()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_maps_per_query_head_equal_repeating_the_keys() -> None:
    phi, k = made("hedgehog"), normal(2, 2, 5, DIM)
    torch.testing.assert_close(phi(k), phi(k.repeat_interleave(2, 1)), rtol=0, atol=0)


def test_map_heads_setting() -> None:
    per_query, per_key = mixer(), mixer(map_heads="key_value")
    assert per_query.phi_k.weight.shape[0] == 4
    assert per_key.phi_k.weight.shape[0] == 2
    assert per_key.phi_q.weight.shape[0] == 4
    assert per_key.phi_k(normal(1, 2, 3, DIM).float()).shape[1] == 2


def test_inputs_in_low_precision_are_mapped_in_theirs() -> None:
    phi = made("hedgehog").float()
    assert phi(normal(1, 4, 3, DIM, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert phi.weight.dtype == torch.float32


def test_odd_dimension_of_a_two_sided_map() -> None:
    with pytest.raises(ValueError, match="even feature dimension, got 7"):
        FEATURE_MAPS["hedgehog"](1, DIM, 7)


def test_unknown_map_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown feature map 'hedgehod'. Did you mean 'hedgehog'\?"):
        mixer(feature_map="hedgehod")


def test_constant_features_make_linear_attention_a_mean() -> None:
    settings = {"feature_map": "constant", "feature_dim": 1, "window": None}
    built = mixer(**settings).double()
    q, k, v = normal(2, 4, 9, DIM), normal(2, 2, 9, DIM, seed=1), normal(2, 2, 9, DIM, seed=2)
    assert not list(built.parameters())
    got, state = built.hybrid(LayerInputs(q, k, v, scale=1.0), keep_state=True)
    means = v.cumsum(2) / torch.arange(1, 10)[:, None]
    torch.testing.assert_close(got, means.repeat_interleave(2, 1))
    assert state is not None
    assert state.linear_state is not None
    assert state.linear_state.shape == (2, 4, 1, DIM)


def test_gated_constant_features_make_it_a_weighted_mean() -> None:
    built = mixer(feature_map="constant", feature_dim=1, window=None, write_gate="per_token").double()
    k, v = normal(2, 2, 9, DIM, seed=1), normal(2, 2, 9, DIM, seed=2)
    built.phi_k.write_weight.data = normal(4, DIM, seed=3)
    got, _ = built.hybrid(LayerInputs(normal(2, 4, 9, DIM), k, v, scale=1.0))
    scores = (k.repeat_interleave(2, 1) * built.phi_k.write_weight[:, None]).sum(-1)
    weights = scores[:, :, None].expand(-1, -1, 9, -1).masked_fill(torch.ones(9, 9).triu(1) > 0, -torch.inf)
    torch.testing.assert_close(got, weights.softmax(-1) @ v.repeat_interleave(2, 1))


@pytest.mark.parametrize("mixing", ["convex", "competing", "calibrated"])
@pytest.mark.parametrize("own", [{}, {"head_windows": (5, 2)}])
def test_the_window_alone_is_the_same_with_and_without_a_state(mixing: str, own: dict[str, object]) -> None:
    """Without one the linear branch is left out, not computed and dropped."""
    built = mixer(window=5, mixing=mixing, gate="per_token", linear_heads=(0, 3), **own).double()
    inputs = LayerInputs(normal(2, 4, 9, DIM), normal(2, 2, 9, DIM), normal(2, 2, 9, DIM, seed=2), scale=1.0)
    flags = Branches(linear=False, reading="renormalised")
    whole, state = built.hybrid(inputs, branches=flags, keep_state=True)
    alone, none = built.hybrid(inputs, branches=flags)
    assert state is not None
    assert any(part.linear_state is not None for part in (state, *state.others))  # to go on with both
    assert none is None
    torch.testing.assert_close(alone, whole)
    literal, _ = built.hybrid(inputs, branches=Branches(linear=False))
    assert not torch.allclose(literal, whole)
