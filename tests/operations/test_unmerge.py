"""unmerge: the base comes back bit for bit, or nothing is written and what differs is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import peftsurgery as ps
from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import Full, LoRA, Replace
from peftsurgery.checkpoint import open_checkpoint, save
from peftsurgery.cli import main
from peftsurgery.errors import CheckFailed, UnsafeInputError, UnsupportedError, UsageError
from peftsurgery.operations.undo import FORMAT, digest_of, read_undo
from tests.operations.small_llm import (
    HIDDEN,
    VOCABULARY,
    contents,
    weights,
    write_adapter,
    write_folder,
)


def adapter_of(**modules: object) -> Adapter:
    return Adapter({f"model:{k.replace('__', '.')}": m for k, m in modules.items()}, "llm")  # type: ignore[misc]


def there_and_back(base: Path, adapter: Path | Adapter, tmp: Path, **options: object) -> Path:
    """Merge with an undo file, unmerge, compare every byte; returns the merged checkpoint."""
    suffix = base.suffix
    strength = options.pop("strength", 0.8)
    merged, undo, back = tmp / f"merged{suffix}", tmp / "undo.safetensors", tmp / f"back{suffix}"
    ps.merge(base, [(adapter, strength)], merged, undo=undo, **options)  # type: ignore[arg-type]
    assert contents(merged) != contents(base)
    report = ps.unmerge(merged, undo, back)
    assert report.ok
    assert report.modules
    assert contents(back) == contents(base)
    return merged


# every form of base -------------------------------------------------------------------------------


def test_a_sharded_folder(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", 1)
    merged = there_and_back(base, write_adapter(tmp_path / "adapter", 2), tmp_path)
    index = "model.safetensors.index.json"
    assert (base / index).read_bytes() != (merged / index).read_bytes()  # so it was kept


def test_an_index_given_by_its_path(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", 1)
    index = base / "model.safetensors.index.json"
    ps.merge(index, [(write_adapter(tmp_path / "a", 2), 1)], tmp_path / "m", undo=tmp_path / "u")
    ps.unmerge(tmp_path / "m" / index.name, tmp_path / "u", tmp_path / "back")
    before = contents(base)
    assert contents(tmp_path / "back") == {
        name: before[name] for name in before if name.startswith("model")
    }


def test_a_single_file_with_a_header_of_its_own(tmp_path: Path) -> None:
    """Names in another order than the offsets, odd spacing, padding and metadata: all of it
    comes back.
    """
    write_folder(tmp_path / "folder", 3, torch.float16, shard_size=None)
    raw = (tmp_path / "folder/model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    turned = {name: header[name] for name in sorted(header, reverse=True)}
    turned["__metadata__"] = {"z": "1", "a": "ü"}
    text = json.dumps(turned, indent=1).encode() + b" " * 5
    base = tmp_path / "base.safetensors"
    base.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    there_and_back(base, write_adapter(tmp_path / "adapter", 4), tmp_path)


def test_a_pipeline_folder(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(5)
    base = tmp_path / "base"
    names = {"unet": "down_blocks.1.attentions.0.proj_in.weight", "vae": "encoder.conv_in.weight"}
    (base / "scheduler").mkdir(parents=True)
    (base / "scheduler/scheduler_config.json").write_text("{ }")
    (base / "model_index.json").write_text(
        json.dumps({"_class_name": "X", "unet": ["diffusers", "A"], "vae": ["diffusers", "B"]})
    )
    for component, name in names.items():
        (base / component).mkdir()
        (base / component / "config.json").write_text("{}")
        save(
            base / component / "diffusion_pytorch_model.safetensors",
            {name: torch.randn(8, 6, 1, 1, generator=random), "x": torch.arange(3)},
        )
    up, down = torch.randn(8, 2, generator=random), torch.randn(2, 6, generator=random)
    adapter = Adapter({"unet:down_blocks.1.attentions.0.proj_in": LoRA(up, down)}, "sd1")
    there_and_back(base, adapter, tmp_path)


@pytest.mark.parametrize(("stored", "dtype"), [(torch.float32, "bf16"), (torch.bfloat16, "fp32")])
def test_another_number_type(tmp_path: Path, stored: torch.dtype, dtype: str) -> None:
    """Everything that was cast is in the undo file; integers are not."""
    base = write_folder(tmp_path / "base", 6, stored)
    there_and_back(base, write_adapter(tmp_path / "adapter", 7), tmp_path, dtype=dtype)
    kept = {name.split("/", 2)[2] for name in read_undo(tmp_path / "undo.safetensors").checkpoint
            if name.startswith("tensor/")}  # fmt: skip
    assert kept == set(weights(6)) - {"model.position_ids"}


def test_a_resized_vocabulary(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", 8)
    random = torch.Generator().manual_seed(9)
    rows = VOCABULARY + 3
    adapter = adapter_of(
        model__embed_tokens=Replace(torch.randn(rows, HIDDEN, generator=random)),
        lm_head=Replace(torch.randn(rows, HIDDEN, generator=random)),
    )
    merged = there_and_back(base, adapter, tmp_path, strength=1.0)
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == rows


@pytest.mark.parametrize("stored", [True, False])
def test_a_head_that_was_untied(tmp_path: Path, stored: bool) -> None:
    """The merged checkpoint has one tensor more, or another content in one that no adapter
    touches.
    """
    base = tmp_path / "base"
    base.mkdir()
    tensors = weights(10)
    if not stored:
        del tensors["lm_head.weight"]
    save(base / "model.safetensors", tensors)
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(11)
    change = Full(torch.randn(VOCABULARY, HIDDEN, generator=random))
    adapter = adapter_of(model__embed_tokens=change)
    merged = there_and_back(base, adapter, tmp_path, tied="untie")
    assert "lm_head.weight" in open_checkpoint(merged)
    assert ps.verify(merged, base, [(adapter, 0.8)], tied="untie").answer == "yes"
    assert ps.verify(merged, base, [(adapter, 0.8)]).answer == "no"


def test_replicated_layers(tmp_path: Path) -> None:
    """Layers 0 1 2 3 become 0 1 0 1 2 3, so that untouched tensors stand under other names."""
    base = write_folder(tmp_path / "base", 12)
    folder = write_adapter(tmp_path / "adapter", 13, layers=6)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["layer_replication"] = [[0, 2], [0, 4]]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    there_and_back(base, folder, tmp_path)


def test_in_place_on_a_merged_copy_under_another_name(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", 14, shard_size=None)
    base, merged = tmp_path / "folder/model.safetensors", tmp_path / "merged.safetensors"
    ps.merge(base, [(write_adapter(tmp_path / "a", 15), 1)], merged, undo=tmp_path / "u")
    ps.unmerge(merged, tmp_path / "u", in_place=True)
    assert merged.read_bytes() == base.read_bytes()
    report = ps.unmerge(merged, tmp_path / "u", in_place=True)
    assert "already" in str(report.summary["written"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "folder", "merged.safetensors", "u"]


# refused ------------------------------------------------------------------------------------------


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """base, adapter, merged and undo in one folder."""
    base = write_folder(tmp_path / "base", 20)
    adapter = write_adapter(tmp_path / "adapter", 21)
    ps.merge(base, [(adapter, 0.8)], tmp_path / "merged", undo=tmp_path / "undo")
    return tmp_path


@pytest.mark.parametrize("in_place", [False, True])
def test_one_changed_byte_is_refused_and_the_file_named(case: Path, in_place: bool) -> None:
    shard = sorted((case / "merged").glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    before = contents(case)
    with pytest.raises(CheckFailed, match=shard.name) as caught:
        ps.unmerge(
            case / "merged", case / "undo", None if in_place else case / "b", in_place=in_place
        )
    assert "1 of" in str(caught.value)
    assert contents(case) == before


def test_another_checkpoint_is_refused(case: Path, tmp_path: Path) -> None:
    adapters = [(case / "adapter", 0.5)]
    ps.merge(case / "base", adapters, case / "other")
    single = write_folder(tmp_path / "single", 20, shard_size=None)
    before = contents(case)
    with pytest.raises(CheckFailed, match="not what the merge wrote"):
        ps.unmerge(case / "other", case / "undo", case / "b")
    with pytest.raises(CheckFailed, match=r"has no .*00001-of"):
        ps.unmerge(single, case / "undo", case / "b")
    ps.merge(single / "model.safetensors", adapters, case / "s.safetensors", undo=case / "us")
    with pytest.raises(CheckFailed, match="6 weight files"):
        ps.unmerge(case / "base", case / "us", case / "b")
    (case / "s.safetensors").unlink()
    (case / "us").unlink()
    assert contents(case) == before


def test_a_large_side_file_must_be_as_it_was(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", 22)
    (base / "tokenizer.json").write_bytes(b"x" * ((1 << 20) + 1))
    (base / "merges.txt").write_text("small")
    there_and_back(base, write_adapter(tmp_path / "adapter", 23), tmp_path)
    (tmp_path / "merged/merges.txt").unlink()  # kept in the undo file
    ps.unmerge(tmp_path / "merged", tmp_path / "undo.safetensors", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(base)
    (tmp_path / "merged/tokenizer.json").write_text("changed")
    with pytest.raises(CheckFailed, match=r"tokenizer\.json"):
        ps.unmerge(tmp_path / "merged", tmp_path / "undo.safetensors", tmp_path / "third")
    assert not (tmp_path / "third").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_undo_file_never_gives_a_wrong_base(case: Path) -> None:
    """A flipped bit in a kept tensor is found by the digest of the result."""
    record = read_undo(case / "undo")
    kept = next(t for name, t in record.checkpoint.items() if name.startswith("tensor/"))
    data = bytearray((case / "undo").read_bytes())
    data[(kept.file_range() or (0, 0))[0]] ^= 4
    (case / "undo").write_bytes(data)
    with pytest.raises(CheckFailed, match="SHA-256 is not that of the base"):
        ps.unmerge(case / "merged", case / "undo", case / "back")
    assert not (case / "back").exists()
    assert not list(case.glob(".*"))


@pytest.mark.parametrize("path", ["../out.safetensors", "/etc/x", "a/../../b", "c:\\x", "", "."])
def test_paths_of_an_undo_file_stay_below_the_folder(case: Path, path: str) -> None:
    checkpoint = open_checkpoint(case / "undo")
    record = json.loads(checkpoint.metadata[FORMAT])
    record["files"][0]["path"] = path
    metadata = {**checkpoint.metadata, FORMAT: json.dumps(record)}
    save(case / "evil", dict(checkpoint), metadata)
    with pytest.raises(UnsafeInputError, match="no file name"):
        ps.unmerge(case / "merged", case / "evil", case / "back")


@pytest.mark.parametrize("change", ["header", "tensor", "merged", "version", "record"])
def test_an_undo_file_that_contradicts_itself_is_refused(case: Path, change: str) -> None:
    checkpoint = open_checkpoint(case / "undo")
    tensors: dict[str, object] = dict(checkpoint)
    text = checkpoint.metadata[FORMAT]
    error: type[Exception] = UnsafeInputError
    if change == "header":
        tensors["header/0"] = np.frombuffer(bytes(checkpoint["header/0"].read())[:-8], np.uint8)
    elif change == "tensor":
        tensors["tensor/0/nobody"] = np.zeros(3, np.float32)
    elif change == "merged":
        tensors["merged"] = np.zeros((1, 32), np.uint8)
    elif change == "version":
        text, error = text.replace('"version": 1', '"version": 2'), UnsupportedError
    else:
        text = text[:-1]
    save(case / "bad", tensors, {FORMAT: text})  # type: ignore[arg-type]
    with pytest.raises(error):
        read_undo(case / "bad")


def test_no_undo_file_at_all(case: Path) -> None:
    with pytest.raises(UsageError, match="no undo file"):
        ps.unmerge(case / "merged", next((case / "base").glob("*.safetensors")), case / "back")
    with pytest.raises(UsageError, match="one of the two"):
        ps.unmerge(case / "merged", case / "undo")
    with pytest.raises(UsageError, match="exists"):
        ps.unmerge(case / "merged", case / "undo", case / "base")


def test_an_undo_file_that_cannot_be_written_is_refused_before_the_work(case: Path) -> None:
    adapters = [(case / "adapter", 1.0)]
    for undo, words in (
        (case / "undo", "exists"),
        (case / "no/folder", "does not exist"),
        (case / "x.bin", "safetensors file"),
        (case / "adapter", "is an input"),
        (case / "out", "is an input or the output"),
    ):
        with pytest.raises(UsageError, match=words):
            ps.merge(case / "base", adapters, case / "out", undo=undo)
    assert not (case / "out").exists()


def test_a_pickle_has_no_undo(tmp_path: Path) -> None:
    torch.save(weights(24), tmp_path / "base.pt")
    adapter = write_adapter(tmp_path / "adapter", 25)
    out = tmp_path / "out.safetensors"
    for options in ({"dst": out, "undo": tmp_path / "u"}, {"in_place": True}):
        with pytest.raises(UnsupportedError, match="pickle"):
            ps.merge(tmp_path / "base.pt", [(adapter, 1)], allow_pickle=True, **options)  # type: ignore[arg-type]
    assert not out.exists()


# the command and the digests ----------------------------------------------------------------------


def test_the_command(case: Path) -> None:
    arguments = ["unmerge", str(case / "merged"), "--undo", str(case / "undo")]
    dry = CliRunner().invoke(main, [*arguments, "-o", str(case / "back"), "--dry-run", "--json"])
    assert dry.exit_code == 0, dry.output
    assert not (case / "back").exists()
    done = CliRunner().invoke(main, [*arguments, "-o", str(case / "back"), "--json", "-q"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert {row["was"] for row in report["tables"]["files"]} == {"merged"}
    assert len(report["modules"]) == 12
    assert contents(case / "back") == contents(case / "base")
    placed = CliRunner().invoke(main, [*arguments, "--in-place"])
    assert placed.exit_code == 0, placed.output
    assert contents(case / "merged") == contents(case / "base")
    refused = CliRunner().invoke(main, [*arguments])
    assert refused.exit_code == 2


def test_progress_reaches_its_total(case: Path) -> None:
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int, label: str = "") -> None:
        seen.append((done, total))

    ps.unmerge(case / "merged", case / "undo", case / "back", progress=progress)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    shutil.rmtree(case / "back")

    def interrupting(done: int, total: int, label: str = "") -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ps.unmerge(case / "merged", case / "undo", case / "back", progress=interrupting)
    assert not (case / "back").exists()
    assert not list(case.glob(".*"))


def test_digest_without_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest of what lies outside of any ranges, whatever the size of the buffer."""
    import hashlib
    import random

    from peftsurgery.operations import undo

    random.seed(26)
    data = random.randbytes(5000)
    (tmp_path / "f").write_bytes(data)
    for step in (1, 7, 64, 8192):
        monkeypatch.setattr(undo, "_STEP", step)
        edges = sorted(random.sample(range(5001), 8))
        ranges = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]
        ranges.append((edges[0], edges[0]))
        rest = bytearray(data)
        for a, b in sorted(ranges, reverse=True):
            del rest[a:b]
        expected = hashlib.sha256(data).hexdigest(), hashlib.sha256(rest).hexdigest()
        random.shuffle(ranges)
        assert digest_of(tmp_path / "f", ranges) == expected
