"""Bases on disk, single-file checkpoints in the names of the original releases, and dense oracles
in fp64.

The names of the single files are written out here from the releases' own conventions; diffusers'
conversion functions read them back in the tests, so that nothing of the package decides what is
right.
"""

from __future__ import annotations

import atexit
import inspect
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fixtures import bases

GOLDEN = Path(bases.__file__).parent / "golden"
Tensors = dict[str, Tensor]
torch.set_num_threads(1)  # thousands of tiny tensors: a thread pool only costs


@lru_cache(maxsize=1)
def workspace() -> Path:
    """A folder for bases that several tests read."""
    folder = Path(tempfile.mkdtemp(prefix="merge-bases-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def saved(builder: str, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """The folder `save_pretrained` makes of one of the tiny bases."""
    name = re.sub(r"\W+", "-", f"{builder}-{dtype}-{shard}")
    folder = workspace() / name
    bases.BUILDERS[builder](dtype=dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def state(folder: Path) -> Tensors:
    """Every tensor of a folder (of a pipeline: `component:name`) or file, read by the safetensors
    library.
    """
    if folder.is_file():
        return load_file(folder)
    found: Tensors = {}
    for file in sorted(folder.rglob("*.safetensors")):
        part = file.parent.relative_to(folder)
        prefix = "" if str(part) == "." else f"{part}:"
        found |= {prefix + name: tensor for name, tensor in load_file(file).items()}
    return found


def random(seed: int) -> Callable[..., Tensor]:
    """Seeded normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def write(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    """A file written by the safetensors library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, path, metadata or None)
    return path


# adapters in their own spelling
# ----------------------------------------------------------------------


def kohya_lora(
    weights: Mapping[str, Tensor], *, seed: int, alpha: float = 2.0, rank: int = 3
) -> tuple[Tensors, Tensors]:
    """(file, deltas in fp64 by key of `weights`) of a Kohya LoRA; keys of `weights` are flattened
    module names.
    """
    normal = random(seed)
    file: Tensors = {}
    deltas: Tensors = {}
    for index, (name, weight) in enumerate(weights.items()):
        r = rank + index % 2
        kernel = weight.shape[2:]
        down = normal(r, *weight.shape[1:]) * 0.1
        up = normal(weight.shape[0], r, *[1] * len(kernel)) * 0.1
        file |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(alpha),
        }
        product = up.double().flatten(1) @ down.double().flatten(1)
        deltas[name] = (alpha / r) * product.reshape(weight.shape)
    return file, deltas


def dotted_lora(file: Mapping[str, Tensor], scale: float = 1.0) -> Tensors:
    """Module name -> ΔW in fp64 of a file with lora_A and lora_B, as matrices; `scale` for all."""
    found: Tensors = {}
    for key, down in file.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            up = file[f"{module}.lora_B.weight"]
            found[module] = scale * (up.double().flatten(1) @ down.double().flatten(1))
    return found


# single files
# ------------------------------------------------------------------------------------------

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def ldm_name(name: str, *, attention_in: Callable[[int], bool]) -> str:
    """A diffusers UNet name in the names of the release (CompVis ldm, Stability sgm)."""
    for head, other in _TOP.items():
        if name.startswith(head + "."):
            return other + name.removeprefix(head)
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
        side, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if kind == "downsamplers":
            return f"input_blocks.{3 * (block + 1)}.0.{rest.replace('conv', 'op')}"
        if kind == "upsamplers":
            return f"output_blocks.{3 * block + 2}.{2 if attention_in(block) else 1}.{rest}"
        place = (
            f"input_blocks.{1 + 3 * block + index}"
            if side == "down"
            else f"output_blocks.{3 * block + index}"
        )
        return f"{place}.{_inner(kind, rest)}"
    match = re.fullmatch(r"mid_block\.(\w+)\.(\d+)\.(.+)", name)
    assert match is not None, name
    place = {("resnets", "0"): 0, ("attentions", "0"): 1, ("resnets", "1"): 2}[match[1], match[2]]
    return f"middle_block.{place}.{_inner(match[1], match[3]).partition('.')[2]}"


def _inner(kind: str, rest: str) -> str:
    if kind == "attentions":
        return f"1.{rest}"
    head, _, parameter = rest.partition(".")
    return f"0.{_RESNET[head]}.{parameter}"


def sdxl_ldm(name: str) -> str:
    return ldm_name(name, attention_in=lambda block: block in (0, 1))


def sd_ldm(name: str) -> str:
    return ldm_name(name, attention_in=lambda block: block in (1, 2, 3))


_CLIP = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def plain_clip(name: str) -> str:
    """Without the level that transformers 5 drops in CLIPTextModel."""
    return name.removeprefix("text_model.")


def openclip(hf: Mapping[str, Tensor]) -> Tensors:
    """A Hugging Face CLIP text model in OpenCLIP's names: in_proj fused, text_projection
    transposed.
    """
    found: Tensors = {}
    for name, tensor in hf.items():
        name = plain_clip(name)
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            layer, module, parameter = match.groups()
            head = f"transformer.resblocks.{layer}"
            if module.endswith(("q_proj", "k_proj", "v_proj")):
                trio = [_layer(hf, layer, f"self_attn.{x}_proj.{parameter}") for x in "qkv"]
                found[f"{head}.attn.in_proj_{parameter}"] = torch.cat(trio)
            else:
                found[f"{head}.{_CLIP[module]}.{parameter}"] = tensor
        elif name == "text_projection.weight":
            found["text_projection"] = tensor.T
        else:
            found[
                {
                    "embeddings.token_embedding.weight": "token_embedding.weight",
                    "embeddings.position_embedding.weight": "positional_embedding",
                    "final_layer_norm.weight": "ln_final.weight",
                    "final_layer_norm.bias": "ln_final.bias",
                }[name]
            ] = tensor
    return found


def _layer(hf: Mapping[str, Tensor], layer: str, rest: str) -> Tensor:
    return next(t for n, t in hf.items() if plain_clip(n) == f"encoder.layers.{layer}.{rest}")


@cache
def sdxl_single(dtype: torch.dtype = torch.float32) -> Path:
    """The tiny SDXL pipeline as one file, like the release's."""
    tensors: Tensors = {}
    for name, tensor in state(saved("tiny_sdxl_pipeline", dtype)).items():
        component, _, inner = name.partition(":")
        if component == "unet":
            tensors[f"model.diffusion_model.{sdxl_ldm(inner)}"] = tensor
        elif component == "text_encoder":
            tensors[f"conditioner.embedders.0.transformer.text_model.{plain_clip(inner)}"] = tensor
        elif component == "vae":
            tensors[f"first_stage_model.{inner}"] = tensor
    clip_g = state(saved("tiny_sdxl_pipeline", dtype) / "text_encoder_2")
    tensors |= {f"conditioner.embedders.1.model.{n}": t for n, t in openclip(clip_g).items()}
    return write(workspace() / f"sdxl-{dtype}.safetensors", tensors, **{"modelspec.title": "tiny"})


def sdxl_from_single(file: Path) -> Tensors:
    """`component:name` -> tensor of an SDXL single file, by diffusers' own conversion functions."""
    from diffusers.loaders import single_file_utils as single
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    tensors = load_file(file)
    unet = single.convert_ldm_unet_checkpoint(dict(tensors), bases.SDXL_UNET)
    clip_l = single.convert_ldm_clip_checkpoint(
        dict(tensors), "conditioner.embedders.0.transformer."
    )
    model = CLIPTextModelWithProjection(CLIPTextConfig(**bases.CLIP_TEXT_2))
    clip_g = single.convert_open_clip_checkpoint(
        model, dict(tensors), "conditioner.embedders.1.model."
    )
    found = {f"unet:{n}": t for n, t in unet.items()}
    found |= {f"text_encoder:{plain_clip(n)}": t for n, t in clip_l.items()}
    found |= {f"text_encoder_2:{plain_clip(n)}": t for n, t in clip_g.items()}
    return found


_FLUX = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "proj_out": "final_layer.linear",
}
_FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
}
_FLUX_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
_FLUX_FUSED = {
    ("transformer_blocks", "double_blocks", "img_attn.qkv"): (
        "attn.to_q", "attn.to_k", "attn.to_v",
    ),
    ("transformer_blocks", "double_blocks", "txt_attn.qkv"): (
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
    ),
    ("single_transformer_blocks", "single_blocks", "linear1"): (
        "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp",
    ),
}  # fmt: skip


def bfl(diffusers: Mapping[str, Tensor]) -> Tensors:
    """A diffusers FLUX transformer in Black Forest Labs' names."""
    found: Tensors = {}
    blocks: dict[str, set[str]] = {}
    for name, tensor in diffusers.items():
        module, _, parameter = name.rpartition(".")
        if module in _FLUX:
            found[f"{_FLUX[module]}.{parameter}"] = tensor
        elif module == "norm_out.linear":
            low, high = tensor.chunk(2)
            found[f"final_layer.adaLN_modulation.1.{parameter}"] = torch.cat([high, low])
        else:
            kind, number, inner = module.split(".", 2)
            blocks.setdefault(kind, set()).add(number)
            if kind == "transformer_blocks" and inner in _FLUX_DOUBLE:
                found[f"double_blocks.{number}.{_FLUX_DOUBLE[inner]}.{parameter}"] = tensor
            elif kind == "transformer_blocks" and inner in _FLUX_NORMS:
                found[f"double_blocks.{number}.{_FLUX_NORMS[inner]}.scale"] = tensor
            elif kind == "single_transformer_blocks" and inner in ("attn.norm_q", "attn.norm_k"):
                which = {"attn.norm_q": "query_norm", "attn.norm_k": "key_norm"}[inner]
                found[f"single_blocks.{number}.norm.{which}.scale"] = tensor
            elif kind == "single_transformer_blocks" and inner in ("norm.linear", "proj_out"):
                which = {"norm.linear": "modulation.lin", "proj_out": "linear2"}[inner]
                found[f"single_blocks.{number}.{which}.{parameter}"] = tensor
    for (kind, other, name), parts in _FLUX_FUSED.items():
        for number in sorted(blocks[kind]):
            for parameter in ("weight", "bias"):
                pieces = [diffusers[f"{kind}.{number}.{part}.{parameter}"] for part in parts]
                found[f"{other}.{number}.{name}.{parameter}"] = torch.cat(pieces)
    return found


@cache
def flux_single(dtype: torch.dtype = torch.float32) -> Path:
    """The transformer of the tiny FLUX pipeline as one file, like the release's."""
    transformer = state(saved("tiny_flux_pipeline", dtype) / "transformer")
    return write(workspace() / f"flux-{dtype}.safetensors", bfl(transformer))


def flux_from_single(file: Path) -> Tensors:
    """Diffusers name -> tensor of a BFL file, by diffusers' own conversion function (its one width
    made ours).
    """
    from diffusers.loaders import single_file_utils as single

    source = inspect.getsource(single.convert_flux_transformer_checkpoint_to_diffusers)
    width = (
        bases.FLUX_TRANSFORMER["attention_head_dim"] * bases.FLUX_TRANSFORMER["num_attention_heads"]
    )
    assert source.count("inner_dim = 3072") == 1
    scope = dict(vars(single))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {width}"), scope)
    return scope["convert_flux_transformer_checkpoint_to_diffusers"](load_file(file))


# comparing
# --------------------------------------------------------------------------------------------------


def check(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    deltas: Mapping[str, Tensor],
    *,
    tolerance: float = 1e-6,
) -> None:
    """`after` is `before` plus `deltas` (fp64, by tensor name) to `tolerance` of each weight, and
    equal elsewhere.
    """
    assert before.keys() == after.keys()
    missing = deltas.keys() - before.keys()
    assert not missing, sorted(missing)[:3]
    for name, weight in before.items():
        if name not in deltas:
            assert torch.equal(weight, after[name]), name
            continue
        expected = weight.double() + deltas[name].reshape(weight.shape)
        error = (after[name].double() - expected).abs().max() / expected.abs().max()
        assert error < tolerance, (name, float(error))
        assert not torch.equal(weight, after[name]), name


def off_rounding(result: Tensor, exact: Tensor) -> tuple[int, int]:
    """(elements that are not fp64 `exact` rounded to nearest, those of them that are no near ties).

    A near tie lies within the error of an fp32 sum from the midpoint of two neighbours of the
    result's dtype.
    """
    nearest = exact.to(result.dtype)
    wrong = (result != nearest).nonzero(as_tuple=True)
    a, b = result[wrong].double(), nearest[wrong].double()
    midpoint = (a + b) / 2
    slack = 64 * torch.finfo(torch.float32).eps * exact.abs().max()
    far = (exact[wrong] - midpoint).abs() > slack
    return int(wrong[0].numel()), int(far.sum())
