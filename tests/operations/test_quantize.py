"""Packing and unpacking whole checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peftsurgery as ps
from peftsurgery.checkpoint import save
from peftsurgery.errors import CheckFailed, UsageError
from peftsurgery.operations import quantize as operation
from tests.operations.packed_llm import state, unpacked, write_plain


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "plain"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.bfloat16()
    model.save_pretrained(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        return model(torch.arange(16)[None]).logits.float()


@pytest.mark.parametrize(
    ("format", "options", "module"),
    [
        ("nf4", {}, "Linear4bit"),
        ("nf4", {"nested": False}, "Linear4bit"),
        ("fp4", {}, "Linear4bit"),
        ("int8", {}, "Linear8bitLt"),
    ],
)
def test_transformers_loads_what_is_packed(
    llama: Path, tmp_path: Path, format: str, options: dict[str, object], module: str
) -> None:
    out = tmp_path / "packed"
    report = ps.quantize(llama, out, format=format, options=options)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == module
    assert type(model.lm_head) is torch.nn.Linear
    plain = tmp_path / "plain"
    ps.dequantize(out, plain)
    expected = logits(plain)
    found = logits(out)
    assert float((found - expected).norm() / expected.norm()) < 0.02
    assert 0 < report.loss < (0.02 if format == "int8" else 0.2)


def test_reported_losses_are_those_of_the_file(tmp_path: Path) -> None:
    plain = write_plain(tmp_path / "plain", 1)
    report = ps.quantize(plain, tmp_path / "packed", format="nf4")
    before, after = unpacked(plain), unpacked(tmp_path / "packed")
    assert len(report.packed) == 8
    for name, loss in report.packed.items():
        exact = float((after[name] - before[name]).norm() / before[name].norm())
        assert loss == pytest.approx(exact, rel=1e-4)
        assert 0.05 < loss < 0.15
    for name in before.keys() - report.packed.keys():
        assert torch.equal(before[name], after[name])


def test_the_shards_and_the_index_stay_in_step(tmp_path: Path) -> None:
    plain = write_plain(tmp_path / "plain", 1)
    ps.quantize(plain, tmp_path / "packed", format="nf4")
    names = {p.name for p in plain.glob("*.safetensors")}
    assert {p.name for p in (tmp_path / "packed").glob("*.safetensors")} == names
    index = json.loads((tmp_path / "packed/model.safetensors.index.json").read_text())
    found = state(tmp_path / "packed")
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())


def test_patterns_choose_and_the_config_says_what_was_left(tmp_path: Path) -> None:
    plain = write_plain(tmp_path / "plain", 1)
    out = tmp_path / "packed"
    report = ps.quantize(plain, out, format="nf4", exclude=["*q_proj"])
    assert not any("q_proj" in name for name in report.packed)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.self_attn.q_proj" in config["llm_int8_skip_modules"]
    again = ps.quantize(plain, tmp_path / "two", format="nf4", only=["lm_head"])
    assert set(again.packed) == {"lm_head.weight"}
    for only, exclude in ((["nothing"], []), ([], ["nothing*"])):
        with pytest.raises(UsageError, match="nothing"):
            ps.quantize(plain, tmp_path / "three", format="nf4", only=only, exclude=exclude)
    with pytest.raises(UsageError, match="no matrix to pack"):
        ps.quantize(plain, tmp_path / "three", format="nf4", exclude=["*"])


def test_rounding_at_random_is_seeded(tmp_path: Path) -> None:
    plain = write_plain(tmp_path / "plain", 1)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ps.quantize(plain, tmp_path / name, format="int8", rounding="stochastic", seed=seed)
    one, same, other = (unpacked(tmp_path / name) for name in "abc")
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_gptq_rounding_lowers_the_error_of_the_outputs(tmp_path: Path) -> None:
    plain = write_plain(tmp_path / "plain", 1)
    before = unpacked(plain)
    random = torch.Generator().manual_seed(2)
    names = [n for n, t in before.items() if t.ndim == 2 and ".layers." in n]
    inputs = {}
    for name in names:
        columns = before[name].shape[1]
        mix = torch.randn(columns, columns, generator=random) ** 3
        inputs[name] = torch.randn(500, columns, generator=random) @ mix
    save(tmp_path / "grams.safetensors", {n: x.T @ x for n, x in inputs.items()})
    ps.quantize(plain, tmp_path / "near", format="nf4")
    ps.quantize(
        plain, tmp_path / "gptq", format="nf4", rounding="gptq", gram=tmp_path / "grams.safetensors"
    )
    errors = []
    for folder in ("near", "gptq"):
        after = unpacked(tmp_path / folder)
        errors.append(sum(float((inputs[n] @ (after[n] - before[n]).T).norm()) for n in names))
    assert errors[1] < 0.85 * errors[0]
    with pytest.raises(UsageError, match="go together"):
        ps.quantize(plain, tmp_path / "x", format="nf4", rounding="gptq")


def test_what_is_packed_is_not_packed_again(tmp_path: Path) -> None:
    plain = write_plain(tmp_path / "plain", 1)
    ps.quantize(plain, tmp_path / "packed", format="nf4")
    with pytest.raises(UsageError, match="holds packed weights already"):
        ps.quantize(tmp_path / "packed", tmp_path / "twice", format="int8")


def test_nan_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    plain = write_plain(tmp_path / "plain", 1)
    tensors = state(plain)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    bad = tmp_path / "bad.safetensors"
    save(bad, tensors)
    with pytest.raises(UsageError, match=r"layers.1.mlp.up_proj.weight.*NaN"):
        ps.quantize(bad, tmp_path / "out.safetensors", format="nf4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.safetensors", "plain"]


def test_a_damaged_output_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = write_plain(tmp_path / "plain", 1)
    real = operation.save

    def damaging(path: Path, *args: object, **more: object) -> tuple[Path, ...]:
        files = real(path, *args, **more)  # type: ignore[arg-type]
        part = ps.open_checkpoint(path).get("model.layers.0.mlp.up_proj.weight")
        if part is not None:
            with open(path, "r+b") as file:
                file.seek(part.begin + 5)
                byte = file.read(1)[0]
                file.seek(-1, 1)
                file.write(bytes([byte ^ 1]))
        return files

    monkeypatch.setattr(operation, "save", damaging)
    with pytest.raises(CheckFailed, match="up_proj"):
        ps.quantize(plain, tmp_path / "out", format="nf4")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    plain = write_plain(tmp_path / "plain", 1)
    report = ps.quantize(plain, tmp_path / "out", format="nf4", dry_run=True)
    assert len(report.tables["plan"]) == 8
    assert not (tmp_path / "out").exists()
