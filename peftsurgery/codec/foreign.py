"""Adapters that are known by name and not handled: what each is, and what can be done with it.

Names and keys are those of PEFT 0.21 (`utils/peft_types.py`, `tuners/*`), LyCORIS 4.1 and older
programs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MERGED = (
    "PEFT merges it (merge_and_unload); extract then writes the merged model's difference from the "
    "base as a LoRA or in full."
)
PROMPT = (
    "It puts trained vectors before the input or into the attention cache and changes no weight: "
    "there is nothing to merge or convert. Run it in PEFT."
)
RUNS = "No fixed weight equals it: it can only be run, by the program that trained it."


@dataclass(frozen=True)
class Foreign:
    """One method: the ends of its keys as a pattern, PEFT's types, what it is, what to do."""

    name: str
    pattern: str
    what: str
    remedy: str
    types: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        return f"{self.what[0].upper()}{self.what[1:]}. {self.remedy}"


FOREIGN: tuple[Foreign, ...] = (
    Foreign(
        "OFT in an older form (oft_diag, oft_blocks.N)",
        r"oft_(diag|blocks\.\d+)",
        "blocks named by number or by an older name, which readers take for different rotations",
        "Train or save it again with a current version.",
    ),
    Foreign(
        "OFT of PEFT before 0.16, which PEFT itself does not read any more",
        r"oft_r",
        "a rotation of another parametrisation",
        "Merge it with PEFT 0.15, then extract the difference.",
    ),
    Foreign(
        "OFT with DoRA (OneTrainer)",
        r"initial_norm|dora_multiplier",
        "a rotation with magnitudes relative to the norms at the start of training",
        "Merge it in OneTrainer, then extract the difference.",
    ),
    Foreign(
        "GLoRA (PEFT's five terms)",
        r"glora_[A-E]\..*",
        "five terms that scale and shift weight, input and bias",
        MERGED,
        ("GLORA",),
    ),
    Foreign(
        "PVeRA",
        r"pvera_(lambda_[bd]|[AB])",
        "VeRA with vectors drawn from a trained distribution",
        MERGED,
        ("PVERA",),
    ),
    Foreign(
        "WaveFT",
        r"waveft_spectrum",
        "a sparse wavelet spectrum at places drawn from a seed",
        MERGED,
        ("WAVEFT",),
    ),
    Foreign(
        "RandLoRA",
        r"randlora_\w+",
        "a sum of random low-rank terms with trained diagonals",
        MERGED,
        ("RANDLORA",),
    ),
    Foreign(
        "GraLoRA",
        r"gralora_\w+(\.weight)?",
        "a low-rank change in every block of a grid, with shuffled ranks",
        MERGED,
        ("GRALORA",),
    ),
    Foreign(
        "VB-LoRA",
        r"vblora_\w+",
        "LoRA factors mixed from a bank of vectors that all layers share",
        MERGED,
        ("VBLORA",),
    ),
    Foreign(
        "TinyLoRA",
        r"tinylora_\w+(\.\d+)?",
        "a few numbers on random matrices between singular vectors of the weight",
        MERGED,
        ("TINYLORA",),
    ),
    Foreign(
        "OSF",
        r"osf_svd_params\..*",
        "the small singular directions of the weight, trained; the large ones are the base's",
        MERGED,
        ("OSF",),
    ),
    Foreign(
        "PSOFT",
        r"psoft_R\..*",
        "a rotation between singular vectors of the weight, which the file does not hold",
        MERGED,
        ("PSOFT",),
    ),
    Foreign(
        "PEANuT",
        r"peanut_\w+(\.weight)?|peanut_(en|de)coders\..*",
        "a small network that computes the change from the weight",
        MERGED,
        ("PEANUT",),
    ),
    Foreign(
        "AdaMSS",
        r"adamss_(newB|[AB]\.\d+)",
        "changes inside clusters of singular vectors of the weight, found when it was attached",
        MERGED,
        ("ADAMSS",),
    ),
    Foreign("BEFT", r"beft_bias", "a trained bias added to the output", MERGED, ("BEFT",)),
    Foreign(
        "DEFT",
        r"deft_[PR]",
        "a projection that takes a subspace out of the weight and puts another in",
        MERGED,
        ("DEFT",),
    ),
    Foreign(
        "LiLy",
        r"lily_\w+(\.weight)?",
        "experts shared between layers and mixed by a router that looks at the input",
        RUNS,
        ("LILY",),
    ),
    Foreign(
        "UniLoRA",
        r"unilora_\w+",
        "LoRA factors gathered from one vector at places drawn from a seed",
        MERGED,
        ("UNILORA",),
    ),
    Foreign(
        "FRoD",
        r"frod_\w+(\.\w+)?",
        "diagonal and sparse values between bases that layers of a kind share",
        MERGED,
        ("FROD",),
    ),
    Foreign(
        "Poly",
        r"poly_(lora_[AB]|router.*)",
        "a mixture of LoRAs chosen by the number of the task, given with every input",
        RUNS,
        ("POLY",),
    ),
    Foreign(
        "Shadow",
        r"shadow_\w+(\..*)?",
        "a small network beside the model that corrects its hidden states",
        RUNS,
        ("SHADOW",),
    ),
    Foreign(
        "SuperTuning",
        r"supertuning_\w+",
        "sparse values at the largest weights, with or without a LoRA",
        MERGED,
        ("SUPERTUNING",),
    ),
    Foreign(
        "prompt, prefix or P-tuning",
        r"prompt_embeddings|prefix_task_(cols|rows)",
        "a prompt, prefix or P-tuning encoder, CPT or a cartridge",
        PROMPT,
        (
            "PROMPT_TUNING",
            "MULTITASK_PROMPT_TUNING",
            "P_TUNING",
            "PREFIX_TUNING",
            "CPT",
            "CARTRIDGE",
        ),
    ),
    Foreign(
        "Llama-Adapter",
        r"adaption_(prompt|gate)",
        "trained prompts that attention reads through a gate",
        PROMPT,
        ("ADAPTION_PROMPT",),
    ),
    Foreign(
        "X-LoRA",
        r"internal_xlora_classifier\..*",
        "a classifier that mixes LoRAs per token; each of the LoRAs alone is an ordinary one",
        "Give the folder of one expert; the mixture can only be run, in PEFT.",
        ("XLORA",),
    ),
    Foreign(
        "T-LoRA (rank depends on the timestep)",
        r"q_layer\.weight|p_layer\.weight|lambda_layer",
        "fewer ranks at noisier timesteps, less the starting point taken from the base's singular "
        "vectors, which the file does not hold",
        RUNS,
    ),
    Foreign(
        "bottleneck adapter",
        r"adapter_(down|up)(\.\d+)?\.(weight|bias)",
        "a small network with a non-linearity between layers",
        RUNS,
    ),
    Foreign(
        "sparse bias (LyCORIS extraction)",
        r"(bias_indices|bias_values|bias_size)",
        "a bias stored as indices and values, left over from pruning",
        "Extract the difference again; current versions write diff_b.",
    ),
)
_END = [(re.compile(rf"(?:^|\.)(?:{row.pattern})$"), row) for row in FOREIGN]
_ANY = re.compile(rf"(?:^|\.)(?:{'|'.join(f'(?:{row.pattern})' for row in FOREIGN)})$")


def foreign_key(key: str) -> Foreign | None:
    """The method whose ending `key` has."""
    if _ANY.search(key) is None:  # one search for the usual key instead of forty
        return None
    return next((row for pattern, row in _END if pattern.search(key)), None)


def foreign_type(peft_type: str) -> Foreign | None:
    """The method that adapter_config.json calls `peft_type`."""
    return next((row for row in FOREIGN if peft_type in row.types), None)
