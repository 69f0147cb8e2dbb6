"""Files written by PEFT, LyCORIS and diffusers: ΔW is what those libraries computed, before and
after every conversion.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fixtures import bases
from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import WeightAdapter
from peftsurgery.codec import load_adapter
from peftsurgery.errors import UnsupportedError
from peftsurgery.layouts import LAYOUT_NAMES
from peftsurgery.operations.convert import convert
from tests.codec.build import FIXTURES, gap

GOLDEN = FIXTURES / "golden"
GOLDENS: dict[str, dict] = json.loads((GOLDEN / "index.json").read_text("utf-8"))["goldens"]
ARCHITECTURES = {
    f"tiny_{n}_pipeline": a for n, a in (("sd", "sd1"), ("sdxl", "sdxl"), ("flux", "flux"))
}
KOHYA = {"kohya", "kohya-ldm", "kohya-hf", "lycoris", "comfy", "onetrainer", "onetrainer-kohya"}
LLM = {"peft", "lycoris"}
AB = {"onetrainer-original", "onetrainer-comfy"}
DIFFUSERS = {"peft", "diffusers", "diffusers-dot"}

# golden -> layouts that can hold it; all others must refuse
HELD = {
    "peft_llama_bias_all": {"peft"},
    "peft_llama_modules_to_save": {"peft"},
    "peft_llama_embedding": {"peft"},
    "peft_llama_replication": {"peft"},
    "lycoris_lora": KOHYA | AB | DIFFUSERS | {"ai-toolkit"},
    "lycoris_lora_fp16": KOHYA | AB | DIFFUSERS | {"ai-toolkit"},
    "lycoris_lora_tucker": KOHYA,
    "lycoris_lora_text_encoder": (KOHYA | DIFFUSERS | {"ai-toolkit", "onetrainer-comfy"}),
    "lycoris_kohya_rslora": (KOHYA - {"lycoris"}) | DIFFUSERS | {"ai-toolkit", "onetrainer-comfy"},
    "lycoris_loha": KOHYA | AB | {"peft"},
    "lycoris_loha_tucker": KOHYA | AB | {"peft"},
    "lycoris_lokr": KOHYA | AB | {"ai-toolkit", "peft"},
    "lycoris_lokr_full": KOHYA | AB | {"ai-toolkit"},
    "lycoris_lokr_tucker": KOHYA | AB | {"ai-toolkit", "peft"},
    "lycoris_dora_out": KOHYA | AB | {"peft", "diffusers", "ai-toolkit"},
    "lycoris_dora_in": KOHYA | AB,
    "lycoris_full_norm": KOHYA,
    "diffusers_sd_dora": KOHYA | AB | {"peft", "diffusers", "ai-toolkit"},
    "diffusers_flux_lora": KOHYA | AB | DIFFUSERS | {"ai-toolkit", "bfl", "fal-kontext"},
}
OTHERS = (KOHYA - {"lycoris"}) | DIFFUSERS | {"ai-toolkit", "onetrainer-comfy"}


def held(name: str) -> set[str]:
    """Layouts that can hold a golden."""
    if name in HELD:
        return HELD[name]
    if name == "diffusers_sd_lora_no_metadata":  # attention projections only
        return OTHERS | {"diffusers-old"}
    return LLM if name.startswith("peft_") else OTHERS


@cache
def base(name: str) -> torch.nn.Module:
    """A tiny base model."""
    return bases.BUILDERS[name]()


def stored(golden: dict, key: str) -> torch.Tensor:
    """The base weight an oracle belongs to."""
    component, _, name = key.rpartition(":")
    model = getattr(base(golden["base"]), component) if component else base(golden["base"])
    weights = model.state_dict()
    if name not in weights:  # replicated layers 2 and 3 are layers 0 and 1 again
        name = name.replace("layers.2", "layers.0").replace("layers.3", "layers.1")
    return weights[name]


def module_of(adapter: Adapter, key: str) -> WeightAdapter:
    """The module an oracle tensor belongs to, with or without CLIP's `text_model` level."""
    component, _, name = key.rpartition(":")
    path = name.rpartition(".")[0]
    found = [
        module
        for full, module in adapter.modules.items()
        if full.partition(":")[2].removeprefix("text_model.") == path.removeprefix("text_model.")
        and full.startswith(component)
    ]
    assert len(found) == 1, key
    return found[0]


def assert_oracle(name: str, adapter: Adapter, tolerance: float | None = None) -> None:
    """Every oracle tensor of a golden agrees with what the adapter does to the base."""
    golden = GOLDENS[name]
    limit = tolerance or (1e-3 if golden["oracle_dtype"] == "float16" else 2e-6)
    for key, oracle in load_file(GOLDEN / golden["oracle"]).items():
        module, weight = module_of(adapter, key), stored(golden, key)
        if key.endswith(".bias"):
            merged = module.merged(stored(golden, key[: -len("bias")] + "weight"), weight)[1]
            assert merged is not None
            change = merged - weight
        else:
            change = module.delta(weight)
        assert change.shape == weight.shape
        assert gap(change.double().numpy(), oracle.double().numpy()) < limit, key


@pytest.mark.parametrize("name", GOLDENS)
def test_decoded_changes_are_the_library_s_own(name: str) -> None:
    architecture = ARCHITECTURES.get(GOLDENS[name]["base"])
    assert_oracle(name, load_adapter(GOLDEN / GOLDENS[name]["path"], architecture=architecture))


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("name", GOLDENS)
def test_changes_survive_every_layout(name: str, layout: str, tmp_path: Path) -> None:
    source = GOLDEN / GOLDENS[name]["path"]
    architecture = ARCHITECTURES.get(GOLDENS[name]["base"])
    there = tmp_path / ("out" if layout == "peft" else "out.safetensors")
    if layout not in held(name):
        with pytest.raises(UnsupportedError, match=f"cannot be written as {layout}: .*\\."):
            convert(source, there, to=layout, architecture=architecture)
        assert not list(tmp_path.iterdir())
        return
    report = convert(source, there, to=layout, architecture=architecture)
    folded = layout == "ai-toolkit" and GOLDENS[name]["dtype"] != "float32"  # scale in fp16 factors
    assert_oracle(name, load_adapter(there, architecture=architecture), 1e-3 if folded else None)
    assert report.largest_error < (1e-3 if folded else 2e-6)
