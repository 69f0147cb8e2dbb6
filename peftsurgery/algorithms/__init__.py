"""One class per adapter algorithm; the file a tensor came from does not matter any more here."""

from .adalora import AdaLoRA
from .base import WeightAdapter
from .boft import BOFT
from .c3a import C3A
from .compare import difference, norm
from .delora import DeLoRA
from .fourierft import FourierFT
from .full import Full
from .glora import GLoRA
from .hira import HiRA
from .hra import HRA
from .ia3 import IA3
from .loha import LoHa
from .lokr import LoKr
from .lora import LoRA, split_blocks
from .maps import WeightMap
from .miss import Bat, MiSS
from .oft import OFT
from .replace import Replace
from .road import RoAd
from .shira import SHiRA
from .sized import SizedChange
from .slots import swap_halves
from .storage import Axis, Common
from .tokens import Tokens
from .vera import VeRA

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
    "road": RoAd,
    "delora": DeLoRA,
    "hira": HiRA,
    "tokens": Tokens,
    "adalora": AdaLoRA,
    "vera": VeRA,
    "fourierft": FourierFT,
    "c3a": C3A,
    "miss": MiSS,
    "bat": Bat,
    "shira": SHiRA,
}

__all__ = [
    "ALGORITHMS",
    "BOFT",
    "C3A",
    "HRA",
    "IA3",
    "OFT",
    "AdaLoRA",
    "Axis",
    "Bat",
    "Common",
    "DeLoRA",
    "FourierFT",
    "Full",
    "GLoRA",
    "HiRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "MiSS",
    "Replace",
    "RoAd",
    "SHiRA",
    "SizedChange",
    "Tokens",
    "VeRA",
    "WeightAdapter",
    "WeightMap",
    "difference",
    "norm",
    "split_blocks",
    "swap_halves",
]
