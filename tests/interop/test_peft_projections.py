"""PEFT's AdaLoRA, VeRA, FourierFT, C3A, MiSS (Bone) and SHiRA: its merged weights and its outputs
against ours, from folders it wrote; and it reads the folders we write."""

# peft is typed loosely
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import (
    PeftModel,
)
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.func import functional_call

from peftsurgery import load_adapter, save_adapter
from peftsurgery.algorithms.layer import Layer
from tests.interop.projections import (
    CASES,
    PREFIXES,
    WITHIN,
    applied,
    error,
    inputs,
    saved_base,
    trained,
)


@pytest.mark.parametrize("name", CASES)
def test_weights_and_outputs_are_those_of_peft(name: str, tmp_path: Path) -> None:
    base, model = trained(name)
    with torch.no_grad():
        peft_output = model(*inputs())
    model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path, architecture="generic", base=saved_base(base, tmp_path))
    assert len(adapter.modules) == len(CASES[name][1])
    state = applied(base, adapter)
    merged = deepcopy(model).merge_and_unload().state_dict()
    for key, wanted in merged.items():
        before = base.state_dict()[key]
        assert error(state[key], wanted) < WITHIN, key
        if not torch.equal(before, wanted):
            assert error(state[key] - before, wanted - before) < 20 * WITHIN, key
    moved = sum(not torch.equal(state[k], t) for k, t in base.state_dict().items())
    assert moved == len(CASES[name][1])
    ours = functional_call(base, state, inputs())
    for found, wanted in zip(ours, peft_output, strict=True):
        assert error(found, wanted) < 3 * WITHIN


@pytest.mark.parametrize("name", CASES)
def test_the_cheap_path_is_that_of_peft(name: str, tmp_path: Path) -> None:
    base, model = trained(name)
    model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path, architecture="generic", base=saved_base(base, tmp_path))
    module = adapter.modules["transformer:first"].on((36, 24))
    if module.side != "sum":
        assert module.algorithm == "bat"
        return
    x = inputs()[0]
    layer = next(m for n, m in model.named_modules() if n.endswith("model.first"))
    with torch.no_grad():
        wanted = layer(x) - base.first(x)
        assert error(module.change(x, Layer("linear")), wanted) < 10 * WITHIN


@pytest.mark.parametrize("name", CASES)
def test_peft_reads_what_we_write(name: str, tmp_path: Path) -> None:
    base, model = trained(name)
    model.save_pretrained(tmp_path / "peft")
    ours = tmp_path / "ours"
    save_adapter(load_adapter(tmp_path / "peft", architecture="generic"), ours, layout="peft")
    with torch.no_grad():
        wanted = model(*inputs())
    again = PeftModel.from_pretrained(deepcopy(base), str(ours)).eval()
    result = set_peft_model_state_dict(again, load_peft_weights(str(ours)))
    assert not result.unexpected_keys
    missing = [k for k in result.missing_keys if any(p in k for p in PREFIXES)]
    assert all(k.startswith("base_model.model.") and ".vera_" in k for k in missing)  # references
    assert not [k for k in missing if "lambda" in k]
    with torch.no_grad():
        for found, expected in zip(again(*inputs()), wanted, strict=True):
            assert torch.equal(found, expected) or error(found, expected) < 1e-6
    files = [load_file(f / "adapter_model.safetensors") for f in (tmp_path / "peft", ours)]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(t, files[1][k]) for k, t in files[0].items())
    own = json.loads((ours / "adapter_config.json").read_text(encoding="utf-8"))
    theirs = json.loads((tmp_path / "peft" / "adapter_config.json").read_text(encoding="utf-8"))
    for field, value in own.items():
        if field == "inference_mode" or (field == "lora_alpha" and theirs[field] <= 0):
            continue  # PEFT takes an alpha of 0 for the rank, and writes it as 0
        if field in ("n_frequency", "n_frequency_pattern", "block_size_pattern", "block_size"):
            continue  # the usual number may be another one
        if isinstance(value, list):
            value, theirs[field] = sorted(value), sorted(theirs[field])
        assert value == theirs[field], field
