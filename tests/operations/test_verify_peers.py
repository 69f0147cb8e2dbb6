"""verify on checkpoints that PEFT and diffusers merged: recognised, and told apart from nearly
the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import peftsurgery as ps
from peftsurgery.operations.verify import VerifyReport
from tests.operations import test_merge_experts as experts
from tests.operations.merging import GOLDEN, flux_single, saved, sdxl_single

PEFT = {  # golden -> base
    "peft_llama_lora": "tiny_llama",
    "peft_llama_lora_bf16": "tiny_llama",
    "peft_llama_rslora_patterns": "tiny_llama",
    "peft_llama_dora": "tiny_llama",
    "peft_llama_loha": "tiny_llama",
    "peft_llama_lokr": "tiny_llama",
    "peft_llama_lokr_full": "tiny_llama",
    "peft_llama_bias_all": "tiny_llama(biases=True)",
    "peft_llama_modules_to_save": "tiny_llama",
    "peft_llama_embedding": "tiny_llama",
    "peft_gpt2_lora": "tiny_gpt2",
}
DIFFUSERS = {
    "diffusers_sd_lora": "tiny_sd_pipeline",
    "diffusers_sdxl_lora": "tiny_sdxl_pipeline",
    "diffusers_flux_lora": "tiny_flux_pipeline",
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def merged_by_peft(base: Path, adapter: Path, out: Path, dtype: torch.dtype) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    return out


def fused_by_diffusers(base: Path, adapter: Path, out: Path, scale: float) -> Path:
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(adapter)
    components = [n for n in pipeline._lora_loadable_modules if n in pipeline.components]
    pipeline.fuse_lora(components=components, lora_scale=scale)
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(out)
    return out


def explained(report: VerifyReport) -> str:
    return "\n".join([str(report), *(f.message for f in report.findings)])


# PEFT ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PEFT)
def test_merge_and_unload_is_base_and_adapter(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = saved(PEFT[name], dtype)
    merged = merged_by_peft(base, GOLDEN / name, tmp_path / "merged", dtype)
    report = ps.verify(merged, base, [(GOLDEN / name, 1.0)])
    assert report.answer == "yes", explained(report)
    assert report.exit_code == 0
    wrong = ps.verify(merged, base, [(GOLDEN / name, 0.5)])
    assert (wrong.answer, wrong.exit_code) == ("no", 1), explained(wrong)


def test_a_merge_in_another_number_type_than_the_base(tmp_path: Path) -> None:
    """A float32 base that was loaded, and so merged, in bfloat16."""
    base = saved("tiny_llama")
    adapter = GOLDEN / "peft_llama_lora"
    merged = merged_by_peft(base, adapter, tmp_path / "merged", torch.bfloat16)
    report = ps.verify(merged, base, [(adapter, 1.0)])
    assert report.answer == "yes", explained(report)
    assert report.summary["number types"] == "BF16"


# diffusers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIFFUSERS)
def test_fuse_lora_is_base_and_adapter(name: str, tmp_path: Path) -> None:
    base, adapter = saved(DIFFUSERS[name]), GOLDEN / f"{name}.safetensors"
    merged = fused_by_diffusers(base, adapter, tmp_path / "merged", 0.7)
    report = ps.verify(merged, base, [(adapter, 0.7)])
    assert report.answer == "yes", explained(report)
    wrong = ps.verify(merged, base, [(adapter, 1.0)])
    assert wrong.answer == "no"
    assert wrong.strengths[str(adapter)] == pytest.approx(0.7, abs=1e-3)
    assert any("strength 0.7 instead of 1" in f.message for f in wrong.findings), explained(wrong)


@pytest.mark.parametrize(
    ("name", "single"), [("diffusers_flux_lora", flux_single), ("diffusers_sdxl_lora", sdxl_single)]
)
def test_a_fused_folder_against_the_original_single_file(
    name: str, single: object, tmp_path: Path
) -> None:
    """The base has the release's names: fused rows, swapped halves, OpenCLIP's transposed
    projection.
    """
    base = single()  # type: ignore[operator]
    adapter = GOLDEN / f"{name}.safetensors"
    folder = fused_by_diffusers(saved(DIFFUSERS[name]), adapter, tmp_path / "merged", 0.7)
    merged = folder / "transformer" if "flux" in name else folder
    adapters = [(adapter, 0.7)]
    if "flux" in name:  # the single file has no text encoders
        kept = ps.load_adapter(adapter, architecture="flux")
        parts = {p: m for p, m in kept.modules.items() if p.startswith("transformer:")}
        assert parts
        kept.modules.clear()
        kept.modules.update(parts)
        adapters = [(kept, 0.7)]
    report = ps.verify(merged, base, adapters)
    assert report.answer == "yes", explained(report)
    report = ps.verify(merged, base, [(adapters[0][0], 0.35)])
    assert report.answer == "no", explained(report)
    back = ps.verify(
        base, saved(DIFFUSERS[name]) / ("transformer" if "flux" in name else ""), adapters
    )
    assert back.answer == "no"
    assert {f.code for f in back.findings if f.level == "error"} == {"not-merged"}, explained(back)


def test_a_tied_embedding(tmp_path: Path) -> None:
    """PEFT changes the one tensor that serves as embedding and as output head."""
    base = saved("tiny_gpt2")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=3, target_modules=["wte", "c_attn"], fan_in_fan_out=True),
    )
    torch.manual_seed(38)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(tmp_path / "adapter"))
    plain = model.merge_and_unload()
    assert isinstance(plain, PreTrainedModel)
    plain.save_pretrained(tmp_path / "merged")
    report = ps.verify(tmp_path / "merged", base, [(tmp_path / "adapter", 1.0)])
    assert report.answer == "yes", explained(report)
    assert "transformer.wte.weight" in {row["tensor"] for row in report.modules}
    assert ps.verify(base, base, [(tmp_path / "adapter", 1.0)]).answer == "no"


def test_experts_stacked_and_apart(tmp_path: Path) -> None:
    """PEFT's merge of stacked experts, saved apart, against a base of either form."""
    base = tmp_path / "base"
    experts.built(experts.mixtral).save_pretrained(base)  # pyright: ignore[reportCallIssue]
    model = experts.attached(
        base, tmp_path / "a", r=2, target_modules=["q_proj"], target_parameters=experts.BOTH
    )
    assert isinstance(model, PeftModel)
    plain = model.merge_and_unload()
    assert isinstance(plain, PreTrainedModel)
    plain.save_pretrained(tmp_path / "merged")
    stacked = experts.stacked(base, tmp_path / "stacked")
    for other in (base, stacked):
        report = ps.verify(tmp_path / "merged", other, [(tmp_path / "a", 1.0)])
        assert report.answer == "yes", explained(report)
        wrong = ps.verify(tmp_path / "merged", other, [(tmp_path / "a", 0.5)])
        assert wrong.answer == "no"
        assert {f.code for f in wrong.findings if f.level == "error"} == {"wrong-strength"}
    ps.merge(stacked, [(tmp_path / "a", 1.0)], tmp_path / "ours")
    report = ps.verify(tmp_path / "ours", base, [(tmp_path / "a", 1.0)])
    assert report.answer == "yes", explained(report)
