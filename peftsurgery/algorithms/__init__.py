"""One class per adapter algorithm; the file a tensor came from does not matter any more here."""

from .base import WeightAdapter
from .compare import difference, norm
from .full import Full
from .loha import LoHa
from .lokr import LoKr
from .lora import LoRA, split_blocks
from .replace import Replace
from .slots import swap_halves
from .storage import Axis, Common

ALGORITHMS: dict[str, type[WeightAdapter]] = {
    "lora": LoRA,
    "loha": LoHa,
    "lokr": LoKr,
    "full": Full,
    "set": Replace,
}

__all__ = [
    "ALGORITHMS",
    "Axis",
    "Common",
    "Full",
    "LoHa",
    "LoKr",
    "LoRA",
    "Replace",
    "WeightAdapter",
    "difference",
    "norm",
    "split_blocks",
    "swap_halves",
]
