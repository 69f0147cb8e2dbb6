"""Layouts: how each tool spells an adapter in a file. One row per layout, no behaviour.

A layout is a dialect (parameter suffixes) x a container (prefixes, dotted or flattened module
names, where alpha lives) x a vocabulary (a column of the architecture table). Reading is liberal:
any known suffix is understood in any container. Writing follows the row exactly. Sources of the
grammars: PEFT `utils/save_and_load.py`, diffusers `loaders/lora_pipeline.py` and
`utils/state_dict_utils.py`, sd-scripts `networks/lora.py`, LyCORIS `modules/`, ComfyUI
`comfy/lora.py` and `comfy/weight_adapter/`, OneTrainer `util/convert_lora_util.py`, ai-toolkit
`network_mixins.py`, x-flux attention processors, Stability control-LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

LOHA = {f: f"hada_{f}" for f in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
LOKR = {f: f"lokr_{f}" for f in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
FULL = {"diff": "diff"}
NORM = {"diff": "w_norm"}
LORA_DOWN_UP = {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"}
LORA_A_B = {"down": "lora_A.weight", "up": "lora_B.weight"}
OFT_BLOCKS = {"blocks": "oft_blocks", "rescale": "rescale"}  # BOFT: one dimension more
IA3_WEIGHT = {"vector": "weight", "on_input": "on_input"}
GLORA = {f: f"{f}.weight" for f in ("a1", "a2", "b1", "b2", "bm")}
LYCORIS_MAPS = {"boft": OFT_BLOCKS, "oft": OFT_BLOCKS, "ia3": IA3_WEIGHT, "glora": GLORA}
OFT_VECTOR = {"vector": "oft_R.weight", "scaled": "oft_R.scaled_oft"}
PEFT_MAPS = {
    "oft": {"vector": "oft_R.weight", "embedding_vector": "oft_embedding_R.weight"},
    "boft": {"blocks": "boft_R", "rescale": "boft_s"},
    "hra": {"u": "hra_u"},
    "ia3": {"vector": "ia3_l"},
    "road": {"theta": "road_theta", "radius": "road_alpha"},
    "delora": {
        "up": "delora_B",
        "down": "delora_A",
        "bound": "delora_lambda",
        "norms": "delora_w_norm",
    },
    "hira": {
        "up": "hira_B",
        "down": "hira_A",
        "embedding_A": "hira_embedding_A",
        "embedding_B": "hira_embedding_B",
    },
    "tokens": {"values": "trainable_tokens_delta"},  # beside a LoRA below token_adapter
    "adalora": {"up": "lora_B", "e": "lora_E", "down": "lora_A"},
    "vera": {"lambda_b": "vera_lambda_b", "lambda_d": "vera_lambda_d"},  # and base_model.vera_A, B
    "fourierft": {"spectrum": "fourierft_spectrum"},
    "c3a": {"kernel": "c3a_kernel"},
    "bat": {"block": "miss_block"},  # three dimensions
    "miss": {"block": "miss_block"},
    "shira": {"values": "shira_weight", "indices": "shira_indices"},
}


@dataclass(frozen=True)
class Dialect:
    """Parameter suffixes: algorithm -> field -> suffix, and those any algorithm may carry beside
    its own.

    An algorithm that is absent cannot be written in this dialect. `joint` stands between module
    name and suffix.
    """

    algorithms: dict[str, dict[str, str]]
    alpha: str | None = None
    magnitude: str | None = None
    magnitude_axes: tuple[str, ...] = ()
    bias: str | None = None
    norm_bias: str | None = None
    bias_value: str | None = None
    padded_shape: str | None = None
    bias_is_scaled: bool = False  # the stored bias is multiplied by the scale (PEFT lora_B.bias)
    joint: str = "."


KOHYA = Dialect(
    {
        "lora": LORA_DOWN_UP,
        "loha": LOHA,
        "lokr": LOKR,
        "full": FULL,
        "norm": NORM,
        **LYCORIS_MAPS,
    },
    alpha="alpha",
    magnitude="dora_scale",
    magnitude_axes=("out", "in"),
    bias="diff_b",
    norm_bias="b_norm",
)
ONETRAINER = replace(
    KOHYA,
    algorithms={
        **{a: f for a, f in KOHYA.algorithms.items() if a not in LYCORIS_MAPS},
        "oft": OFT_VECTOR,
    },
)
COMFY = Dialect(
    {
        **{a: f for a, f in KOHYA.algorithms.items() if a != "ia3"},
        "set": {"weight": "set_weight"},
    },
    alpha="alpha",
    magnitude="dora_scale",
    magnitude_axes=("out", "in"),
    bias="diff_b",
    norm_bias="b_norm",
    bias_value="bias.set_weight",
    padded_shape="reshape_weight",
)
PEFT = Dialect(
    {"lora": LORA_A_B, "loha": LOHA, "lokr": LOKR, **PEFT_MAPS, "set": {"weight": "weight"}},
    magnitude="lora_magnitude_vector",
    magnitude_axes=("out",),
    bias="lora_B.bias",
    bias_is_scaled=True,
    bias_value="bias",
)
DIFFUSERS = Dialect(
    {"lora": LORA_A_B, "set": {"weight": "weight"}},
    magnitude="lora_magnitude_vector",
    magnitude_axes=("out",),
    bias="lora_B.bias",
    bias_is_scaled=True,
)
DIFFUSERS_CONTROLNET = replace(DIFFUSERS, bias_value="bias")
AB_ALPHA = Dialect(
    {"lora": LORA_A_B, "loha": LOHA, "lokr": LOKR, "oft": OFT_VECTOR},
    alpha="alpha",
    magnitude="dora_scale",
    magnitude_axes=("out", "in"),
)
AI_TOOLKIT = Dialect(
    {"lora": LORA_A_B, "lokr": LOKR},
    magnitude="magnitude",
    magnitude_axes=("out",),
)
BFL = Dialect(
    {"lora": LORA_A_B, "set": {"weight": "weight"}}, bias="lora_B.bias", bias_is_scaled=True
)
PLAIN_AB = Dialect({"lora": LORA_A_B})
PLAIN_DOWN_UP = Dialect({"lora": {"down": "down.weight", "up": "up.weight"}})
DOTTED = Dialect({"lora": {"down": "lora.down.weight", "up": "lora.up.weight"}}, alpha="alpha")
LINEAR_LAYER = Dialect(
    {"lora": {"down": "lora_linear_layer.down.weight", "up": "lora_linear_layer.up.weight"}},
    alpha="alpha",
)
CONTROL = Dialect(
    {"lora": {"down": "down", "up": "up"}, "set": {"weight": "weight"}}, bias_value="bias"
)

# diffusers' attention-processor spelling of the four projections (<= 0.20), unet and text encoder
OLD_ATTENTION = {
    "to_q": "processor.to_q_lora",
    "to_k": "processor.to_k_lora",
    "to_v": "processor.to_v_lora",
    "to_out.0": "processor.to_out_lora",
    "q_proj": "to_q_lora",
    "k_proj": "to_k_lora",
    "v_proj": "to_v_lora",
    "out_proj": "to_out_lora",
}


@dataclass(frozen=True)
class Layout:
    """One row: everything needed to write a file of this layout, and to name it when read.

    container: "peft" (`base_model.model.`), "component" (`unet.`), "flat" (`lora_unet_a_b`),
    "comfy" or "bare" (dotted). prefixes: keys into a component's prefix table, for the denoiser and
    for text encoders. vocabulary: "home", "native", "preferred" (what the layout's own programs
    write for the family) or a column. alpha: where the scale goes: "tensor", "config"
    (adapter_config.json), "metadata" (lora_adapter_metadata) or "none" (folded into the factors).
    """

    name: str
    title: str
    container: str
    dialect: Dialect
    prefixes: tuple[str, str] = ("", "")
    vocabulary: str = "home"
    alpha: str = "tensor"
    text_encoder_dialect: Dialect | None = None
    controlnet_dialect: Dialect | None = None
    text_encoders: bool = True
    spelling: dict[str, str] = field(default_factory=dict)
    families: tuple[str, ...] = ()  # empty: every family
    components: tuple[str, ...] = ()  # empty: every component
    embeddings: bool = False  # textual-inversion vectors (bundle_emb.*) may lie beside the adapter
    readers: str = ""


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "peft",
        "PEFT folder",
        "peft",
        PEFT,
        alpha="config",
        readers="PEFT, transformers, vLLM, TGI; diffusers through load_lora_adapter",
    ),
    Layout(
        "diffusers",
        "diffusers (PEFT keys)",
        "component",
        DIFFUSERS,
        alpha="metadata",
        controlnet_dialect=DIFFUSERS_CONTROLNET,
        readers="diffusers; ComfyUI (ignores the alpha metadata)",
    ),
    Layout(
        "diffusers-dot",
        "diffusers, dotted down/up",
        "component",
        DOTTED,
        alpha="none",  # diffusers refuses UNet files with alpha tensors
        text_encoder_dialect=LINEAR_LAYER,
        readers="diffusers, ComfyUI, SimpleTuner",
    ),
    Layout(
        "diffusers-old",
        "diffusers attention processors",
        "component",
        PLAIN_DOWN_UP,
        alpha="none",
        spelling=OLD_ATTENTION,
        families=("sd1", "sd2", "sdxl"),  # FLUX files with "processor" in a name are XLabs'
        readers="diffusers before 0.21 and later",
    ),
    Layout(
        "kohya",
        "Kohya sd-scripts",
        "flat",
        KOHYA,
        ("kohya", "kohya"),
        "preferred",
        embeddings=True,
        readers="sd-scripts, A1111, Forge, ComfyUI, InvokeAI, diffusers",
    ),
    Layout(
        "kohya-ldm",
        "Kohya, ldm/sgm or native names",
        "flat",
        KOHYA,
        ("kohya", "kohya"),
        "native",
        embeddings=True,
        readers="A1111, Forge, ComfyUI, InvokeAI, diffusers",
    ),
    Layout(
        "kohya-hf",
        "Kohya, diffusers/HF names",
        "flat",
        KOHYA,
        ("kohya", "kohya"),
        "home",
        embeddings=True,
        readers="A1111, ComfyUI, diffusers",
    ),
    Layout(
        "lycoris",
        "LyCORIS standalone",
        "flat",
        KOHYA,
        ("lycoris", "lycoris"),
        readers="LyCORIS, SimpleTuner, ComfyUI",
    ),
    Layout(
        "comfy",
        "ComfyUI native",
        "comfy",
        COMFY,
        ("comfy", "comfy"),
        "native",
        embeddings=True,
        readers="ComfyUI",
    ),
    Layout(
        "ai-toolkit",
        "ai-toolkit",
        "comfy",
        AI_TOOLKIT,
        ("comfy", "comfy"),
        "native",
        "none",
        readers="ai-toolkit, ComfyUI",
    ),
    Layout(
        "onetrainer",
        "OneTrainer mixture (legacy)",
        "flat",
        ONETRAINER,
        ("onetrainer", "onetrainer"),
        embeddings=True,
        readers="OneTrainer, ComfyUI",
    ),
    Layout(
        "onetrainer-kohya",
        "OneTrainer KOHYA",
        "flat",
        ONETRAINER,
        ("kohya", "onetrainer"),
        "preferred",
        embeddings=True,
        readers="OneTrainer, sd-scripts readers",
    ),
    Layout(
        "onetrainer-original",
        "OneTrainer ORIGINAL",
        "bare",
        AB_ALPHA,
        vocabulary="native",
        text_encoders=False,
        readers="OneTrainer, ComfyUI",
    ),
    Layout(
        "onetrainer-comfy",
        "OneTrainer COMFY",
        "comfy",
        AB_ALPHA,
        ("comfy", "comfy"),
        "native",
        embeddings=True,
        readers="OneTrainer, ComfyUI",
    ),
    Layout(
        "bfl",
        "Black Forest Labs (FLUX control LoRA)",
        "bare",
        BFL,
        vocabulary="bfl",
        alpha="none",
        text_encoders=False,
        families=("flux",),
        readers="BFL flux, diffusers, ComfyUI, InvokeAI",
    ),
    Layout(
        "fal-kontext",
        "fal.ai Kontext",
        "peft",
        PLAIN_AB,
        vocabulary="bfl",
        alpha="none",
        text_encoders=False,
        families=("flux",),
        readers="diffusers",
    ),
    Layout(
        "xlabs",
        "XLabs x-flux",
        "bare",
        PLAIN_DOWN_UP,
        vocabulary="xlabs",
        alpha="none",
        text_encoders=False,
        families=("flux",),
        readers="x-flux, diffusers, InvokeAI",
    ),
    Layout(
        "sai-control-lora",
        "Stability control-LoRA",
        "bare",
        CONTROL,
        vocabulary="ldm",
        alpha="none",
        text_encoders=False,
        components=("controlnet",),
        readers="ComfyUI, diffusers",
    ),
)

LAYOUT_NAMES: tuple[str, ...] = tuple(layout.name for layout in LAYOUTS)


def dialect_of(layout: Layout, component: str) -> Dialect:
    """The dialect `layout` writes for a component."""
    if layout.text_encoder_dialect and component.startswith("text_encoder"):
        return layout.text_encoder_dialect
    if layout.controlnet_dialect and component == "controlnet":
        return layout.controlnet_dialect
    return layout.dialect


def layout_named(name: str) -> Layout:
    """The row called `name`; KeyError when there is none."""
    return next(layout for layout in LAYOUTS if layout.name == name)
