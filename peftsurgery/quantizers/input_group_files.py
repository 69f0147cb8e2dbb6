"""What the config and the shapes of a file say about its weights of GPTQ or AWQ, and whether they
can be read.
"""

from __future__ import annotations

from collections.abc import Mapping

from peftsurgery.checkpoint import Checkpoint, LazyTensor
from peftsurgery.errors import UnsupportedError, UsageError

CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
KERNELS = ("marlin", "gemv", "exllama", "bitblas", "gptq_p", "llm-awq")


def check_method(where: str, config: Mapping[str, object]) -> None:
    method = str(config.get("quant_method", "gptq"))
    if method.rpartition("/")[2] not in ("gptq", "awq", "auto-round", "auto_round"):
        raise UnsupportedError(
            f"{where}: packed by {method!r}; gptq, awq or auto-round was expected. Merge into the "
            "original and quantize the result."
        )
    marlin = config.get("is_marlin_format") or config.get("is_bitblas_format")
    for key in ("checkpoint_format", "format", "version", "packing_format"):
        value = "marlin or bitblas" if marlin else str(config.get(key) or "").lower()
        if any(word in value for word in KERNELS):
            raise UnsupportedError(
                f"{where}: the weight lies in the order of a kernel ({value}); the formats gptq, "
                "gptq_v2 and awq gemm are read. Take the checkpoint it was made from."
            )


def packs_inputs(where: str, config: Mapping[str, object], parts: Mapping[str, LazyTensor]) -> bool:
    """Whether the words run along the inputs (GPTQ), not the outputs (AWQ)."""
    words, scale = parts["weight"].shape, parts["scale"].shape
    if len(words) == len(scale) == len(parts["zero"].shape) == 2:
        if words[1] == scale[1]:
            return True
        if words[1] * 8 == scale[1]:
            return False
    raise UnsupportedError(
        f"{where}: shape {list(words)} with scales {list(scale)} is neither GPTQ's nor AWQ's "
        f"(config: {dict(config) or 'none'}). Take the checkpoint it was made from."
    )


def check_model(checkpoint: Checkpoint, stored: str) -> None:
    component = stored.partition(":")[0] if ":" in stored else ""
    config = checkpoint.configs.get(component) if component else checkpoint.config
    kind = (config or {}).get("model_type")
    if kind in CONV1D:
        raise UnsupportedError(
            f"{checkpoint.source}: {stored!r}: {kind} keeps its weights transposed (Conv1D), which "
            "is not read from GPTQ and AWQ files. Merge into the original and quantize the result."
        )


def inputs_of(where: str, order: LazyTensor, inputs: int, bits: int, stored: int) -> int:
    """The words of the last inputs may be filled up: g_idx knows how many there are."""
    count = order.shape[0] if len(order.shape) == 1 else -1
    if count != inputs and -(-count * bits // 32) != stored:
        raise UsageError(
            f"{where}: g_idx has shape {list(order.shape)}, the weight {inputs} inputs. Download "
            "it again."
        )
    return count


def group_of(where: str, config: Mapping[str, object], inputs: int, groups: int) -> int:
    """Inputs of a group: as the config says, or, where that leaves it to the layer, as they come
    out even.
    """
    said = config.get("group_size")
    said = inputs if said == -1 else said
    if isinstance(said, int) and said > 0 and -(-inputs // said) == groups:
        return said
    free = said is None or config.get("dynamic") or config.get("extra_config")
    if not free or not groups or inputs % groups:
        raise UsageError(
            f"{where}: {groups} groups of {inputs} inputs, and the config says group_size {said}. "
            "Give the config.json that belongs to it."
        )
    return inputs // groups
