"""What the interoperability tests share: fresh random adapters, models run on fixed inputs, and one
measure.

The witness on our side is always the base weights with `WeightAdapter.merged` applied; the witness
on the other side is the peer's forward pass after its own loader read our file. Both are run on the
same inputs.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from fixtures import bases
from peftsurgery.adapter import Adapter, members
from peftsurgery.algorithms import LoRA, WeightAdapter

Modules = Mapping[str, WeightAdapter]
LAYERS = (nn.Linear, nn.Conv2d, Conv1D, nn.Embedding)


def generator(seed: int) -> torch.Generator:
    """A seeded source of random numbers that leaves the global one alone."""
    return torch.Generator().manual_seed(seed)


def base_parts(base: str) -> dict[str, nn.Module]:
    """The models of a tiny base by component; a base that is one model is called `model`."""
    built = bases.BUILDERS[base]()
    if isinstance(built, nn.Module):
        return {"model": built}
    return {name: part for name, part in built.components.items() if isinstance(part, nn.Module)}


def here(model: nn.Module, path: str) -> str:
    """A home path as this model has it: transformers 5 has no `text_model` in CLIPTextModel."""
    return path if hasattr(model, "text_model") else path.removeprefix("text_model.")


def home(model: nn.Module, path: str) -> str:
    """The home path of a module of this model; inverse of `here`."""
    flat_clip = type(model).__name__ == "CLIPTextModel" and not hasattr(model, "text_model")
    return f"text_model.{path}" if flat_clip else path


def layers(model: nn.Module, *patterns: str) -> dict[str, nn.Module]:
    """Home path -> layer of every Linear, Conv2d, Conv1D and Embedding that matches one of
    `patterns` (all if none)."""
    return {
        home(model, name): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LAYERS)
        and (not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
    }


def weight_of(model: nn.Module, path: str) -> Tensor:
    """The weight of the layer at a home path."""
    weight = model.get_submodule(here(model, path)).weight
    assert isinstance(weight, Tensor)
    return weight


# fresh adapters -----------------------------------------------------------------------------------


def lora_for(weight: Tensor, rank: int, scale: float, random: torch.Generator) -> LoRA:
    """A random LoRA of W [o, i, *k] with ‖ΔW‖ = ‖W‖ / 5: down [r, i, *k], up [o, r, 1…]."""
    rows, rest = weight.shape[0], tuple(weight.shape[1:])
    down = torch.randn(rank, *rest, generator=random)
    up = torch.randn(rows, rank, *[1] * (weight.ndim - 2), generator=random)
    size = torch.linalg.vector_norm(up.reshape(rows, rank) @ down.reshape(rank, -1))
    factor = 0.2 * torch.linalg.vector_norm(weight) / (size * abs(scale))
    return LoRA(up=up * math.sqrt(factor), down=down * math.sqrt(factor), scale=scale)


def random_loras(
    found: Mapping[str, nn.Module],
    random: torch.Generator,
    *,
    ranks: Sequence[int] = (4, 2, 3),
    alphas: Sequence[float] = (4, 1, 8),
) -> dict[str, WeightAdapter]:
    """One random LoRA per layer; ranks and alphas go round in turn."""
    result: dict[str, WeightAdapter] = {}
    for index, (path, layer) in enumerate(found.items()):
        rank, alpha = ranks[index % len(ranks)], alphas[index % len(alphas)]
        weight = layer.weight
        assert isinstance(weight, Tensor)
        result[path] = lora_for(weight, rank, alpha / rank, random)
    return result


def adapter_of(architecture: str, parts: Mapping[str, Modules]) -> Adapter:
    """An adapter in memory from component -> home path -> module."""
    modules = {
        f"{name}:{path}": module for name, part in parts.items() for path, module in part.items()
    }
    return Adapter(modules, architecture)


# running models -----------------------------------------------------------------------------------


def inputs(model: nn.Module, seed: int = 7) -> dict[str, Tensor | dict[str, Tensor]]:
    """Fixed random inputs by the kind of model."""
    random = generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config, kind = inner.config, type(inner).__name__
    if kind == "UNet2DConditionModel":
        given: dict[str, Tensor | dict[str, Tensor]] = {
            "sample": normal(2, 4, 8, 8),
            "timestep": torch.tensor([30, 700]),
            "encoder_hidden_states": normal(2, 7, config.cross_attention_dim),
        }
        if config.addition_embed_type == "text_time":
            pooled = bases.CLIP_TEXT_2["projection_dim"]
            times = torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)
            given["added_cond_kwargs"] = {"text_embeds": normal(2, pooled), "time_ids": times}
        return given
    if kind == "FluxTransformer2DModel":
        row, column = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        places = torch.stack([torch.zeros(16), row.flatten(), column.flatten()], dim=-1)
        return {
            "hidden_states": normal(2, 16, inner.x_embedder.in_features),
            "encoder_hidden_states": normal(2, 7, config.joint_attention_dim),
            "pooled_projections": normal(2, config.pooled_projection_dim),
            "timestep": torch.tensor([0.3, 0.8]),
            "guidance": torch.full((2,), 3.5),
            "img_ids": places,
            "txt_ids": torch.zeros(7, 3),
        }
    return {"input_ids": torch.randint(3, config.vocab_size, (2, 11), generator=random)}


@torch.no_grad()
def run(model: nn.Module, changed: Mapping[str, Tensor] | None = None) -> Tensor:
    """The model's main output; with `changed`, these parameters take the place of its own."""
    given = inputs(model)
    output = model(**given) if changed is None else functional_call(model, dict(changed), (), given)
    for name in ("sample", "logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    raise RuntimeError(f"{type(model).__name__}: no known output in {list(output)}")


@torch.no_grad()
def merged(model: nn.Module, modules: Modules) -> dict[str, Tensor]:
    """Parameter name of `model` -> its value after `WeightAdapter.merged`; a group is merged as one
    fused weight."""
    result: dict[str, Tensor] = {}
    for path, adapter in modules.items():
        names = [here(model, member) for member in members(path)]
        found = [model.get_submodule(name) for name in names]
        weights = [layer.weight for layer in found if isinstance(layer.weight, Tensor)]
        biases = [b for b in (getattr(layer, "bias", None) for layer in found) if b is not None]
        one = len(found) == 1
        weight, bias = adapter.merged(
            weights[0] if one else torch.cat(weights),
            None if not biases else biases[0] if one else torch.cat(biases),
        )
        rows = [len(w) for w in weights]
        parts = (weight,) if one else weight.split(rows)
        result |= {f"{n}.weight": w for n, w in zip(names, parts, strict=True)}
        if bias is not None:
            parts = (bias,) if one else bias.split(rows)
            result |= {f"{n}.bias": b for n, b in zip(names, parts, strict=True)}
    return result


def run_merged(model: nn.Module, modules: Modules) -> Tensor:
    """The output of an untouched base with our merged weights."""
    return run(model, merged(model, modules))


def distance(actual: Tensor, expected: Tensor, base: Tensor) -> float:
    """‖actual − expected‖ over what the adapter changes, ‖expected − base‖, or a fifth of ‖base‖
    where that is more.

    The floor is for adapters that were hardly trained: fp32 runs differ by about 1e-6 of the
    output.
    """
    change = torch.linalg.vector_norm(expected - base)
    whole = torch.linalg.vector_norm(base)
    if not change > 2e-3 * whole:
        raise RuntimeError("the adapter hardly changes the output; nothing would be tested")
    return float(torch.linalg.vector_norm(actual - expected) / max(change, 0.2 * whole))
