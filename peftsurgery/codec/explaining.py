"""Opening an adapter and explaining its keys, from headers alone and without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from peftsurgery.checkpoint import Checkpoint, open_checkpoint
from peftsurgery.codec.detect import Explanation, detect
from peftsurgery.codec.keys import parse
from peftsurgery.errors import UsageError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PLAIN = {"weight", "bias", "scale"}


def open_adapter(source: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Open an adapter. A lone `adapter_model.safetensors` is opened with the adapter_config.json
    beside it.
    """
    path = Path(source)
    if path.name == WEIGHTS and (path.parent / CONFIG).is_file():
        return open_checkpoint(path.parent, allow_pickle=allow_pickle)
    return open_checkpoint(source, allow_pickle=allow_pickle)


def explain_checkpoint(
    checkpoint: Checkpoint,
    *,
    architecture: str | None = None,
    known: Mapping[str, Iterable[str]] | None = None,
    keep_unknown: bool = False,
) -> Explanation:
    """Detection from headers alone. Raises UsageError or UnsupportedError as `parse` and `detect`
    do; keep_unknown: keys that nothing explains are carried instead.
    """
    source = checkpoint.source
    parsed = parse(checkpoint, source)
    if keep_unknown and parsed.records:
        parsed.carried += parsed.unknown
        parsed.unknown = []
    if parsed.unknown:
        first = parsed.unknown[0]
        if parsed.records:
            raise UsageError(
                f"{source}: {len(parsed.unknown)} of {len(checkpoint)} keys have no adapter "
                f"suffix, first {first!r}. "
                "Expected suffixes of LoRA, LoHa, LoKr, full, norm or modules_to_save tensors. "
                "convert --keep-unknown carries them as they are."
            )
    if parsed.records and all(r.suffixes <= PLAIN for r in parsed.records.values()):
        raise UsageError(
            f"{source}: all {len(checkpoint)} keys are plain weights, first "
            f"{next(iter(checkpoint))!r}; this is a checkpoint "
            "(or a part of one), not an adapter. Expected LoRA, LoHa, LoKr, full or norm suffixes; "
            "--base takes checkpoints."
        )
    return detect(
        parsed,
        checkpoint,
        source=source,
        architecture=architecture,
        known=known,
        metadata=checkpoint.metadata,
        keep_unknown=keep_unknown,
    )
