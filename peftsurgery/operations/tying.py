"""Embeddings that are also the output head, and vocabularies that a merge resizes."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import Tokens, WeightAdapter, WeightMap
from peftsurgery.checkpoint import Checkpoint
from peftsurgery.errors import Finding, UsageError
from peftsurgery.operations.plan import Target
from peftsurgery.operations.structure import Structure, parts_of, renamed

TIED = ("error", "both", "untie")
_EMBEDDING = re.compile(
    r"(?P<head>.*?)(?P<name>embed_tokens|wte|word_embeddings|embed_in|shared)\.weight"
)
_HEADS = {"embed_in": "embed_out"}  # GPT-NeoX; everybody else says lm_head
TIE = "tie_word_embeddings"
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")

Touch = tuple[str, WeightAdapter]  # path and module of one side of a tied pair


@dataclass(frozen=True)
class Pair:
    """An input embedding and the output head that shares its tensor; modules, without `.weight`."""

    embedding: str
    head: str
    stored: bool  # the head has a tensor of its own in the file, which loaders overwrite


def tied_pair(base: Checkpoint) -> Pair | None:
    """The pair of a base whose head is its embedding: by config, or by a head that is not stored
    (or stored as a copy).

    Models without a head (encoders, embedding models) have no pair.
    """
    if base.kind == "pipeline":
        return None
    found = [match for name in base if (match := _EMBEDDING.fullmatch(name))]
    if len(found) != 1:
        return None
    embedding = found[0][0].removesuffix(".weight")
    leaf = _HEADS.get(found[0]["name"], "lm_head")
    heads = [name for name in base if name == f"{leaf}.weight" or name.endswith(f".{leaf}.weight")]
    said = None
    if base.config is not None:
        said = next((part[TIE] for part in parts_of(dict(base.config)) if TIE in part), None)
    if len(heads) == 1:
        head = heads[0].removesuffix(".weight")
        return Pair(embedding, head, True) if said is True else None
    architectures = (base.config or {}).get("architectures") or []
    named = (
        any(str(a).endswith(_GENERATES) for a in architectures)
        if isinstance(architectures, list)
        else False
    )
    wrapped = base.config is None and found[0]["head"].endswith(("model.", "transformer."))
    if heads or said is False or not (named or wrapped):
        return None
    return Pair(embedding, leaf, False)


def tied(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    names: Sequence[str],
    *,
    policy: str = "error",
    config: dict[str, object] | None = None,
) -> Structure:
    """What `policy` makes of adapters that change a tied embedding or its head.

    "both": a change of either side is made to the shared tensor. "untie": the head becomes a tensor
    of its own, and tie_word_embeddings false. "error": UsageError when an adapter changes one side
    only; trainable tokens of the embedding are the head's too, as in PEFT. An adapter that changes
    both sides alike is merged once in any case; one that changes them differently needs "untie".
    """
    pair = tied_pair(base)
    sides = [_touched(adapter, pair) for adapter in adapters]
    if pair is None or not any(any(side) for side in sides):
        return Structure(base, list(adapters), config)
    if policy == "untie":
        return _untied(base, adapters, pair, config)
    result: list[Adapter] = []
    for adapter, name, (embedding, head) in zip(adapters, names, sides, strict=True):
        if embedding is not None and head is not None and not _alike(embedding[1], head[1]):
            raise UsageError(
                f"{name}: changes {pair.embedding} and {pair.head} differently, and the base ties "
                "them to one tensor. "
                "Pass --tied untie to write two."
            )
        tokens = head is None and embedding is not None and isinstance(embedding[1], Tokens)
        if (embedding is None) != (head is None) and policy == "error" and not tokens:
            one, other = (
                (pair.embedding, pair.head) if head is None else (pair.head, pair.embedding)
            )
            raise UsageError(
                f"{name}: changes {one}, and the base ties it to {other}: one tensor serves as "
                "both. Pass --tied both to "
                f"change it for both, or --tied untie to leave {other} as it is and write the two "
                "apart."
            )
        result.append(_on_embedding(adapter, embedding, head, pair))
    return Structure(_as_tied(base, pair), result, config)


def _touched(adapter: Adapter, pair: Pair | None) -> tuple[Touch | None, Touch | None]:
    """(path, module) on the embedding and on the head."""
    if pair is None:
        return None, None
    sides: list[Touch | None] = [None, None]
    for path, module in adapter.modules.items():
        inner = path.partition(":")[2]
        for index, wanted in enumerate((pair.embedding, pair.head)):
            if inner == wanted or inner.endswith("." + wanted) or wanted.endswith("." + inner):
                sides[index] = (path, module)
    return sides[0], sides[1]


def _alike(a: WeightAdapter, b: WeightAdapter) -> bool:
    mine, other = a.tensors(), b.tensors()
    return (
        type(a) is type(b)
        and mine.keys() == other.keys()
        and float(a.scale) == float(b.scale)
        and (not isinstance(a, WeightMap) or a.same_map(b))
        and all(torch.equal(t, other[n]) for n, t in mine.items() if t.shape == other[n].shape)
        and all(t.shape == other[n].shape for n, t in mine.items())
    )


def _on_embedding(
    adapter: Adapter, embedding: Touch | None, head: Touch | None, pair: Pair
) -> Adapter:
    """The adapter with its change on the shared tensor, and on the copy of it where the base stores
    one.
    """
    one = embedding or head
    if one is None:
        return adapter
    modules = {path: m for path, m in adapter.modules.items() if head is None or path != head[0]}
    component = one[0].partition(":")[0]
    modules[embedding[0] if embedding else f"{component}:{pair.embedding}"] = one[1]
    if pair.stored:
        modules[head[0] if head else f"{component}:{pair.head}"] = one[1]
    return replace(adapter, modules=modules)


def _as_tied(base: Checkpoint, pair: Pair) -> Checkpoint:
    """The base as a loader sees it: a head stored although it is tied holds what the embedding
    holds.
    """
    if not pair.stored:
        return base
    name = f"{pair.head}.weight"
    return base.with_tensors({**base, name: renamed(base[f"{pair.embedding}.weight"], name)})


def _untied(
    base: Checkpoint, adapters: Sequence[Adapter], pair: Pair, config: dict[str, object] | None
) -> Structure:
    name = f"{pair.head}.weight"
    tensors = dict(base)
    tensors[name] = renamed(base[f"{pair.embedding}.weight"], name)
    current = config if config is not None else base.config
    changed = None
    if current is not None:
        changed = copy.deepcopy(dict(current))
        for part in parts_of(changed):
            if TIE in part or part is changed:
                part[TIE] = False
    note = f"{name} written as a tensor of its own; {TIE} is false now"
    finding = Finding("info", "untied", note)
    if changed is None:
        finding = Finding(
            "warning",
            "untied",
            note,
            None,
            f"set {TIE} to false in the config.json used with the file",
        )
    return Structure(base.with_tensors(tensors), list(adapters), changed, (finding,))


# vocabularies -------------------------------------------------------------------------------------


def embedding_rows(base: Checkpoint, targets: Mapping[str, Target]) -> dict[str, tuple[int, int]]:
    """Rows (before, after) of the embedding and the head of a language model; empty when there is
    no single embedding.
    """
    found = [match for name in base if (match := _EMBEDDING.fullmatch(name))]
    if base.kind == "pipeline" or len(found) != 1:
        return {}
    leaf = _HEADS.get(found[0]["name"], "lm_head")
    names = [
        found[0][0],
        *(n for n in base if n == f"{leaf}.weight" or n.endswith(f".{leaf}.weight")),
    ]
    return {
        name: (
            base[name].shape[0],
            targets[name].shape[0] if name in targets else base[name].shape[0],
        )
        for name in names
    }


def with_vocabulary(
    config: dict[str, object] | None, rows: Mapping[str, tuple[int, int]]
) -> dict[str, object] | None:
    """config.json with `vocab_size` as the merge leaves it; `rows`: tensor -> (before, after) of
    embedding and head.

    Raises UsageError when embedding and head end up with different numbers of rows.
    """
    sizes = {after for _, after in rows.values()}
    if not any(before != after for before, after in rows.values()):
        return config
    if len(sizes) > 1:
        shown = ", ".join(f"{name} {after}" for name, (_, after) in rows.items())
        raise UsageError(
            f"the merge resizes the vocabulary unevenly: {shown}. The adapter must hold both, or "
            "the base must be resized "
            "first."
        )
    if config is None:
        return None
    changed = copy.deepcopy(config)
    before = {before for before, _ in rows.values()}
    for part in parts_of(changed):
        if part.get("vocab_size") in before:
            part["vocab_size"] = next(iter(sizes))
    return changed
