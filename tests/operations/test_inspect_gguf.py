"""inspect of a GGUF file, and of an adapter against one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import peftsurgery as ps
from peftsurgery.checkpoint.ggml import READABLE
from peftsurgery.quantizers.gguf_view import GGUF_FORMATS


@pytest.fixture
def base(tmp_path: Path, np_rng: np.random.Generator) -> Path:
    path = tmp_path / "base.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_head_count(4)
    for layer in range(2):
        for leaf, kind in (("attn_q", "Q8_0"), ("attn_k", "Q8_0"), ("ffn_up", "IQ2_XXS")):
            code = gguf.GGMLQuantizationType[kind]
            block, size = gguf.GGML_QUANT_SIZES[code]
            raw = np_rng.integers(0, 60, (16, 256 // block * size), dtype=np.uint8)
            writer.add_tensor(f"blk.{layer}.{leaf}.weight", raw, raw_dtype=code)
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_a_file_holds(base: Path) -> None:
    report = ps.inspect(base)
    assert (report.layout, report.architecture) == ("gguf", "llama")
    assert report.summary["name"] == "tiny"
    assert report.summary["tensors"] == 8
    assert report.summary["parameters"] == 6 * 16 * 256 + 2 * 256
    by_type = {row["type"]: row for row in report.tables["types"]}
    assert by_type["Q8_0"]["bytes"] == 4 * 16 * 272
    assert (by_type["Q8_0"]["merge"], by_type["IQ2_XXS"]["merge"]) == ("yes", "copied only")
    assert [finding.code for finding in report.findings] == ["gguf-type"]
    assert "2 tensors are IQ2_XXS" in report.findings[0].message
    shapes = {row["tensor"]: row["shape"] for row in report.modules}
    assert shapes["blk.0.ffn_up.weight"] == "16 x 256"
    json.dumps(report.to_dict())
    assert "llama" in str(report)


def test_headers_alone_need_no_torch(base: Path) -> None:
    code = f"""if True:
        import sys
        import peftsurgery as ps
        ps.inspect({str(base)!r})
        assert 'torch' not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_adapter_against_it(base: Path, tmp_path: Path) -> None:
    file = {}
    for layer, module in ((0, "self_attn.q_proj"), (1, "self_attn.k_proj"), (7, "mlp.up_proj")):
        name = f"base_model.model.model.layers.{layer}.{module}"
        file |= {f"{name}.lora_A.weight": torch.randn(2, 256)}
        file |= {f"{name}.lora_B.weight": torch.randn(16, 2)}
    save_file(file, tmp_path / "adapter_model.safetensors")
    report = ps.inspect(tmp_path / "adapter_model.safetensors", base=base)
    assert report.tables["coverage"][0]["found in the base"] == 2
    assert [f.key for f in report.findings if f.code == "not-in-base"] == [
        "model:model.layers.7.mlp.up_proj"
    ]


def test_the_types_that_can_be_merged_into() -> None:
    assert {"F32", "F16", "BF16", *GGUF_FORMATS} == READABLE
