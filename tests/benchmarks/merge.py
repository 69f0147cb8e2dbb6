"""How fast `merge` is, beside `cp` of the base and beside PEFT and diffusers doing the same job.

    python tests/benchmarks/merge.py tinyllama          # 2.2 GB bf16, 2 shards, rank 16 on linears
    python tests/benchmarks/merge.py sdxl               # 5.1 GB fp16 UNet, rank 128, convs too
    python tests/benchmarks/merge.py 7b                 # 13.5 GB bf16, 3 shards, rank 16 on linears
    python tests/benchmarks/merge.py tinyllama --peers  # PEFT or diffusers too: slow, much memory

A benchmark and not a test: it prints figures and ratios of one run and always ends with 0. Bases
and adapters are generated (seeded random numbers of real shapes) under --folder, and kept there for
the next run when it is given.

* cp: coreutils' `cp` of the base's weight files in the same round, with `sync` of the copies where
  it says fsync; ours waits for the disk too, so that is the fair partner. Rounds alternate.
* limits: what no merge in a fresh process can do without: importing torch, the products up @ down
  in fp32 added to one tile that stays in the cache, and `cp`. Their sum against the whole process
  says what is left to win.
* memory: peak RssAnon, the memory really taken; ru_maxrss also counts resident pages of mapped
  inputs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.processes import Run, run  # noqa: E402

SDXL = ROOT / "fixtures" / "keys" / "base__diffusers_sdxl_unet.json"


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model."""

    hidden: int
    inner: int
    layers: int
    kv: int
    vocabulary: int
    shards: int


LLAMA = {
    "tinyllama": Shape(2048, 5632, 22, 256, 32000, 2),
    "7b": Shape(4096, 11008, 32, 4096, 32000, 3),
}


def llama_names(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensor names and shapes of the model."""
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        start = f"model.layers.{layer}"
        for name, out, into in (
            ("self_attn.q_proj", shape.hidden, shape.hidden),
            ("self_attn.k_proj", shape.kv, shape.hidden),
            ("self_attn.v_proj", shape.kv, shape.hidden),
            ("self_attn.o_proj", shape.hidden, shape.hidden),
            ("mlp.gate_proj", shape.inner, shape.hidden),
            ("mlp.up_proj", shape.inner, shape.hidden),
            ("mlp.down_proj", shape.hidden, shape.inner),
        ):
            yield f"{start}.{name}.weight", (out, into)
        yield f"{start}.input_layernorm.weight", (shape.hidden,)
        yield f"{start}.post_attention_layernorm.weight", (shape.hidden,)
    yield "model.norm.weight", (shape.hidden,)
    yield "lm_head.weight", (shape.vocabulary, shape.hidden)


def make_llama(folder: Path, shape: Shape) -> None:
    """The base as a sharded transformers folder, and a PEFT LoRA of rank 16 on all linears."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    names = list(llama_names(shape))
    per = -(-len(names) // shape.shards)
    weight_map = {}
    (folder / "base").mkdir(parents=True)
    for index in range(shape.shards):
        shard = f"model-{index + 1:05}-of-{shape.shards:05}.safetensors"
        part = {
            name: torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name, size in names[index * per : (index + 1) * per]
        }
        save_file(part, folder / "base" / shard, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, shard))
    index_file = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index_file))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // (64 if shape.hidden == 2048 else 128),
        "num_key_value_heads": shape.kv // (64 if shape.hidden == 2048 else 128),
        "vocab_size": shape.vocabulary,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    (folder / "base" / "config.json").write_text(json.dumps(config))
    factors = {}
    for name, size in names:
        if "_proj" in name:
            path = "base_model.model." + name.removesuffix(".weight")
            factors[f"{path}.lora_A.weight"] = torch.randn(16, size[1], generator=generator) * 0.02
            factors[f"{path}.lora_B.weight"] = torch.randn(size[0], 16, generator=generator) * 0.02
    (folder / "adapter").mkdir()
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-2] for name, _ in names if "_proj" in name})
    peft = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": targets}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(peft))


def make_sdxl(folder: Path) -> None:
    """The UNet as one fp16 file, and a Kohya LoRA of rank 128 on every linear and conv."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    listing = json.loads(SDXL.read_text())["keys"]
    shapes = {name: (s["shape"] if isinstance(s, dict) else s) for name, s in listing.items()}
    folder.mkdir(parents=True, exist_ok=True)
    base, factors = {}, {}
    for name, size in shapes.items():
        base[name] = torch.empty(size, dtype=torch.float16).normal_(0, 0.02, generator=generator)
        if len(size) >= 2 and name.endswith(".weight"):
            flat = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            rank = min(128, size[0], size[1] * (9 if size[-1] == 3 and len(size) == 4 else 1))
            ones = [1] * (len(size) - 2)
            down = torch.randn(rank, *size[1:], generator=generator) * 0.02
            up = torch.randn(size[0], rank, *ones, generator=generator) * 0.02
            factors[f"{flat}.lora_down.weight"], factors[f"{flat}.lora_up.weight"] = (
                down.half(),
                up.half(),
            )
            factors[f"{flat}.alpha"] = torch.tensor(float(rank))
    save_file(base, folder / "base.safetensors", {"format": "pt"})
    save_file(factors, folder / "adapter.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})


def copy(files: list[Path], to: Path, *, sync: bool) -> float:
    """Seconds for `cp` of the files."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    begin = time.perf_counter()
    subprocess.run(["cp", *map(str, files), str(to)], check=True)
    if sync:
        subprocess.run(["sync", *(str(to / f.name) for f in files)], check=True)
    return time.perf_counter() - begin


PEFT_MERGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""
DIFFUSERS_MERGE = """
import sys, torch
from diffusers import UNet2DConditionModel, StableDiffusionXLPipeline
from safetensors.torch import load_file
config = dict(sample_size=128, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816)
with torch.device("meta"):
    unet = UNet2DConditionModel(**config)
unet.load_state_dict(load_file(sys.argv[1]), assign=True)
unet = unet.float()
state, alphas = StableDiffusionXLPipeline.lora_state_dict(sys.argv[2], unet_config=unet.config)
StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, unet)
unet.fuse_lora()
unet.unload_lora()
unet.half().save_pretrained(sys.argv[3])
"""


PRODUCTS = """
import sys, time, torch
from pathlib import Path
from safetensors.torch import load_file
path = Path(sys.argv[1])
factors = load_file(path / "adapter_model.safetensors" if path.is_dir() else path)
ends = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")
pairs = [(factors[k.removesuffix(d) + u].float().flatten(1), t.float().flatten(1))
    for d, u in ends for k, t in factors.items() if k.endswith(d)]
tile = torch.zeros(1 << 20)
begin = time.perf_counter()
for up, down in pairs:
    step = max(1, tile.numel() // down.shape[1])
    for row in range(0, up.shape[0], step):
        part = up[row : row + step]
        tile[: part.shape[0] * down.shape[1]].view(part.shape[0], -1).addmm_(part, down)
print("SECONDS", time.perf_counter() - begin)
"""


def limits(adapter: Path) -> tuple[float, float]:
    """Seconds to import torch, and for the products of all modules."""
    imported = run(sys.executable, "-c", "import torch").wall
    products = run(sys.executable, "-c", PRODUCTS, adapter).output
    return imported, float(products.rpartition("SECONDS ")[2])


def measure(case: str, folder: Path, rounds: int, peers: bool) -> list[tuple[str, str]]:
    """Rows of the printed table."""
    base = folder / ("base.safetensors" if case == "sdxl" else "base")
    adapter = folder / ("adapter.safetensors" if case == "sdxl" else "adapter")
    files = [base] if base.is_file() else sorted(base.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    result = folder / ("merged.safetensors" if case == "sdxl" else "merged")
    command = [sys.executable, "-m", "peftsurgery", "merge", base, "-a", adapter, "-o", result]
    ours: list[Run] = []
    plain: list[float] = []
    synced: list[float] = []
    for _ in range(rounds):
        plain.append(copy(files, folder / "copy", sync=False))
        synced.append(copy(files, folder / "copy", sync=True))
        shutil.rmtree(folder / "copy")
        _remove(result)
        ours.append(run(*command, "-q", "--architecture", "sdxl" if case == "sdxl" else "llm"))
    walls = [r.wall for r in ours]
    imported, products = limits(adapter)
    bound = imported + products + statistics.median(plain)
    rows = [
        ("base", f"{size / 1e9:.2f} GB in {len(files)} files"),
        ("merge, whole process", f"{statistics.median(walls):.1f} s (min {min(walls):.1f})"),
        ("cp", f"{statistics.median(plain):.1f} s"),
        ("cp + fsync", f"{statistics.median(synced):.1f} s"),
        (
            "speed against cp",
            f"{statistics.median([c / w for c, w in zip(plain, walls, strict=True)]):.2f}",
        ),
        (
            "speed against cp + fsync",
            f"{statistics.median([c / w for c, w in zip(synced, walls, strict=True)]):.2f}",
        ),
        ("limits", f"import {imported:.1f} s, products {products:.1f} s, cp: {bound:.1f} s"),
        ("share of the limits", f"{bound / statistics.median(walls):.2f}"),
        ("peak anonymous memory", f"{max(r.anonymous for r in ours) / 1e6:.0f} MB"),
        ("peak ru_maxrss", f"{max(r.rss for r in ours) / 1e6:.0f} MB"),
        ("adapter", f"{_bytes(adapter) / 1e6:.0f} MB"),
        ("cpu seconds", f"{statistics.median([r.cpu for r in ours]):.1f}"),
    ]
    if peers:
        script = DIFFUSERS_MERGE if case == "sdxl" else PEFT_MERGE
        _remove(result)
        peer = run(sys.executable, "-c", script, base, adapter, folder / "peer")
        shutil.rmtree(folder / "peer")
        name = "diffusers fuse + save" if case == "sdxl" else "PEFT merge_and_unload + save"
        rows.append((name, f"{peer.wall:.1f} s, {peer.rss / 1e9:.1f} GB"))
        rows.append(("times faster", f"{peer.wall / statistics.median(walls):.1f}"))
    _remove(result)
    return rows


def _bytes(path: Path) -> int:
    return sum(f.stat().st_size for f in ([path] if path.is_file() else path.iterdir()))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def main() -> None:
    """Make the inputs, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("case", choices=("tinyllama", "sdxl", "7b"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--folder", type=Path, help="keep the generated files here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)) / arguments.case
        if not folder.exists():
            if arguments.case == "sdxl":
                make_sdxl(folder)
            else:
                make_llama(folder, LLAMA[arguments.case])
        for name, value in measure(arguments.case, folder, arguments.rounds, arguments.peers):
            print(f"{name:32} {value}")


if __name__ == "__main__":
    main()
