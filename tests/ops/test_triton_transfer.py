"""The Triton kernels of the transfer loss against its definition: losses and gradients, every configuration.

As in test_triton: in the interpreter and float64 on CPU, on the device in float32 and bfloat16 with CUDA.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise.ops import dispatch
from equipoise.ops.dispatch import BackendError, backend
from equipoise.ops.reference import transfer_cross_entropy_reference
from equipoise.ops.transfer_loss import transfer_cross_entropy
from equipoise.ops.types import Donor
from kernel_checks import TOLERANCES
from support import attention_inputs, normal, padding_mask, segments_of

pytest.importorskip("triton")
from equipoise.ops.triton import transfer
from equipoise.ops.triton.configs import CONFIGS, Config, using

SMALL = CONFIGS[-1]


class Setting:
    """One combination of settings and its inputs: two query heads on one key head."""

    def __init__(
        self, length: int, *, maps: int = 2, padding: str = "none", packed: bool = False, batch: int = 1,
        heads: int = 2, features: int = 7, signed: bool = False, size: int = 6, **options: Any,
    ) -> None:  # fmt: skip
        self.q, self.k, _ = attention_inputs(length, batch=batch, heads=heads, kv=1, size=size, seed=1)
        self.phi = [normal(batch, count, length, features, seed=s) for count, s in ((heads, 7), (maps, 8))]
        if not signed:
            self.phi = [x.exp() for x in self.phi]
        self.options = {"scale": 0.4, **options}
        self.masks = {
            "key_mask": padding_mask(padding, length, batch=batch),
            "segment_ids": segments_of(length, batch=batch, share=0.05) if packed else None,
        }
        self.weights = normal(batch, heads, length, seed=9)

    def found(self, place: tuple[str, torch.dtype], *, reference: bool = False) -> list[Tensor]:
        """Loss and gradients, in float64 on the CPU; the reference's from inputs rounded as ours are."""
        device, dtype = place
        given = [x.to(device, dtype, copy=True) for x in (self.q, self.k, *self.phi)]
        masks = {name: None if x is None else x.to(device) for name, x in self.masks.items()}
        if reference:
            given, masks = [x.double().cpu() for x in given], self.masks
        q, k, *phi = given
        phi = [x.requires_grad_() for x in phi]
        call = transfer_cross_entropy_reference if reference else transfer_cross_entropy
        loss = call(q, k, *phi, **self.options, **masks)
        assert loss.dtype == torch.promote_types(q.dtype, torch.float32)
        gradients = torch.autograd.grad((loss * self.weights.to(loss)).sum(), phi)
        return [x.detach().double().cpu() for x in (loss, *gradients)]


def check(setting: Setting, config: Config, place: tuple[str, torch.dtype]) -> None:
    with using(config):
        ours = setting.found(place)
    expected = setting.found(place, reference=True)
    for name, one, other in zip(("loss", "phi(q)", "phi(k)"), ours, expected, strict=True):
        tolerance = TOLERANCES[place[1]] * max(1.0, float(other.abs().max()))
        torch.testing.assert_close(
            one, other, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


MASKED = {"padding": "holes", "packed": True, "window": 19, "softcap": 2.0}


@pytest.mark.parametrize("maps", [1, 2])
@pytest.mark.parametrize(
    ("length", "options"),
    [(1, {}), (45, {}), (45, {"batch": 2, "padding": "left"}), (45, MASKED)],
    ids=["one", "plain", "left padding", "masked"],
)
def test_losses_and_gradients(
    length: int, options: dict[str, Any], maps: int, place: tuple[str, torch.dtype]
) -> None:
    check(Setting(length, maps=maps, **options), SMALL, place)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.chunk}-{config.keys}-{config.warps}")
@pytest.mark.parametrize("options", [{}, {**MASKED, "window": 83}], ids=["plain", "masked"])
def test_every_configuration(options: dict[str, Any], config: Config, place: tuple[str, torch.dtype]) -> None:
    """Several blocks of rows and keys; more features than a product or a gradient's block holds."""
    features = max(config.features + 5, 40)
    setting = Setting(3 * config.queries + 5, maps=1, heads=4, features=features, size=20, **options)
    check(setting, config, place)


def test_more_features_than_one_program_holds(
    place: tuple[str, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "WIDTH", 16)
    check(Setting(20, features=37), SMALL, place)


def test_products_below_the_floor_get_no_gradient(place: tuple[str, torch.dtype]) -> None:
    """Signed features: the clamp is inside the logarithm and the sum."""
    check(Setting(30, signed=True), SMALL, place)


def test_strided_inputs(place: tuple[str, torch.dtype]) -> None:
    """[B, T, H, D] transposed, as transformers passes them."""
    setting = Setting(20, batch=2)
    setting.q, setting.k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (setting.q, setting.k))
    check(setting, SMALL, place)


def test_padding_may_hold_anything(place: tuple[str, torch.dtype]) -> None:
    setting = Setting(20, batch=2, padding="left")
    clean = setting.found(place, reference=True)
    mask = setting.masks["key_mask"]
    assert mask is not None
    for tensor in (setting.q, setting.k, *setting.phi):
        tensor.masked_fill_(~mask[:, None, :, None], torch.nan)
    with using(SMALL):
        ours = setting.found(place)
    for one, other in zip(ours, clean, strict=True):
        tolerance = TOLERANCES[place[1]] * max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter is NumPy
@pytest.mark.parametrize("poisoned", ["donor", "features"])
def test_what_is_not_a_number_shows(poisoned: str, place: tuple[str, torch.dtype]) -> None:
    setting = Setting(9, batch=2)
    (setting.k if poisoned == "donor" else setting.phi[1])[0, :, 4] = torch.nan
    loss = setting.found(place)[0]
    assert loss[0, :, 4:].isnan().all()
    assert loss[0, :, :4].isfinite().all()
    assert loss[1].isfinite().all()


def test_half_precision() -> None:
    """Products of bfloat16 numbers, sums of float32."""
    if torch.cuda.is_available():
        pytest.skip("covered on the device")
    with backend("triton"):
        check(Setting(40), SMALL, ("cpu", torch.bfloat16))


def test_memory_is_linear_in_the_length(place: tuple[str, torch.dtype]) -> None:
    """Between forward and backward: the features and two numbers a row."""
    device, dtype = place
    setting, saved = Setting(40), list[Tensor]()
    q, k, *phi = (x.to(device, dtype) for x in (setting.q, setting.k, *setting.phi))
    phi = [x.requires_grad_() for x in phi]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        transfer_cross_entropy(q, k, *phi, scale=0.4)
    assert sorted(x.shape[-1] for x in saved) == [7, 7, 40, 40]
    assert all(x.numel() == 2 * 40 * (7 if x.shape[-1] == 7 else 1) for x in saved)


# ---- dispatch


def test_falling_back_is_said_once_and_refused_where_insisted_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` on CUDA, whose calls end here: see `dispatch.run_transfer`."""
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.setattr(dispatch, "_kernels", lambda: None)
    x = torch.rand(1, 1, 5, 16, device="cuda" if torch.cuda.is_available() else "cpu")
    with backend("triton"), pytest.raises(BackendError, match=r"equipoise\[gpu\]"):
        transfer_cross_entropy(x, x, x, x, scale=1.0)
    donor = Donor(q=x, k=x, scale=1.0)
    with caplog.at_level("INFO", logger="equipoise.ops"):
        losses = [dispatch._transfer_triton(x, x, donor, insist=False) for _ in range(2)]
    assert caplog.messages == [f"the slower general path runs: {dispatch.NOT_INSTALLED}"]
    with backend("walk"):
        assert torch.equal(losses[1], transfer_cross_entropy(x, x, x, x, scale=1.0))


def test_wide_heads_are_left_to_the_general_path() -> None:
    x = torch.rand(1, 1, 3, 300, device="cuda" if torch.cuda.is_available() else "cpu")
    with backend("triton"), pytest.raises(BackendError, match="head_dim above 256"):
        transfer_cross_entropy(x, x, x, x, scale=1.0)
