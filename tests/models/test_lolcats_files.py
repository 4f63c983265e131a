"""What an import of LoLCATs checkpoints refuses: code, other files, and what does not fit the donor."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise.config import ConfigError
from equipoise.models.families import ConversionError
from equipoise.models.lolcats import LolcatsOptions, import_lolcats
from equipoise.models.lolcats_files import read_state
from equipoise.models.storage import CheckpointError
from lolcats import Attack, State, distilled, tuned, written
from support import tiny_model


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [written(tmp_path / "distill.pt", distilled()), written(tmp_path / "ft.pt", tuned())]


@pytest.mark.parametrize("protocol", [None, 2, 4])
def test_code_in_a_pickle_does_not_run(donor_path: Path, tmp_path: Path, protocol: int | None) -> None:
    path, mark = tmp_path / "evil.pt", tmp_path / "ran"
    if protocol is None:
        written(path, distilled(), extra=Attack(mark))
    else:
        path.write_bytes(pickle.dumps({"model_state_dict": Attack(mark)}, protocol=protocol))
    with pytest.raises(CheckpointError) as refused:
        import_lolcats([path], str(donor_path))
    assert not mark.exists()
    told = str(refused.value)
    assert told.startswith(f"{path}: ")
    if protocol == 4:  # torch does not even read that far
        assert "nothing in it was run" in told
    else:
        assert "refused: it holds more than tensors (posix.system)" in told
        assert "Nothing was run." in told
    assert "weights_only" not in told  # torch's own message advises to switch the protection off
    if protocol is None:
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert mark.exists()  # the attack itself works


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a checkpoint that can be read"),
        (b"\x00\x01\x02 nothing of the kind", "not a checkpoint that can be read"),
        (b"PK\x03\x04" + bytes(60), "not a checkpoint that can be read"),
        (b"\x10" + bytes(7) + b'{"a": 1', "not a complete safetensors file"),
    ],
    ids=["empty", "noise", "zip", "safetensors"],
)
def test_files_that_are_no_checkpoint(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_state(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "expected a state dict.*got an empty one"),
        ([torch.ones(1)], "got list"),
        ({"a": torch.ones(1), "b": 3}, "1 entries are not: b"),
        ({"a": torch.full((2,), float("nan"))}, "expected finite floating-point tensors only.*: a"),
        ({"a": torch.ones(2, dtype=torch.int8)}, "expected finite floating-point tensors only"),
    ],
    ids=str,
)
def test_contents_that_are_no_state_dict(tmp_path: Path, content: object, words: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=words):
        read_state(tmp_path / "a.pt")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found none"):
        read_state(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="found a directory"):
        read_state(tmp_path)


def without(state: State, part: str) -> State:
    return {name: tensor for name, tensor in state.items() if part not in name}


def changed(state: State, part: str, change: Callable[[Tensor], Tensor]) -> State:
    return {name: change(tensor) if part in name else tensor for name, tensor in state.items()}


MAPS, LORA = distilled(), tuned()
REFUSED: dict[str, tuple[State, str]] = {
    "unknown": (
        {**MAPS, **{f"model.layers.{i}.mlp.up_proj.weight": torch.ones(1) for i in range(7)}},
        r"7 of 13 names are others: layers.0.mlp.up_proj.weight, .*layers.4.mlp.up_proj.weight, …",
    ),
    "adapter-map": (
        {**MAPS, "model.layers.0.self_attn.feature_map_q.mlp.layer0": torch.ones(1)},
        "1 of 7 names are others: layers.0.self_attn.feature_map_q.mlp.layer0.",
    ),
    "other-owner": ({f"student.{name}": t for name, t in MAPS.items()}, "6 of 6 names are others: student"),
    "lora-only": (LORA, "hold no feature maps.*give its distillation checkpoint"),
    "no-keys": (without(MAPS, "1.self_attn.feature_map_k"), "layers.1.self_attn.feature_map_k.mlp.layer"),
    "no-factors": (without(MAPS, "window_factors"), "2 weights are missing.*layers.0.self_attn.window_fac"),
    "other-heads": (distilled(heads=8), r"H = 4 heads of D = 8, as .* has, got \[8, 8, 4\]"),
    "other-size": (distilled(size=16), r"got \[4, 16, 4\]. The checkpoint belongs to another donor"),
    "flat-map": (changed(MAPS, "feature_map", lambda t: t.flatten()), r"got \[128\]"),
    "mixed-columns": (
        changed(MAPS, "1.self_attn.feature_map_k", lambda t: t[..., :2]),
        r"layers.1.self_attn.feature_map_k: expected \[4, 8, 4\], got \[4, 8, 2\]; all layers",
    ),
    "factor-shape": (
        changed(MAPS, "0.self_attn.window_factors", lambda t: t.flatten()),
        r"layers.0.self_attn.window_factors: expected \[1, 4, 1, 1\], got \[4\]",
    ),
    "columns": (distilled(columns=3), r"3 columns give 6 features; equipoise has maps of 8, 16 and 32"),
    "too-many-layers": (distilled(layers=3), "for layers 2, but the donor has 2 layers"),
    "lora-layers": ({**MAPS, **without(LORA, "layers.1.")}, "in each of the donor's 2 layers, but layers 1"),
    "lora-half": (
        {**MAPS, **without(LORA, "layers.0.self_attn.k_proj.lora_B")},
        "layers.0.self_attn.k_proj: expected lora_A and lora_B, got lora_A only",
    ),
    "lora-module": (
        {**MAPS, **{name.replace("q_proj", "w_proj"): t for name, t in LORA.items()}},
        "layers.0.self_attn.w_proj: has LoRA, but is no linear module",
    ),
    "lora-shape": (
        {**MAPS, **changed(LORA, "v_proj.lora_B", lambda t: t[:8])},
        r"v_proj: expected lora_A \[r, 32\] and lora_B \[16, r\], got \[3, 32\] and \[8, 3\]",
    ),
    "lora-ranks": (
        {**MAPS, **tuned(targets=("q_proj",)), **without(tuned(rank=2), "q_proj")},
        r"expected LoRA of one rank, got 2 \(layers.0.self_attn.k_proj\), 3 \(layers.0.self_attn.q_proj\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_checkpoints_that_do_not_fit(donor_path: Path, tmp_path: Path, case: str) -> None:
    state, words = REFUSED[case]
    with pytest.raises(CheckpointError, match=words):
        import_lolcats([written(tmp_path / "a.pt", state)], str(donor_path))


def test_two_sets_of_lora(donor_path: Path, files: list[Path], tmp_path: Path) -> None:
    other = written(tmp_path / "other.pt", changed(tuned(), "lora_A", lambda t: t + 1))
    with pytest.raises(CheckpointError, match=r"other.pt: .*lora_A.* comes twice, with different values"):
        import_lolcats([*files, other], str(donor_path))
    import_lolcats([*files, files[1]], str(donor_path))  # the same again is no contradiction


def test_two_names_of_one_tensor_in_one_file(donor_path: Path, tmp_path: Path) -> None:
    state, name = distilled(), "model.layers.1.self_attn.window_factors"
    state[f"base_model.{name}"] = state[name].clone()
    import_lolcats([written(tmp_path / "a.pt", state)], str(donor_path))
    state[f"base_model.{name}"] += 1
    with pytest.raises(CheckpointError, match=r"a.pt: layers.1.self_attn.window_factors comes twice"):
        import_lolcats([written(tmp_path / "a.pt", state)], str(donor_path))


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_donors_that_lolcats_does_not_convert(tmp_path: Path, files: list[Path], kind: str) -> None:
    tiny_model(kind).save_pretrained(tmp_path / "donor")
    with pytest.raises(
        ConversionError, match=rf"a type that LoLCATs converts \(llama, mistral\), got {kind}"
    ):
        import_lolcats(files, str(tmp_path / "donor"))


def test_hybrids_are_no_donors(donor_path: Path, files: list[Path], tmp_path: Path) -> None:
    model, _ = import_lolcats(files, str(donor_path))
    model.save_pretrained(tmp_path / "out", delta=True)
    with pytest.raises(ConversionError, match="got equipoise_llama"):
        import_lolcats(files, str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="got adapters"):
        import_lolcats(files, str(tmp_path / "out" / "lora"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"feature_map": "exp"}, "feature_map: would not give the checkpoint's outputs.*off each sign"),
        ({"feature_map": "relu"}, "only hedgehog is the same formula"),
        ({"feature_map": "hedgehod"}, "Did you mean 'hedgehog'"),
        ({"layout": "rolling"}, "layout: .*'sliding' or 'terraced'"),
        ({"lora_alpha": 0.0}, "lora_alpha: .*greater than 0"),
    ],
    ids=str,
)
def test_options_that_cannot_be_used(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LolcatsOptions(**options)


def test_a_window_as_long_as_the_context(donor_path: Path, files: list[Path]) -> None:
    with pytest.raises(ConversionError, match="shorter than the donor's context of 512"):
        import_lolcats(files, str(donor_path), LolcatsOptions(window=512))
