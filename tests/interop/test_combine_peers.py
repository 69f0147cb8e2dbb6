"""combine beside PEFT's add_weighted_adapter: equal where PEFT's formula is the same on ΔW, and the
known differences pinned, so that a change on either side shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import merge_utils
from torch import Tensor

from fixtures import bases
from peftsurgery import combine, load_adapter

TARGETS = ["q_proj", "down_proj"]
RANKS = {"first": 3, "second": 5, "third": 2}
FOLDERS = dict[str, Path]


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> tuple[PeftModel, FOLDERS]:
    """A tiny Llama with three random LoRAs of unequal ranks and alphas, and their folders."""
    root = tmp_path_factory.mktemp("peers")
    base = bases.BUILDERS["tiny_llama"]()
    model: PeftModel | None = None
    generator = torch.Generator().manual_seed(5)
    for name, rank in RANKS.items():
        config = LoraConfig(r=rank, lora_alpha=rank + 2, target_modules=TARGETS)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)  # type: ignore[assignment]
        else:
            model.add_adapter(name, config)
    assert model is not None
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    for name in RANKS:
        model.save_pretrained(str(root), selected_adapters=[name])
    return model, {name: root / name for name in RANKS}


def layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Home path -> the LoRA layer PEFT put there."""
    found = {
        "model:" + name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert found
    return found


def theirs(
    model: PeftModel, kind: str, weights: Sequence[float], **options: object
) -> dict[str, Tensor]:
    """ΔW per module of PEFT's combination."""
    if "merged" in model.peft_config:
        model.delete_adapter("merged")
    model.add_weighted_adapter(
        list(RANKS), list(weights), "merged", combination_type=kind, **options
    )
    return {
        path: layer.get_delta_weight("merged").detach()  # type: ignore[operator]
        for path, layer in layers(model).items()
    }


def ours(
    folders: FOLDERS, out: Path, weights: Sequence[float], **options: object
) -> dict[str, Tensor]:
    combine(list(zip(folders.values(), weights, strict=True)), out, **options)  # type: ignore[arg-type]
    return {path: module.delta() for path, module in load_adapter(out).modules.items()}


def dense(model: PeftModel) -> dict[str, list[Tensor]]:
    """Every adapter's ΔW per module, by PEFT's own layers."""
    return {
        path: [layer.get_delta_weight(name).detach() for name in RANKS]  # type: ignore[operator]
        for path, layer in layers(model).items()
    }


def agree(found: dict[str, Tensor], expected: dict[str, Tensor], within: float) -> None:
    assert set(found) == set(expected)
    for path, delta in expected.items():
        assert float((found[path] - delta).norm() / delta.norm()) < within, path


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.9), (1.0, -0.7, 0.2)])
def test_linear_is_peft_cat(
    peers: tuple[PeftModel, FOLDERS], weights: tuple[float, ...], tmp_path: Path
) -> None:
    model, folders = peers
    agree(ours(folders, tmp_path / "o", weights), theirs(model, "cat", weights), 1e-5)


@pytest.mark.parametrize("rank", [2, 4])
def test_svd_is_peft_svd(peers: tuple[PeftModel, FOLDERS], rank: int, tmp_path: Path) -> None:
    model, folders = peers
    weights = (0.5, 0.3, 0.9)
    found = ours(folders, tmp_path / "o", weights, method="svd", rank=rank)
    agree(found, theirs(model, "svd", weights, svd_rank=rank), 1e-4)


@pytest.mark.parametrize("mode", ["total", "frequency"])
def test_ties_of_unit_weights_is_peft_ties_svd(
    peers: tuple[PeftModel, FOLDERS], mode: str, tmp_path: Path
) -> None:
    """PEFT votes with unweighted values and divides by the count: the same for weights of one."""
    model, folders = peers
    weights = (1.0, 1.0, 1.0)
    found = ours(
        folders, tmp_path / "o", weights, method="ties", density=0.4, majority_sign=mode, rank=6
    )
    options = {"density": 0.4, "majority_sign_method": mode, "svd_rank": 6}
    agree(found, theirs(model, "ties_svd", weights, **options), 1e-3)


def test_ties_of_other_weights_differs_from_peft_as_documented(
    peers: tuple[PeftModel, FOLDERS], tmp_path: Path
) -> None:
    model, folders = peers
    weights = (0.25, 0.25, 0.25)
    found = ours(folders, tmp_path / "o", weights, method="ties", density=0.4, rank=6)
    expected = theirs(model, "ties_svd", weights, density=0.4, svd_rank=6)
    # the votes are the same; PEFT divides Σ w x by the count, where we divide by Σ w
    agree({path: 0.25 * delta for path, delta in found.items()}, expected, 1e-3)


def test_magnitude_prune_is_peft_magnitude_prune_svd(
    peers: tuple[PeftModel, FOLDERS], tmp_path: Path
) -> None:
    model, folders = peers
    weights = (0.5, -0.3, 0.9)
    found = ours(folders, tmp_path / "o", weights, method="magnitude_prune", density=0.3, rank=6)
    agree(found, theirs(model, "magnitude_prune_svd", weights, density=0.3, svd_rank=6), 1e-3)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_has_the_mean_of_peft_dare(
    name: str, peers: tuple[PeftModel, FOLDERS], tmp_path: Path
) -> None:
    """Other random numbers, the same distribution: averages over seeds meet."""
    model, folders = peers
    path, deltas = next(iter(dense(model).items()))
    sources = list(zip(folders.values(), (1.0, 1.0, 1.0), strict=True))
    function = {"dare_linear": merge_utils.dare_linear, "dare_ties": merge_utils.dare_ties}[name]
    runs = 24
    torch.manual_seed(3)
    many = [function(deltas, torch.ones(3), 0.6) for _ in range(50 * runs)]
    expected = torch.stack(many).mean(0)
    found = torch.zeros_like(expected)
    for seed in range(runs):
        out = tmp_path / f"{seed}"
        combine(sources, out, method=name, density=0.6, seed=seed, normalize=name == "dare_ties",
                algorithm="full", to="lycoris")  # fmt: skip
        found += load_adapter(out).modules[path].delta() / runs
    gap = float((found - expected).norm() / expected.norm())
    once = function(deltas, torch.ones(3), 0.6)
    single = float((once - expected).norm() / expected.norm())
    assert gap < 1.5 * single / runs**0.5


def test_peft_linear_is_not_a_sum_of_changes(peers: tuple[PeftModel, FOLDERS]) -> None:
    """What we call linear is the sum; PEFT's "linear" refuses unequal ranks for a reason."""
    model, _ = peers
    with pytest.raises(ValueError, match="same r"):
        theirs(model, "linear", (0.5, 0.3, 0.9))


def test_peft_reads_the_result(peers: tuple[PeftModel, FOLDERS], tmp_path: Path) -> None:
    _, folders = peers
    weights = (0.5, 0.3, 0.9)
    out = tmp_path / "combined"
    expected = ours(folders, out, weights, rank="energy:0.9")
    fresh = PeftModel.from_pretrained(bases.BUILDERS["tiny_llama"](), str(out))
    found = {
        path: layer.get_delta_weight("default").detach()  # type: ignore[operator]
        for path, layer in layers(fresh).items()
    }
    agree(found, expected, 1e-5)
