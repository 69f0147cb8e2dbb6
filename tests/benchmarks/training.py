"""What the runtime benchmark trains: small llamas, and the same adapter in every tool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OURS, HAND, PEFT, LYCORIS = "ours", "by hand", "PEFT", "LyCORIS"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 8

Options = dict[str, object]
Step = Callable[[], None]


# models -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A llama and a batch for it."""

    width: int
    inner: int
    heads: int
    batch: int
    tokens: int
    rounds: int
    layers: int = 4

    def model(self) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            use_cache=False,
        )
        return LlamaForCausalLM(config)

    def ids(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, 256, (self.batch, self.tokens), generator=generator)


SIZES = {
    "wide": Size(512, 1376, 8, 4, 64, 10),
    "small": Size(64, 176, 4, 1, 8, 60),
}


class ByHand(nn.Module):
    """The shortest LoRA."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.down = nn.Parameter(torch.empty(rank, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up) * self.scale


# adapters -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One algorithm in every tool: our `attach`, the name and fields of PEFT's config, LyCORIS's
    options, and how many times faster than PEFT it is asked to be.
    """

    algorithm: str
    ours: Options = field(default_factory=dict)
    peft: tuple[str, Options] | None = None
    lycoris: Options | None = None
    by_hand: bool = False
    target: float = 1.0


ROWS: dict[str, Row] = {
    "lora": Row(
        "lora",
        {"rank": RANK, "alpha": 16},
        ("LoraConfig", {"r": RANK, "lora_alpha": 16}),
        {"algo": "lora", "linear_dim": RANK, "linear_alpha": 16},
        by_hand=True,
    ),
    "dora": Row(
        "lora",
        {"rank": RANK, "alpha": 16, "dora": True},
        ("LoraConfig", {"r": RANK, "lora_alpha": 16, "use_dora": True}),
        {"algo": "lora", "linear_dim": RANK, "linear_alpha": 16, "dora_wd": True},
        target=1.2,
    ),
    "loha": Row(
        "loha",
        {"rank": RANK, "alpha": 16},
        ("LoHaConfig", {"r": RANK, "alpha": 16}),
        {"algo": "loha", "linear_dim": RANK, "linear_alpha": 16},
        target=1.4,
    ),
    "lokr": Row(
        "lokr",
        {"rank": RANK, "alpha": 16},
        ("LoKrConfig", {"r": RANK, "alpha": 16}),
        {"algo": "lokr", "linear_dim": RANK, "linear_alpha": 16, "factor": -1},
        target=1.5,
    ),
    "oft": Row(
        "oft",
        {"block_size": 16},
        ("OFTConfig", {"oft_block_size": 16, "r": 0}),
        {"algo": "diag-oft", "linear_dim": 16, "linear_alpha": 1e9},
    ),
    "boft": Row(
        "boft",
        {"block_size": 8},
        ("BOFTConfig", {"boft_block_size": 8, "boft_block_num": 0}),
        target=4.0,
    ),
    "hra": Row("hra", {"rank": RANK}, ("HRAConfig", {"r": RANK}), target=4.0),
    "ia3": Row(
        "ia3",
        {},
        ("IA3Config", {"feedforward_modules": []}),
        {"algo": "ia3"},
    ),
    "glora": Row("glora", {"rank": RANK}, None, {"algo": "glora", "linear_dim": RANK}),
    "adalora": Row(
        "adalora",
        {"rank": RANK},
        ("AdaLoraConfig", {"init_r": RANK, "target_r": RANK, "total_step": 1000}),
    ),
    "vera": Row("vera", {"rank": RANK}, ("VeraConfig", {"r": RANK})),
    "fourierft": Row("fourierft", {"frequencies": 64}, ("FourierFTConfig", {"n_frequency": 64})),
    "miss": Row("miss", {"rank": RANK}, ("MissConfig", {"r": RANK})),
    "shira": Row("shira", {"rank": RANK}, ("ShiraConfig", {"r": RANK})),
    "c3a": Row("c3a", {"block_size": 16}, ("C3AConfig", {"block_size": 16})),
    "road": Row("road", {"group": 16}, ("RoadConfig", {"group_size": 16})),
    "delora": Row("delora", {"rank": RANK}, ("DeloraConfig", {"r": RANK})),
    "hira": Row("hira", {"rank": RANK}, ("HiraConfig", {"r": RANK})),
}


def ours(model: nn.Module, row: Row) -> list[nn.Parameter]:
    from peftsurgery import runtime

    runtime.attach(model, row.algorithm, targets=TARGETS, **row.ours)  # type: ignore[arg-type]
    return list(runtime.trainable_parameters(model).values())


def by_hand(model: nn.Module, row: Row) -> list[nn.Parameter]:
    model.requires_grad_(False)
    found: list[nn.Parameter] = []
    for path, module in list(model.named_modules()):
        owner, _, name = path.rpartition(".")
        if name in TARGETS and isinstance(module, nn.Linear):
            hand = ByHand(module, RANK, 2.0)
            setattr(model.get_submodule(owner), name, hand)
            found += [hand.down, hand.up]
    return found


def peft(model: nn.Module, row: Row) -> list[nn.Parameter]:
    import peft as library

    assert row.peft is not None
    name, options = row.peft
    config = getattr(library, name)(target_modules=list(TARGETS), **options)
    library.get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    return [p for p in model.parameters() if p.requires_grad]


def lycoris(model: nn.Module, row: Row) -> list[nn.Parameter]:
    import lycoris as library

    assert row.lycoris is not None
    model.requires_grad_(False)
    library.LycorisNetwork.apply_preset(
        {
            "enable_conv": False,
            "target_module": [],
            "target_name": [f".*{name}" for name in TARGETS],
            "module_algo_map": {},
            "name_algo_map": {},
        }
    )
    network = library.create_lycoris(model, multiplier=1.0, **row.lycoris)  # type: ignore[arg-type]
    network.apply_to()
    model.__dict__["lycoris_network"] = network  # LyCORIS leaves it to the caller to keep it
    return [p for p in network.parameters() if p.requires_grad]


def tools(row: Row) -> dict[str, Callable[[nn.Module, Row], list[nn.Parameter]]]:
    found: dict[str, Callable[[nn.Module, Row], list[nn.Parameter]]] = {OURS: ours}
    if row.by_hand:
        found[HAND] = by_hand
    if row.peft:
        found[PEFT] = peft
    if row.lycoris:
        found[LYCORIS] = lycoris
    return found


@dataclass
class Training:
    """One model with adapters, ready to step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    ids: Tensor
    count: int

    def loss(self) -> Tensor:
        return self.model(input_ids=self.ids, labels=self.ids).loss

    def step(self) -> None:
        if self.optimizer is None:
            self.loss().backward()
            return
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()

    def kept(self) -> int:
        """Bytes kept between forward and backward."""
        own = {_storage(t)[0] for t in (*self.model.parameters(), *self.model.buffers())}
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            found.update([_storage(tensor)])
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss()
        loss.backward()
        return sum(size for place, size in found.items() if place not in own)


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor's storage lies, and its bytes."""
    if tensor.is_sparse:
        parts = (tensor._values(), tensor._indices())
        return parts[0].data_ptr(), sum(part.nbytes for part in parts)
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def bare(size: Size) -> Training:
    """The model without adapters; the gradient runs through all of it and ends at its start."""
    model = size.model().train().requires_grad_(False)

    def start(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output.requires_grad_()

    model.get_input_embeddings().register_forward_hook(start)  # type: ignore[operator]
    return Training(model, None, size.ids(), 0)


def training(size: Size, row: Row, tool: str) -> Training:
    """The model of a tool, every trained value moved from its start; two steps are done."""
    model = size.model().train()
    parameters = tools(row)[tool](model, row)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    count = sum(p.numel() for p in parameters)
    found = Training(model, optimizer, size.ids(), count)
    for _ in range(2):
        found.step()
    return found
