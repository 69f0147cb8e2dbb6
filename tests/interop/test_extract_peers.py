"""An extracted adapter in the programs it is for: PEFT and diffusers give the tuned outputs."""

# transformers, peft and diffusers are typed loosely
# pyright: reportPrivateImportUsage=false, reportCallIssue=false
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import peftsurgery as ps
from fixtures import bases
from tests.interop.models import inputs
from tests.operations.merging import saved
from tests.operations.tuning import low_rank, tuned_copy


def llama(kind: str) -> PreTrainedModel:
    if kind == "gpt2":
        return bases.tiny_gpt2()
    model = bases.tiny_llama(biases=kind == "biases")
    if kind.startswith("tied"):
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model


@pytest.mark.parametrize("kind", ["plain", "biases", "gpt2", "tied", "tied, grown", "grown"])
def test_peft_gives_the_outputs_of_the_tuned_model(tmp_path: Path, kind: str) -> None:
    model = llama(kind)
    model.save_pretrained(tmp_path / "base")
    rows = 101 if "grown" in kind else None
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    random = torch.Generator().manual_seed(len(kind))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.02)
    model.save_pretrained(tmp_path / "tuned", max_shard_size="50KB")
    report = ps.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=500)
    assert report.loss < 1e-6
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = torch.randint(0, 90, (2, 9), generator=random)
    with torch.no_grad():
        wanted = model.eval()(ids).logits
        if rows is None:
            assert float((base(ids).logits - wanted).abs().max()) > 0.05
        else:
            base.resize_token_embeddings(rows, mean_resizing=False)
        loaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()(ids).logits
    torch.testing.assert_close(loaded, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    ps.merge(tmp_path / "base", [(tmp_path / "out", 1.0)], tmp_path / "merged")
    tuned = ps.open_checkpoint(tmp_path / "tuned")
    for name, tensor in load_file(tmp_path / "merged/model.safetensors").items():
        torch.testing.assert_close(tensor, tuned[name].torch(), rtol=1e-5, atol=1e-6)


def test_peft_loads_an_extracted_lokr(tmp_path: Path) -> None:
    """Of a change that is a Kronecker product, so that nothing is lost."""
    model = bases.tiny_llama()
    model.save_pretrained(tmp_path / "base")
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                first = torch.randn(2, 2, generator=random)
                rows, columns = (n // 2 for n in parameter.shape)
                second = torch.randn(rows, columns, generator=random)
                parameter.add_(0.02 * torch.kron(first, second))
    model.save_pretrained(tmp_path / "tuned")
    report = ps.extract(
        tmp_path / "tuned", tmp_path / "base", tmp_path / "out", algorithm="lokr", factor=2
    )
    assert report.loss < 1e-3
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = torch.randint(0, 90, (2, 9), generator=random)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()(ids).logits
        torch.testing.assert_close(loaded, model(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("builder", "component"),
    [("tiny_sd_pipeline", "unet"), ("tiny_flux_pipeline", "transformer")],
)
def test_diffusers_gives_the_outputs_of_the_tuned_pipeline(
    tmp_path: Path, builder: str, component: str
) -> None:
    base = saved(builder)
    change = low_rank(6, rank=3, size=0.02)
    tuned = tuned_copy(base, tmp_path / "tuned", change)
    file = tmp_path / "lora.safetensors"
    report = ps.extract(tuned, base, file, rank=3, to="diffusers", only=[component])
    assert report.loss < 1e-5
    pipeline = DiffusionPipeline.from_pretrained(base)
    expected = getattr(DiffusionPipeline.from_pretrained(tuned), component)
    model = getattr(pipeline, component)
    given = inputs(model)
    with torch.no_grad():
        before, wanted = model(**given).sample, expected(**given).sample
        pipeline.load_lora_weights(str(file))
        after = model(**given).sample
    assert float((before - wanted).abs().max()) > 100 * float((after - wanted).abs().max())
    torch.testing.assert_close(after, wanted, rtol=1e-3, atol=1e-4)
