"""What becomes of packed weights in a merge, as the user asks for it."""

from __future__ import annotations

from dataclasses import dataclass

from peftsurgery.errors import UsageError

MODES = ("auto", "same", "dequant", "from-original", "residual")
ROUNDINGS = ("auto", "nearest", "stochastic", "subspace", "gptq")


@dataclass(frozen=True)
class Requant:
    """mode: "same" packs again in the base's own format; "dequant" writes plain weights;
    "from-original" packs W16 + ΔW, W16 from `original`, in the base's format; "residual" writes
    what rounding lost as an adapter of rank `rank` beside the output.

    "auto" is "same".
    """

    mode: str = "auto"
    original: str | None = None
    rank: int = 0

    @property
    def packs(self) -> bool:
        """Whether packed weights stay packed."""
        return self.mode != "dequant"


def parse(text: str) -> Requant:
    """`same`, `dequant`, `from-original:BASE16` or `residual:RANK`. Raises UsageError."""
    mode, _, value = text.partition(":")
    if mode not in MODES or bool(value) != (mode in ("from-original", "residual")):
        raise UsageError(
            f"requant {text!r} is not known. Expected auto, same, dequant, from-original:BASE16 "
            "(the unquantized base) or residual:RANK."
        )
    if mode == "from-original":
        return Requant(mode, original=value)
    if mode == "residual":
        if not value.isdigit() or int(value) < 1:
            raise UsageError(f"requant {text!r}: expected a rank of at least 1, as in residual:16.")
        return Requant(mode, rank=int(value))
    return Requant(mode)


def trained_on(text: str | None, requant: Requant) -> str | None:
    """Of `--qlora-base`, the format that a plain base is to be rounded in, or None.

    "packed": the adapter was trained on the packed base itself, W4 + ΔW is wanted, which is the
    default; "original": on the unquantized one, so W16 + ΔW is wanted and W16 has to be given;
    "packed:FORMAT": BASE is plain, and was packed in FORMAT for the training. UsageError.
    """
    if text in (None, "packed"):
        return None
    kind, _, format = str(text).partition(":")
    if kind == "packed":
        return format
    if text != "original":
        raise UsageError(
            f"qlora-base {text!r} is not known. Expected packed, original or packed:FORMAT."
        )
    if requant.mode not in ("auto", "same", "from-original"):
        raise UsageError(f"--qlora-base original and --requant {requant.mode} exclude each other.")
    return None
