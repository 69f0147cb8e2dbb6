"""Adapters of random numbers in the shapes of real listings, and ΔW computed without the package.

The formulas are written out here in fp64 numpy, so that a conversion is never judged by the code
that made it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from peftsurgery.algorithms import LoHa, LoKr, LoRA, WeightAdapter

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
KEYS = FIXTURES / "keys"
Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, torch.Tensor]

RANK_FIRST = ("lora_A.weight", "lora_down.weight", "lora.down.weight", ".down.weight", ".down")
RANK_LAST = ("lora_B.weight", "lora_up.weight", "lora.up.weight", ".up.weight", ".up")


def listing(name: str) -> dict:
    """One key listing of fixtures/keys, as it is stored."""
    return json.loads((KEYS / f"{name}.json").read_text(encoding="utf-8"))


def shapes_of(name: str) -> Shapes:
    """Key -> shape of one listing."""
    keys = listing(name)["keys"]
    found: Shapes = {}
    for key, value in keys.items():
        found[key] = tuple(value[0] if value and isinstance(value[0], list) else value)
    return found


def thinned(shapes: Shapes, rank: int) -> Shapes:
    """The same LoRA at a smaller rank; inputs and outputs keep their real sizes."""
    result = {}
    for key, shape in shapes.items():
        if key.endswith(RANK_FIRST):
            shape = (min(rank, shape[0]), *shape[1:])
        elif key.endswith(RANK_LAST):
            shape = (shape[0], min(rank, shape[1]), *shape[2:])
        result[key] = shape
    return result


def narrowed(shapes: Shapes, divisor: int = 64) -> Shapes:
    """The same model, narrower; sizes of 256 and more that `divisor` divides are widths."""
    return {
        k: tuple(n // divisor if n >= 256 and n % divisor == 0 else n for n in shape)
        for k, shape in shapes.items()
    }


def filled(shapes: Shapes, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    """Seeded normal numbers in these shapes; alphas run from 1 to 8, whatever the rank;
    places are whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for index, (key, shape) in enumerate(shapes.items()):
        if key.endswith(".alpha"):
            tensors[key] = torch.tensor(float(1 + index % 8))
        elif key.endswith(".shira_indices"):
            tensors[key] = torch.randint(0, 8, shape, generator=generator, dtype=torch.int32)
        else:
            tensors[key] = torch.randn(shape, generator=generator).to(dtype)
    return tensors


def write(path: Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> Path:
    """A file written by the safetensors library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, path, metadata or None)
    return path


def read(path: Path) -> dict[str, np.ndarray]:
    """A file or PEFT folder read by the safetensors library, as fp64."""
    if path.is_dir():
        files = sorted(path.rglob("*.safetensors"))
        names = [str(f.parent.relative_to(path)) for f in files]
        found = {}
        for file, name in zip(files, names, strict=True):
            prefix = "" if name == "." else f"{name}:"
            found |= {prefix + k: t.double().numpy() for k, t in load_file(file).items()}
        return found
    return {k: t.double().numpy() for k, t in load_file(path).items()}


# (listing, prefix in it, prefix of the Kohya file) of each component; the listings name real
# checkpoints
FULL_KOHYA = {
    "sd1 ldm": (
        ("base__sdmecha_sd1-ldm", "model.diffusion_model.", "lora_unet_"),
        ("base__sdmecha_sd1-ldm", "cond_stage_model.transformer.", "lora_te_"),
    ),
    "sd1 hf": (
        ("base__sdmecha_sd1-kohya", "unet.", "lora_unet_"),
        ("base__sdmecha_sd1-kohya", "te.", "lora_te_"),
    ),
    "sd2 hf": (
        ("base__diffusers_sd21_unet", "", "lora_unet_"),
        ("base__transformers_clip_h", "", "lora_te_text_model_"),
    ),
    "sdxl ldm": (
        ("base__sdmecha_sdxl-kohya", "unet.", "lora_unet_"),
        ("base__sdmecha_sdxl-kohya", "te1.", "lora_te1_"),
        ("base__sdmecha_sdxl-kohya", "te2.", "lora_te2_"),
    ),
    "sdxl hf": (
        ("base__sdmecha_sdxl-kohya_but_diffusers", "unet.", "lora_unet_"),
        ("base__sdmecha_sdxl-kohya_but_diffusers", "te1.", "lora_te1_"),
        ("base__sdmecha_sdxl-kohya_but_diffusers", "te2.", "lora_te2_"),
    ),
}


def full_kohya(style: str, *, rank: int = 2, divisor: int = 32) -> Shapes:
    """A Kohya LoRA on every linear and convolution of a checkpoint, `divisor` times narrower."""
    result: Shapes = {}
    for name, prefix, written in FULL_KOHYA[style]:
        for key, shape in narrowed(shapes_of(name), divisor).items():
            module = key.removeprefix(prefix).removesuffix(".weight")
            wanted = key.startswith(prefix) and key.endswith(".weight") and len(shape) >= 2
            if not wanted or "embedding" in module.rpartition(".")[2]:
                continue
            flat, (out, *rest) = written + module.replace(".", "_"), list(shape)
            result[f"{flat}.lora_down.weight"] = (rank, *rest)
            result[f"{flat}.lora_up.weight"] = (out, rank, *[1] * (len(rest) - 1))
            result[f"{flat}.alpha"] = ()
    return result


def lora_product(up: np.ndarray, down: np.ndarray, mid: np.ndarray | None = None) -> np.ndarray:
    """up @ down, with the Tucker core between them; (o, i·k)."""
    up = up.reshape(up.shape[0], -1)
    if mid is None:
        return up @ down.reshape(down.shape[0], -1)
    core = mid.reshape(mid.shape[0], mid.shape[1], -1)
    full = np.einsum("om,mnk,ni->oik", up, core, down.reshape(down.shape[0], -1))
    return full.reshape(up.shape[0], -1)


def loha_product(t: Mapping[str, np.ndarray]) -> np.ndarray:
    """(w1_a w1_b) ⊙ (w2_a w2_b); (o, i·k)."""

    def half(n: int) -> np.ndarray:
        a, b, core = t[f"w{n}_a"], t[f"w{n}_b"], t.get(f"t{n}")
        if core is None:
            return a @ b.reshape(b.shape[0], -1)
        core = core.reshape(core.shape[0], core.shape[1], -1)
        return np.einsum("mo,mnk,ni->oik", a, core, b).reshape(a.shape[1], -1)

    return half(1) * half(2)


def lokr_product(t: Mapping[str, np.ndarray]) -> np.ndarray:
    """w1 ⊗ w2; (o, i·k)."""
    w1 = t["w1"] if "w1" in t else t["w1_a"] @ t["w1_b"]
    if "w2" in t:
        w2 = t["w2"]
    elif "t2" in t:
        w2 = np.einsum("mb,mn...,nd->bd...", t["w2_a"], t["t2"], t["w2_b"])
    else:
        w2 = t["w2_a"] @ t["w2_b"].reshape(t["w2_b"].shape[0], -1)
    tail = w2.shape[2:]
    first = w1.reshape(*w1.shape[:2], *[1] * len(tail))
    full = np.kron(first, w2)
    return full.reshape(full.shape[0], -1)


def dense(module: WeightAdapter) -> np.ndarray:
    """ΔW of an additive record before DoRA, (o, i·k) in fp64, from its tensors and scale alone."""
    t = {k: v.detach().double().numpy() for k, v in module.tensors().items()}
    scale = float(module.scale)
    if isinstance(module, LoRA):
        return scale * lora_product(t["up"], t["down"], t.get("mid"))
    if isinstance(module, LoHa):
        return scale * loha_product(t)
    if isinstance(module, LoKr):
        return scale * lokr_product(t)
    value = next((t[n] for n in ("diff", "weight") if n in t), None)
    if value is None:
        return np.zeros((module.shape[0], 1))
    return scale * value.reshape(value.shape[0], -1)


def gap(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / max(||a||, ||b||), 0 for two zeros."""
    size = max(float(np.linalg.norm(a)), float(np.linalg.norm(b)))
    return float(np.linalg.norm(a - b)) / size if size else 0.0


def probe(module: WeightAdapter, vectors: np.ndarray) -> np.ndarray:
    """ΔW @ vectors (i·k, n) in fp64, without a dense ΔW where the module is a plain LoRA."""
    if isinstance(module, LoRA) and module.mid is None:
        up = module.up.detach().double().numpy().reshape(module.up.shape[0], -1)
        down = module.down.detach().double().numpy().reshape(module.down.shape[0], -1)
        return float(module.scale) * (up @ (down @ vectors))
    return dense(module) @ vectors
