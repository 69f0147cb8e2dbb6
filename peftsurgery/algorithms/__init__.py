"""One class per adapter algorithm; the file a tensor came from does not matter any more here."""

from .base import WeightAdapter
from .boft import BOFT
from .compare import difference, norm
from .full import Full
from .glora import GLoRA
from .hra import HRA
from .ia3 import IA3
from .loha import LoHa
from .lokr import LoKr
from .lora import LoRA, split_blocks
from .maps import WeightMap
from .oft import OFT
from .replace import Replace
from .slots import swap_halves
from .storage import Axis, Common

ALGORITHMS: dict[str, type[WeightAdapter]] = {
    "lora": LoRA,
    "loha": LoHa,
    "lokr": LoKr,
    "full": Full,
    "set": Replace,
    "oft": OFT,
    "boft": BOFT,
    "hra": HRA,
    "ia3": IA3,
    "glora": GLoRA,
}

__all__ = [
    "ALGORITHMS",
    "BOFT",
    "HRA",
    "IA3",
    "OFT",
    "Axis",
    "Common",
    "Full",
    "GLoRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "Replace",
    "WeightAdapter",
    "WeightMap",
    "difference",
    "norm",
    "split_blocks",
    "swap_halves",
]
