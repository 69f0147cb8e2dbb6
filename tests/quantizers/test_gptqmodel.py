"""Weights that GPTQModel packed: read as GPTQModel reads them, bit for bit, and kept as they are.

`fixtures/packed_gptqmodel.py` made them, and tells how GPTQModel opens what the toolkit writes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.quantizers.integer_files import check_merged, check_rows, check_unchanged, folder, only

PACKED = Path(__file__).parents[2] / "fixtures" / "packed" / "gptqmodel.safetensors"
NAME = "model.layers.0.mlp.down_proj"
with safe_open(PACKED, framework="pt") as file:
    CONFIGS = {case: json.loads(text) for case, text in sorted(file.metadata().items())}
    TENSORS = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("case", CONFIGS)
def test_reads_what_gptqmodel_packed(tmp_path: Path, rng: torch.Generator, case: str) -> None:
    parts = {k.partition("/")[2]: t for k, t in TENSORS.items() if k.partition("/")[0] == case}
    weight = parts.pop("weight")
    stored = {f"{NAME}.{part}": tensor for part, tensor in parts.items()}
    packed = only(folder(tmp_path, stored, CONFIGS[case]))
    assert packed.format.name == CONFIGS[case]["quant_method"]
    assert packed.native == "F16"
    assert torch.equal(packed.dequantize().half(), weight)
    check_unchanged(packed)
    check_rows(packed)
    check_merged(packed, rng)


def test_every_form_of_the_format_is_there() -> None:
    gptq = [config for config in CONFIGS.values() if config["quant_method"] == "gptq"]
    forms = {(c["bits"], c["desc_act"], c["sym"], c["checkpoint_format"]) for c in gptq}
    assert len(forms) == len(gptq) == 32
    assert {c["group_size"] for c in CONFIGS.values()} == {32, 64}
