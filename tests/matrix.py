"""The README's table of what every layout can hold, computed by converting small adapters."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import Full, LoHa, LoKr, LoRA, Replace, WeightAdapter
from peftsurgery.codec import save_adapter
from peftsurgery.errors import UnsupportedError
from peftsurgery.layouts import LAYOUTS
from peftsurgery.operations.convert import convert

EXACT = 1e-6
N = 16  # width of the toy weights
# family -> (component, modules); FLUX stores the three as one weight in its native names
MODULES = {
    "flux": ("transformer", [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]),
    "sdxl": (
        "unet",
        [f"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_{x}" for x in "qkv"],
    ),
}


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def _lora(rows: int = N, **options: object) -> LoRA:
    return LoRA(_random(rows, 4), _random(4, N), **options)  # pyright: ignore[reportArgumentType]


def _apart(
    make: Callable[[], WeightAdapter],
) -> Callable[[str, list[str]], dict[str, WeightAdapter]]:
    return lambda component, paths: {f"{component}:{path}": make() for path in paths}


def _lokr_shared(component: str, paths: list[str]) -> dict[str, WeightAdapter]:
    w2 = _random(4, 4)
    return {f"{component}:{path}": LoKr(w1=_random(4, 4), w2=w2) for path in paths}


def _fused(
    make: Callable[[], WeightAdapter],
) -> Callable[[str, list[str]], dict[str, WeightAdapter]]:
    def build(component: str, paths: list[str]) -> dict[str, WeightAdapter]:
        head = paths[0].removesuffix("to_q")
        return {f"{component}:{head}[to_q,to_k,to_v]": make()}

    return build


def _with_value(component: str, paths: list[str]) -> dict[str, WeightAdapter]:
    value = paths[0].replace("to_q", "to_out.0")
    return _apart(_lora)(component, paths) | {f"{component}:{value}": Replace(weight=_random(N, N))}


# column title -> (families, modules)
COLUMNS: dict[str, tuple[tuple[str, ...], Callable[[str, list[str]], dict[str, WeightAdapter]]]] = {
    "LoRA": (("flux", "sdxl"), _apart(_lora)),
    "LoRA, alpha != rank": (("flux", "sdxl"), _apart(lambda: _lora(scale=0.5))),
    "DoRA, norm per output": (
        ("flux", "sdxl"),
        _apart(lambda: _lora(magnitude=_random(N).abs(), magnitude_axis="out")),
    ),
    "DoRA, norm per input": (
        ("sdxl",),
        _apart(lambda: _lora(magnitude=_random(N).abs(), magnitude_axis="in")),
    ),
    "DoRA per input on fused q, k, v": (
        ("flux",),
        _fused(lambda: _lora(3 * N, magnitude=_random(N).abs(), magnitude_axis="in")),
    ),
    "LoHa": (
        ("flux", "sdxl"),
        _apart(lambda: LoHa(_random(N, 2), _random(2, N), _random(N, 2), _random(2, N))),
    ),
    "LoKr, q, k, v share w2": (("flux", "sdxl"), _lokr_shared),
    "LoKr, separate w2": (
        ("flux", "sdxl"),
        _apart(lambda: LoKr(w1=_random(4, 4), w2=_random(4, 4))),
    ),
    "LoKr on fused q, k, v, off its blocks": (
        ("flux",),
        _fused(lambda: LoKr(w1=_random(2, 4), w2=_random(24, 4))),
    ),
    "full difference": (("flux", "sdxl"), _apart(lambda: Full(diff=_random(N, N)))),
    "LoRA and a replaced weight": (("flux", "sdxl"), _with_value),
}


def table() -> str:
    """Markdown: one row per layout, one column per algorithm; FLUX and SDXL where they differ."""
    torch.manual_seed(0)
    layouts = [layout.name for layout in LAYOUTS if not layout.components]
    marks: dict[str, list[str]] = {name: [] for name in layouts}
    with tempfile.TemporaryDirectory() as folder:
        for families, build in COLUMNS.values():
            found: dict[str, list[str]] = {name: [] for name in layouts}
            for family in families:
                component, paths = MODULES[family]
                adapter = Adapter(build(component, paths), family)
                for name in layouts:
                    found[name].append(_cell(adapter, name, Path(folder)))
            for name in layouts:
                marks[name].append(" / ".join(dict.fromkeys(found[name])))
    lines = ["| to | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(marks[name]) + " |" for name in layouts]
    return "\n".join([*lines, "", LEGEND])


LEGEND = (
    "● exact · L refused, `--algorithm lora` (with `--rank` to limit it) rewrites it and states "
    "the loss · "
    "B needs `--base CHECKPOINT`: a DoRA is baked in with `--algorithm lora` or `full`, a replaced "
    "weight becomes a "
    "difference · – no place for it. "
    "Two marks: FLUX / SDXL."
)


def _cell(adapter: Adapter, layout: str, folder: Path) -> str:
    source, target = folder / "source.safetensors", folder / "target"
    for holds in ("comfy", "onetrainer"):  # the second stores q, k and v apart
        try:
            save_adapter(adapter, source, layout=holds, overwrite=True)
            break
        except UnsupportedError:
            continue
    result = target if layout == "peft" else target.with_suffix(".safetensors")
    try:
        report = convert(
            source, result, to=layout, architecture=adapter.architecture, overwrite=True
        )
    except UnsupportedError as error:
        if "--base" in str(error):
            return "B"
        return "L" if "--algorithm lora" in str(error) else "–"
    return "●" if report.largest_error < EXACT else f"{report.largest_error:.0e}"
