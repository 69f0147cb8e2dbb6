"""Three tasks to train on: characters with a tiny Llama, noise with a tiny UNet, topics with
MiniLM.

`python -m tests.runtime.learning FOLDER` is the new process of `test_learning`: it loads every
adapter that lies in the folder onto models built again, and writes what they answer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from fixtures import bases
from peftsurgery import runtime
from tests.runtime import small

TEXT = "the cat sat on the mat; the dog sat on the log; the hen sat in the pen. " * 2
SENTENCES = (
    ("The cat chases a mouse through the garden.", 0),
    ("A dog sleeps beside the warm stove.", 0),
    ("The central bank raised interest rates.", 1),
    ("Stocks fell after the quarterly report.", 1),
)


@dataclass(frozen=True)
class Task:
    """A model of one's own, what it answers, and what it is to learn.

    targets   layers to adapt; `more` are those of another kind, for algorithms that have it
    rows      an embedding and those of its rows that are trained
    """

    build: Callable[[], nn.Module]
    answer: Callable[[nn.Module], Tensor]
    loss: Callable[[nn.Module], Tensor]
    targets: tuple[str, ...]
    more: tuple[str, ...] = ()
    rows: tuple[str, tuple[int, ...]] | None = None
    architecture: str | None = None


@cache
def _characters() -> Tensor:
    known = sorted(set(TEXT))
    return torch.tensor([known.index(c) for c in TEXT[:128]]).reshape(4, 32)


def _llama_loss(model: nn.Module) -> Tensor:
    return model(_characters(), labels=_characters()).loss


def _unet() -> nn.Module:
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=32,
        attention_head_dim=2,
    )


def _denoise(model: nn.Module) -> Tensor:
    assert isinstance(model, UNet2DConditionModel)
    return small.denoise(model)


def _unet_loss(model: nn.Module) -> Tensor:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    return (_denoise(model) - noise).square().mean()


@cache
def _sentences() -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(bases.minilm_folder(), local_files_only=True)
    return dict(tokenizer([text for text, _ in SENTENCES], padding=True, return_tensors="pt"))


def _embed(model: nn.Module) -> Tensor:
    batch = _sentences()
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def _minilm_loss(model: nn.Module) -> Tensor:
    """Sentences of one topic are nearer to each other than to those of the other one."""
    topics = torch.tensor([topic for _, topic in SENTENCES])
    same = (topics[:, None] == topics[None]).float().fill_diagonal_(0)
    pooled = _embed(model)
    scores = (pooled @ pooled.T / 0.1).fill_diagonal_(-torch.inf)
    return -scores.log_softmax(-1).masked_fill(same == 0, 0).sum() / same.sum()


@cache
def _minilm() -> nn.Module:
    """One for all: detaching leaves it as it was."""
    return bases.minilm()


TASKS = {
    "llama": Task(
        small.llama,
        lambda model: model(_characters()).logits,
        _llama_loss,
        ("q_proj", "o_proj", "up_proj", "down_proj"),
        rows=("embed_tokens", (0, 2, 5)),
    ),
    "unet": Task(_unet, _denoise, _unet_loss, ("to_q", "ff.net.2"), ("conv1",), architecture="sd1"),
    "minilm": Task(
        _minilm, _embed, _minilm_loss, ("query", "value"), rows=("word_embeddings", (101, 1012))
    ),
}


@torch.no_grad()
def reload(folder: Path) -> None:
    """`NAME.TASK/` or `NAME.TASK.safetensors` -> answers as loaded and as merged."""
    torch.set_num_threads(1)
    answers: dict[str, Tensor] = {}
    failures: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        case = path.name.removesuffix(".safetensors")
        task = TASKS[case.partition(".")[2]]
        model = task.build().eval()
        try:
            found = runtime.attach(model, path, architecture=task.architecture)
            answers[f"{case}/loaded"] = task.answer(model).contiguous()
            runtime.merge_and_detach(model) if case.endswith("t") else runtime.merge(model)
            answers[f"{case}/merged"] = task.answer(model).contiguous()
            assert not found.unmatched
        except Exception as error:  # told in the test of this case
            failures[case] = f"{type(error).__name__}: {error}"
        if runtime.adapter_names(model):
            runtime.unmerge(model)
            runtime.detach(model)
    save_file(answers, f"{folder}.answers.safetensors")
    Path(f"{folder}.failures.json").write_text(json.dumps(failures))


if __name__ == "__main__":
    reload(Path(sys.argv[1]))
