"""What a merge into a packed base answers: MiniLM with a trained LoRA, measured on its outputs.

The LoRA is trained on top of the packed weights. With that adapter attached the packed base gives
the outputs that the merged model should give; the distance to them on sentences that were not
trained on is what packing the merged weights cost.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel

import peftsurgery as ps
from fixtures import bases
from peftsurgery import runtime
from peftsurgery.checkpoint import save

TOPICS = (
    (
        "The cat chases a mouse through the garden.",
        "A dog sleeps beside the warm stove.",
        "Birds sing in the old apple tree.",
        "The horse drinks from the river.",
    ),
    (
        "The central bank raised interest rates.",
        "Stocks fell after the quarterly report.",
        "The company paid a record dividend.",
        "Investors sold their bonds in a hurry.",
    ),
    (
        "The striker scored in the last minute.",
        "She won the marathon in heavy rain.",
        "The team trains three times a week.",
        "A goalkeeper saved two penalties.",
    ),
)
UNSEEN = (
    "The rabbit hides under the bush.",
    "Oil prices climbed again.",
    "He lost the final set.",
    "A kitten plays with wool.",
    "The bank lends money to farmers.",
    "The swimmer broke the record.",
)
LAYERS = (3, 4, 5)  # of six
MODULES = ("attention.self.query", "attention.self.value", "intermediate.dense")
PATHS = tuple(f"encoder.layer.{layer}.{module}" for layer in LAYERS for module in MODULES)
STEPS = 10
RATES = {"small": 5e-4, "large": 2e-3}
FORMATS = {"nf4": "nf4", "int4": "pack-quantized", "int8": "int8"}  # int4: groups of 128


@dataclass(frozen=True)
class Tuned:
    """A packed base and a LoRA trained on it.

    attached   outputs of the packed base with the adapter, (sentences, features)
    moved      how far the adapter moves them, ‖attached - base‖ / ‖base‖
    gram       XᵀX of the modules' inputs while the training sentences run, with the adapter
    """

    folder: Path
    packed: Path
    adapter: Path
    attached: Tensor
    moved: float
    gram: Path


@dataclass(frozen=True)
class Merged:
    """survival: of the report; distance: ‖merged - attached‖ / ‖attached‖."""

    survival: float
    distance: float


@cache
def batch(sentences: tuple[str, ...]) -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(bases.minilm_folder(), local_files_only=True)
    return dict(tokenizer(list(sentences), padding=True, return_tensors="pt"))


def outputs(model: nn.Module, sentences: tuple[str, ...]) -> Tensor:
    """Mean over tokens, of length 1: what MiniLM embeds sentences by."""
    inputs = batch(sentences)
    mask = inputs["attention_mask"][..., None]
    hidden = model(**inputs).last_hidden_state
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


TRAINED = tuple(sentence for topic in TOPICS for sentence in topic)
LABELS = torch.arange(len(TOPICS)).repeat_interleave(len(TOPICS[0]))


def loss(model: nn.Module) -> Tensor:
    """Supervised contrastive (Khosla et al. 2020, arXiv:2004.11362), temperature 0.1."""
    found = outputs(model, TRAINED)
    near = (found @ found.T / 0.1).fill_diagonal_(-torch.inf).log_softmax(-1)
    same = (LABELS[:, None] == LABELS[None]).fill_diagonal_(False)
    return -near[same].mean()


def loaded(folder: Path) -> BertModel:
    """MiniLM with the values of a packed or plain folder, in fp32."""
    plain = folder.with_name(f"{folder.name}-plain")
    ps.dequantize(folder, plain, dtype="fp32")
    return _model(plain)


def _model(plain: Path) -> BertModel:
    model = BertModel(BertConfig.from_pretrained(bases.minilm_folder()))
    left = model.load_state_dict(load_file(plain / "model.safetensors"), strict=False)
    assert not left.missing_keys
    return model.eval()


@contextmanager
def grams(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Gram matrices XᵀX of the inputs of the adapted modules in the model's last run."""
    found: dict[str, Tensor] = {}

    def watch(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            found[path] = x.T @ x

        return add

    hooks = [model.get_submodule(p).register_forward_pre_hook(watch(p)) for p in PATHS]
    yield found
    for hook in hooks:
        hook.remove()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Tuned]:
    """(format, size of the change) -> the trained base, made once."""

    @cache
    def packed(packing: str) -> Path:
        folder = tmp_path_factory.mktemp(packing) / "packed"
        only = [f"{path}.weight" for path in PATHS]
        ps.quantize(bases.minilm_folder(), folder, format=FORMATS[packing], only=only)
        return folder

    @cache
    def make(packing: str, change: str) -> Tuned:
        folder = tmp_path_factory.mktemp(f"{packing}-{change}")
        shutil.copytree(packed(packing), folder / "packed")
        model = loaded(folder / "packed")
        with torch.no_grad():
            before = outputs(model, UNSEEN)
        runtime.attach(
            model,
            "lora",
            targets=PATHS,
            rank=8,
            alpha=16,
            generator=torch.Generator().manual_seed(0),
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATES[change])
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        with torch.no_grad():
            after = outputs(model, UNSEEN)
            with grams(model) as found:
                outputs(model, TRAINED)
        save(folder / "gram.safetensors", found)
        runtime.save(model, folder / "adapter", layout="peft")
        moved = float((after - before).norm() / before.norm())
        return Tuned(
            folder,
            folder / "packed",
            folder / "adapter",
            after,
            moved,
            folder / "gram.safetensors",
        )

    return make


@pytest.fixture(scope="module")
def merged(tuned: Callable[[str, str], Tuned]) -> Callable[[str, str, str], Merged]:
    """(format, size of the change, a rounding or "dequant") -> the merged model, measured once."""

    @cache
    def measure(packing: str, change: str, how: str) -> Merged:
        made = tuned(packing, change)
        out = made.folder / how
        report = ps.merge(
            made.packed,
            [(made.adapter, 1.0)],
            out,
            rounding="auto" if how == "dequant" else how,
            requant="dequant" if how == "dequant" else "same",
            gram=made.gram if how == "gptq" else None,
            min_survival=0.0,
        )
        with torch.no_grad():
            found = outputs(_model(out) if how == "dequant" else loaded(out), UNSEEN)
        error = (found - made.attached).norm() / made.attached.norm()
        return Merged(report.survival, float(error))

    return measure


@pytest.mark.parametrize(("change", "factor"), [("small", 1.3), ("large", 1.8)])
@pytest.mark.parametrize("packing", ["nf4", "int4"])
def test_four_bits_answer_nearer_to_the_adapter_than_nearest_rounding(
    merged: Callable[[str, str, str], Merged], packing: str, change: str, factor: float
) -> None:
    auto, nearest = merged(packing, change, "auto"), merged(packing, change, "nearest")
    assert auto.survival > 0.95 > 0.5 > nearest.survival
    assert factor * auto.distance < nearest.distance


@pytest.mark.parametrize("packing", ["nf4", "int4"])
def test_gram_matrices_bring_the_outputs_nearer_still(
    merged: Callable[[str, str, str], Merged], packing: str
) -> None:
    weighted = merged(packing, "small", "gptq")
    assert weighted.survival > 0.98
    assert 1.3 * weighted.distance < merged(packing, "small", "auto").distance


def test_eight_bits_keep_the_change_at_no_cost(
    merged: Callable[[str, str, str], Merged],
) -> None:
    auto, nearest = merged("int8", "small", "auto"), merged("int8", "small", "nearest")
    assert auto.survival >= 0.95
    assert auto.distance <= 1.1 * nearest.distance


@pytest.mark.parametrize("packing", FORMATS)
def test_plain_weights_answer_as_the_attached_adapter_does(
    tuned: Callable[[str, str], Tuned], merged: Callable[[str, str, str], Merged], packing: str
) -> None:
    assert tuned(packing, "small").moved > 0.1  # there is something to lose
    assert merged(packing, "small", "dequant").distance < 1e-3
