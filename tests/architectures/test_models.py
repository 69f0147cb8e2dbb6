"""The flattened names of language models, against the model classes of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers import AutoModelForSeq2SeqLM as Seq2Seq

from peftsurgery import architectures
from peftsurgery.architectures import flatten

CAUSAL = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neox",
    "gptj",
    "gpt_neo",
    "gpt_bigcode",
    "falcon",
    "bloom",
    "opt",
    "stablelm",
    "starcoder2",
    "olmo2",
)
MASKED = ("bert", "roberta", "xlm-roberta", "electra", "deberta-v2", "mpnet")
MODELS = [
    *((name, AutoModelForCausalLM) for name in CAUSAL),
    *((name, AutoModelForMaskedLM) for name in MASKED),
    ("t5", Seq2Seq),
    ("mt5", Seq2Seq),
]
HEADS = (
    "cls.predictions",
    "embeddings_project",
    "generator_",
    "lm_head.",
    "relative_attention_bias",
)


@pytest.mark.parametrize(("name", "kind"), MODELS)
def test_flattened_names_of_language_models(name: str, kind: type) -> None:
    two = {} if name == "gpt_neo" else {"num_hidden_layers": 2}
    with torch.device("meta"):
        model = kind.from_config(AutoConfig.for_model(name, **two))  # type: ignore[attr-defined]
    table = architectures.get("llm").components["model"]
    leaves = [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
        or type(module).__name__ in ("Conv1D", "LayerNorm")
        or type(module).__name__.endswith("RMSNorm")
    ]
    assert leaves
    for path in leaves:
        if path.startswith(HEADS) or path.endswith("embeddings_project"):
            continue
        flat = table.site_flat("hf", flatten(path))
        assert flat is not None, path
        assert flat.parts == (path,)
        site = table.site("hf", path)
        assert site == flat
        assert table.site_of("hf", path) == flat
