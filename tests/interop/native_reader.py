"""An independent reader of ComfyUI's files: native base weights and patches, written from the
formats alone.

Nothing here uses the package. Names: `diffusion_model.<native path>` and
`text_encoders.<name>.transformer.<path>`, with LyCORIS's suffixes, `lora_A`/`lora_B`, `set_weight`
and `reshape_weight` (ComfyUI comfy/lora.py, comfy/weight_adapter/); native FLUX and ldm names as
Black Forest Labs' and Stability's checkpoints have them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Weights = dict[str, Tensor]


# native weights from diffusers' -------------------------------------------------------------------


def _copy(result: Weights, state: State, native: str, *names: str) -> None:
    """weight and bias, where there are any, of a module made of `names`, one below the other."""
    for parameter in ("weight", "bias"):
        if f"{names[0]}.{parameter}" in state:
            result[f"{native}.{parameter}"] = torch.cat([state[f"{n}.{parameter}"] for n in names])


def flux_native(state: State, double: int, single: int) -> Weights:
    """A FLUX transformer in Black Forest Labs' names."""
    result: Weights = {}
    for native, name in (
        ("img_in", "x_embedder"),
        ("txt_in", "context_embedder"),
        ("final_layer.linear", "proj_out"),
        *(
            (f"{short}.{side}_layer", f"time_text_embed.{long}_embedder.linear_{number}")
            for short, long in (
                ("time_in", "timestep"),
                ("vector_in", "text"),
                ("guidance_in", "guidance"),
            )
            for number, side in ((1, "in"), (2, "out"))
        ),
    ):
        _copy(result, state, native, name)
    for parameter in ("weight", "bias"):  # scale and shift stand the other way round
        scale, shift = state[f"norm_out.linear.{parameter}"].chunk(2)
        result[f"final_layer.adaLN_modulation.1.{parameter}"] = torch.cat([shift, scale])
    for n in range(double):
        theirs, ours = f"double_blocks.{n}", f"transformer_blocks.{n}"
        for side, qkv, out, mlp, mod, norms in (
            ("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm1", ("norm_q", "norm_k")),
            (
                "txt",
                ("add_q_proj", "add_k_proj", "add_v_proj"),
                "to_add_out",
                "ff_context",
                "norm1_context",
                ("norm_added_q", "norm_added_k"),
            ),
        ):
            _copy(result, state, f"{theirs}.{side}_attn.qkv", *(f"{ours}.attn.{x}" for x in qkv))
            _copy(result, state, f"{theirs}.{side}_attn.proj", f"{ours}.attn.{out}")
            _copy(result, state, f"{theirs}.{side}_mlp.0", f"{ours}.{mlp}.net.0.proj")
            _copy(result, state, f"{theirs}.{side}_mlp.2", f"{ours}.{mlp}.net.2")
            _copy(result, state, f"{theirs}.{side}_mod.lin", f"{ours}.{mod}.linear")
            for kind, norm in zip(("query", "key"), norms, strict=True):
                name = f"{theirs}.{side}_attn.norm.{kind}_norm.scale"
                result[name] = state[f"{ours}.attn.{norm}.weight"]
    for n in range(single):
        theirs, ours = f"single_blocks.{n}", f"single_transformer_blocks.{n}"
        fused = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        _copy(result, state, f"{theirs}.linear1", *(f"{ours}.{x}" for x in fused))
        _copy(result, state, f"{theirs}.linear2", f"{ours}.proj_out")
        _copy(result, state, f"{theirs}.modulation.lin", f"{ours}.norm.linear")
        for kind, norm in (("query", "norm_q"), ("key", "norm_k")):
            result[f"{theirs}.norm.{kind}_norm.scale"] = state[f"{ours}.attn.{norm}.weight"]
    return result


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_native(state: State, layers: int = 2) -> Weights:
    """A UNet in ldm names: blocks counted through, L = `layers` per level (`input_blocks.{1 + (L +
    1) b + j}`)."""
    attended = {
        ".".join(n.split(".")[:2]) for n in state if n.startswith("up_") and ".attentions." in n
    }

    def native(name: str) -> str:
        for top, other in TOP.items():
            if name.startswith(top + "."):
                return other + name.removeprefix(top)
        level, part, *rest = name.split(".")
        if level == "mid_block":
            kind, index = part, int(rest.pop(0))
            block, slot = "middle_block", 1 if kind == "attentions" else 2 * index
            start = f"{block}.{slot}"
        else:
            b, kind, index = int(part), rest.pop(0), int(rest.pop(0))
            if level == "down_blocks":
                if kind == "downsamplers":
                    return f"input_blocks.{(layers + 1) * (b + 1)}.0.op.{rest[-1]}"
                start = f"input_blocks.{1 + (layers + 1) * b + index}.{int(kind == 'attentions')}"
            elif kind == "upsamplers":
                slot = 2 if f"up_blocks.{b}" in attended else 1
                return f"output_blocks.{(layers + 1) * b + layers}.{slot}.conv.{rest[-1]}"
            else:
                start = f"output_blocks.{(layers + 1) * b + index}.{int(kind == 'attentions')}"
        if kind == "resnets":
            rest[0] = RESNET[rest[0]]
        return ".".join([start, *rest])

    return {native(name): tensor for name, tensor in state.items()}


def clip_native(state: State) -> Weights:
    """A CLIP text encoder as ComfyUI has it: Hugging Face names with `text_model`."""
    wrapped = any(name.startswith("text_model.") for name in state)
    return dict(state) if wrapped else {f"text_model.{name}": t for name, t in state.items()}


# patches ------------------------------------------------------------------------------------------

SUFFIXES = (
    *("lora_up.weight", "lora_down.weight", "lora_mid.weight", "lora_A.weight", "lora_B.weight"),
    *(f"hada_{n}" for n in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{n}" for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    *("alpha", "dora_scale", "diff", "diff_b", "w_norm", "b_norm", "set_weight", "reshape_weight"),
)


def _delta(p: Weights) -> Tensor | None:
    """ΔW of one module's tensors, scale included, in the factors' own shape."""
    up, down = (
        p.get("lora_up.weight", p.get("lora_B.weight")),
        p.get("lora_down.weight", p.get("lora_A.weight")),
    )
    alpha = p.get("alpha")
    if up is not None and down is not None:
        s = 1.0 if alpha is None else alpha / down.shape[0]
        if "lora_mid.weight" in p:
            mid = p["lora_mid.weight"]
            return s * torch.einsum("mnhw,om,ni->oihw", mid, up.flatten(1), down.flatten(1))
        return s * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
    if "hada_w1_a" in p:
        s = 1.0 if alpha is None else alpha / p["hada_w1_b"].shape[0]
        halves = []
        for n in "12":
            a, b = p[f"hada_w{n}_a"], p[f"hada_w{n}_b"]
            core = p.get(f"hada_t{n}")
            halves.append(a @ b if core is None else torch.einsum("ijhw,jr,ip->prhw", core, b, a))
        return s * halves[0] * halves[1]
    if "lokr_w1" in p or "lokr_w1_a" in p:
        rank = next((p[n].shape[0] for n in ("lokr_w2_b", "lokr_w1_b") if n in p), None)
        s = 1.0 if alpha is None or rank is None else alpha / rank
        w1 = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
        if "lokr_w2" in p:
            w2 = p["lokr_w2"]
        elif "lokr_t2" in p:
            w2 = torch.einsum("ijhw,jr,ip->prhw", p["lokr_t2"], p["lokr_w2_b"], p["lokr_w2_a"])
        else:
            w2 = p["lokr_w2_a"] @ p["lokr_w2_b"]
        return s * torch.kron(w1.reshape(*w1.shape[:2], *[1] * (w2.ndim - 2)), w2.contiguous())
    return p.get("diff", p.get("w_norm"))


def _patched(weight: Tensor, p: Weights) -> Tensor:
    """W + ΔW, or m (W + ΔW) / ‖W + ΔW‖ with the norm over all axes but that of m."""
    if "set_weight" in p:
        return p["set_weight"]
    if "reshape_weight" in p:
        padded = torch.zeros([int(n) for n in p["reshape_weight"]])
        padded[tuple(slice(0, n) for n in weight.shape)] = weight
        weight = padded
    delta = _delta(p)
    if delta is None:
        return weight
    weight = weight + delta.reshape(weight.shape)
    if "dora_scale" in p:
        m = p["dora_scale"]
        axis = 0 if m.shape[0] == weight.shape[0] and m.shape[1] == 1 else 1
        others = [d for d in range(weight.ndim) if d != axis]
        norm = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
        weight = weight * (m.reshape(norm.shape) / norm)
    return weight


def patched(weights: State, tensors: State, prefix: str) -> Weights:
    """The native weights that the file changes, changed. Raises KeyError for a key that belongs
    nowhere."""
    modules: dict[str, Weights] = {}
    for key, tensor in tensors.items():
        if not key.startswith(prefix):
            continue
        suffix = next((s for s in SUFFIXES if key.endswith("." + s)), None)
        if suffix is None:
            raise KeyError(key)
        modules.setdefault(key[len(prefix) : -len(suffix) - 1], {})[suffix] = tensor.float()
    result: Weights = {}
    for name, p in modules.items():
        # a name is that of a `.weight` without it, or of any other parameter in full
        target = f"{name}.weight" if f"{name}.weight" in weights else name
        result[target] = _patched(weights[target], p)
        change = p.get("diff_b", p.get("b_norm"))
        if change is not None:
            result[f"{name}.bias"] = weights[f"{name}.bias"] + change
    return result
