"""Imported LoLCATs checkpoints against a float64 evaluation of the published equations, and their forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from equipoise import branches
from equipoise.layers.interface import mixers_of
from equipoise.models.lolcats import LolcatsImport, LolcatsOptions, import_lolcats
from equipoise.models.storage import CheckpointError
from lolcats import (
    LAYERS,
    PROJECTIONS,
    RANK,
    WINDOW,
    D,
    H,
    distilled,
    evaluated,
    exact,
    hybrid_attention,
    published,
    published_code_masks,
    tuned,
    weights_of,
    window_of,
    written,
)
from support import random_tokens, tiny_model

TOKENS = random_tokens(1, 40)
EXACT = {"rtol": 0, "atol": 1e-9}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [written(tmp_path / "distill.pt", distilled()), written(tmp_path / "ft.pt", tuned())]


def imported(files: list[Path], donor: Path, output: Path, **options: Any) -> tuple[Any, LolcatsImport]:
    """Import, save, load again in float64: what a user runs."""
    model, about = import_lolcats(files, str(donor), LolcatsOptions(**{"window": WINDOW, **options}))
    model.save_pretrained(output, delta=True)
    return exact(output), about


def test_the_evaluation_itself_is_a_llama(donor_path: Path) -> None:
    def softmax(q: Tensor, k: Tensor, v: Tensor, i: int) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    with torch.no_grad():
        expected = exact(donor_path)(TOKENS).logits[0]
    torch.testing.assert_close(evaluated(weights_of(donor_path), TOKENS[0], softmax), expected, **EXACT)


# ---- fidelity


@pytest.mark.parametrize("affine", [False, True], ids=["shared", "affine"])
@pytest.mark.parametrize("layout", ["terraced", "sliding"])
def test_equals_the_published_equations(
    donor_path: Path, files: list[Path], tmp_path: Path, layout: str, affine: bool
) -> None:
    model, _ = imported(files, donor_path, tmp_path / "out", layout=layout, affine=affine)
    donor, state, lora = weights_of(donor_path), distilled(), tuned()
    for length in (1, 5, 6, 7, 12, 13, 18, 33, 40):
        with torch.no_grad():
            got = model(TOKENS[:, :length], use_cache=False).logits[0]
        expected = published(donor, TOKENS[0, :length], state, layout=layout, affine=affine, lora=lora)
        torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("layout", ["terraced", "sliding"])
def test_decoding_equals_the_published_equations(
    donor_path: Path, files: list[Path], tmp_path: Path, layout: str
) -> None:
    model, _ = imported(files, donor_path, tmp_path / "out", layout=layout)
    donor, state, lora = weights_of(donor_path), distilled(), tuned()
    greedy = {"max_new_tokens": 20, "do_sample": False, "output_scores": True, "eos_token_id": None}
    made = model.generate(TOKENS[:, :9], return_dict_in_generate=True, **greedy)
    logits = published(donor, made.sequences[0], state, layout=layout, affine=False, lora=lora)
    assert made.sequences.shape[1] == 29
    assert torch.equal(logits[8:-1].argmax(-1), made.sequences[0, 9:])
    torch.testing.assert_close(torch.cat(made.scores), logits[8:-1], check_dtype=False, rtol=0, atol=1e-5)
    cache = model.make_cache()
    with torch.no_grad():
        steps = [model(made.sequences[:, t : t + 1], past_key_values=cache).logits[0, 0] for t in range(29)]
    torch.testing.assert_close(torch.stack(steps), logits, **EXACT)


def test_without_lora(donor_path: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "distill.pt", distilled())
    model, about = imported([file], donor_path, tmp_path / "out")
    assert about.lora is None
    with torch.no_grad():
        got = model(TOKENS).logits[0]
    expected = published(weights_of(donor_path), TOKENS[0], distilled(), layout="terraced", affine=False)
    torch.testing.assert_close(got, expected, **EXACT)
    assert not (tmp_path / "out" / "lora").exists()


def test_alpha_is_the_options_or_twice_the_rank(donor_path: Path, files: list[Path], tmp_path: Path) -> None:
    assert imported(files, donor_path, tmp_path / "a")[1].lora == {
        "rank": RANK, "alpha": 2.0 * RANK, "alpha_assumed": True,
        "targets": [f"self_attn.{name}" for name in sorted(PROJECTIONS)],
    }  # fmt: skip
    model, about = imported(files, donor_path, tmp_path / "b", lora_alpha=4.5)
    assert about.lora is not None
    assert (about.lora["alpha"], about.lora["alpha_assumed"]) == (4.5, False)
    with torch.no_grad():
        got = model(TOKENS).logits[0]
    expected = published(
        weights_of(donor_path), TOKENS[0], distilled(), layout="terraced", affine=False, lora=tuned(),
        scaling=1.5,
    )  # fmt: skip
    torch.testing.assert_close(got, expected, **EXACT)


def test_the_donor_is_still_in_it(donor_path: Path, files: list[Path], tmp_path: Path) -> None:
    model, _ = imported(files, donor_path, tmp_path / "out")
    donor = exact(donor_path)
    with torch.no_grad(), branches(model, "softmax"):
        torch.testing.assert_close(model(TOKENS).logits, donor(TOKENS).logits, **EXACT)


def test_mistral_and_its_own_window(tmp_path: Path) -> None:
    """LoLCATs puts its attention in the place of Mistral's sliding window too."""
    place = tmp_path / "donor"
    tiny_model("mistral", sliding_window=9).save_pretrained(place)
    files = [written(tmp_path / "distill.pt", distilled()), written(tmp_path / "ft.pt", tuned())]
    model, about = imported(files, place, tmp_path / "out")
    assert about.hybrid.layers == "all"
    with torch.no_grad():
        got = model(TOKENS).logits[0]
    expected = published(
        weights_of(place), TOKENS[0], distilled(), layout="terraced", affine=False, lora=tuned()
    )
    torch.testing.assert_close(got, expected, **EXACT)


def test_where_the_published_code_and_the_published_equations_agree() -> None:
    """At whole blocks, from two on. Elsewhere the code's terraces hang on the length: not imitated here."""
    agree = []
    for length in range(1, 5 * WINDOW + 1):
        near, far = window_of(length, "terraced"), None
        far = torch.ones_like(near).tril() & ~near
        code_near, code_far = published_code_masks(length)
        if torch.equal(near, code_near) and torch.equal(far, code_far):
            agree.append(length)
    # up to two blocks one mask covers everything, wherever blocks begin
    assert agree == [*range(WINDOW + 1, 2 * WINDOW + 1), *range(3 * WINDOW, 5 * WINDOW + 1, WINDOW)]


# ---- forms of a checkpoint


@pytest.mark.parametrize(
    "prefix",
    ["model.", "", "base_model.model.model.", "_orig_mod.model.", "module.model.", "module._orig_mod.model."],
)
def test_prefixes(donor_path: Path, tmp_path: Path, prefix: str) -> None:
    state = {name.replace("model.", prefix, 1): tensor for name, tensor in distilled().items()}
    lora = {
        name.replace("base_model.model.model.", prefix).replace(".default", ""): tensor
        for name, tensor in tuned().items()
    }
    model, _ = import_lolcats(
        [written(tmp_path / "one.pt", {**state, **lora})], str(donor_path), LolcatsOptions(window=WINDOW)
    )
    own = model.state_dict()
    for i in range(LAYERS):
        place = f"model.layers.{i}.self_attn"
        weight = own[f"{place}.hybrid.phi_k.weight"]
        assert torch.equal(weight, distilled()[f"{place}.feature_map_k.mlp.layer"])
        up = own[f"{place}.v_proj.lora_B.default.weight"]
        assert torch.equal(up, tuned()[f"base_model.model.{place}.v_proj.lora_B.default.weight"])


def test_wrappers_inside_a_name(tmp_path: Path, donor_path: Path) -> None:
    state = {
        name.replace(".self_attn", "._fsdp_wrapped_module.self_attn"): t for name, t in distilled().items()
    }
    model, _ = import_lolcats([written(tmp_path / "a.pt", state)], str(donor_path))
    assert len(mixers_of(model)) == LAYERS


@pytest.mark.parametrize("form", ["flat", "model", "legacy", "safetensors", "bfloat16"])
def test_forms_of_a_file(donor_path: Path, tmp_path: Path, form: str) -> None:
    path, state = tmp_path / "anything", distilled()
    if form == "flat":
        torch.save(state, path)
    elif form == "model":
        torch.save({"model": state}, path)
    elif form == "legacy":
        torch.save({"model_state_dict": state}, path, _use_new_zipfile_serialization=False)
    elif form == "safetensors":
        save_file(state, path)
    else:
        state = {name: tensor.bfloat16() for name, tensor in state.items()}
        written(path, state)
    model, about = import_lolcats([path], str(donor_path))
    assert about.files[0]["tensors"] == 3 * LAYERS
    assert about.files[0]["bytes"] == path.stat().st_size
    weight = model.state_dict()["model.layers.1.self_attn.hybrid.phi_q.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, state["model.layers.1.self_attn.feature_map_q.mlp.layer"].float())


def test_a_file_per_layer_and_later_files_count(donor_path: Path, tmp_path: Path) -> None:
    state = distilled()
    parts = [{n: t for n, t in state.items() if f"layers.{i}." in n} for i in range(LAYERS)]
    again = {name: tensor + 1 for name, tensor in parts[0].items() if "window_factors" in name}
    same = {name: tensor.double() for name, tensor in parts[1].items()}
    files = [written(tmp_path / f"{i}.pt", part) for i, part in enumerate([*parts, again, same])]
    model, about = import_lolcats(files, str(donor_path))
    assert about.replaced == 1
    logit = model.state_dict()["model.layers.0.self_attn.hybrid.gate_logit"]
    assert torch.equal(logit, next(iter(again.values())).view(H, 1))


@pytest.mark.parametrize(("columns", "multiple"), [(D // 2, 1), (D, 2), (2 * D, 4)])
def test_shapes_give_the_feature_dimension(
    donor_path: Path, tmp_path: Path, columns: int, multiple: int
) -> None:
    file = written(tmp_path / "a.pt", distilled(columns=columns))
    model, about = import_lolcats([file], str(donor_path))
    assert (about.heads, about.head_dim, about.columns) == (H, D, columns)
    assert about.hybrid.feature_multiple == multiple
    assert mixers_of(model)[0].phi_q.weight.shape == (H, D, columns)


def test_what_is_recorded(donor_path: Path, files: list[Path], tmp_path: Path) -> None:
    telling = files[0].rename(tmp_path / "wsw=32-fd=16-layout=sliding-lora_alpha=64_distill.pt")
    _, about = import_lolcats([telling, files[1]], str(donor_path))
    hybrid = about.hybrid
    assert (hybrid.window, hybrid.layout, hybrid.feature_map) == (64, "terraced", "hedgehog")
    assert (hybrid.mixing, hybrid.overlap, hybrid.gate, hybrid.map_heads) == (
        "shared", False, "per_head", "query",
    )  # fmt: skip
    gammas = torch.cat([t for n, t in distilled().items() if "window_factors" in n]).sigmoid()
    assert list(about.gamma) == pytest.approx(
        [gammas.min().item(), gammas.mean().item(), gammas.max().item()], abs=1e-6
    )
    assert (about.layers, about.softmax_layers) == ((0, 1), ())
    assert [file["name"] for file in about.files] == [telling.name, "ft.pt"]
    assert all(len(file["sha256"]) == 64 for file in about.files)


def test_partial_conversions_are_said_explicitly(donor_path: Path, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in distilled().items() if "layers.1." in name}
    files = [written(tmp_path / "a.pt", state), written(tmp_path / "b.pt", tuned())]
    with pytest.raises(CheckpointError, match=r"no feature maps for 1 of 2 layers: 0\..*--allow-partial"):
        import_lolcats(files, str(donor_path))
    model, about = imported(files, donor_path, tmp_path / "out", allow_partial=True)
    assert (about.layers, about.softmax_layers, about.hybrid.layers) == ((1,), (0,), (1,))
    near = window_of(40, "terraced")
    far = torch.ones_like(near).tril() & ~near

    def attend(q: Tensor, k: Tensor, v: Tensor, i: int) -> Tensor:
        if i == 0:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return hybrid_attention(q, k, v, state, "model.layers.1.self_attn", near, far, False)

    with torch.no_grad():
        got = model(TOKENS).logits[0]
    torch.testing.assert_close(
        got, evaluated(weights_of(donor_path), TOKENS[0], attend, lora=tuned()), **EXACT
    )
