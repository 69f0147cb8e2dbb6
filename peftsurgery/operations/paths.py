"""Where the paths of an adapter lie in a base that names or sizes them differently."""

from __future__ import annotations

from peftsurgery.adapter import Adapter, members
from peftsurgery.algorithms import Replace
from peftsurgery.codec.bases import BaseWeights
from peftsurgery.codec.keys import BASE_COPY
from peftsurgery.codec.resolving import PEFT_PREFIX


def prefix_of(base: BaseWeights, adapter: Adapter) -> str:
    """What has to stand before an adapter's paths so that they are found, when the model was
    wrapped differently.

    `model.layers…` against `language_model.model.layers…`: tried only when not a single path is
    found as it stands.
    """
    paths = [path.partition(":") for path in adapter.modules]
    if (
        base.architecture.name != "llm"
        or not paths
        or any(base.find(f"{c}:{part}") for c, _, p in paths for part in members(p))
    ):
        return ""
    first = paths[0][2]
    wanted = members(first)[0]
    for stored in base.stored:
        home = stored.partition(":")[2].removesuffix(".weight")
        if home.endswith("." + wanted):
            prefix = home.removesuffix(wanted)
            if all(base.find(f"{c}:{prefix}{members(p)[0]}") for c, _, p in paths):
                return prefix
        if wanted.endswith("." + home):
            strip = wanted.removesuffix(home)
            if all(base.find(f"{c}:{members(p)[0].removeprefix(strip)}") for c, _, p in paths):
                return "-" + strip
    return ""


def prefixed(prefix: str, path: str) -> str:
    """`path` with the prefix that `prefix_of` found; a leading `-` means it is taken away."""
    return path.removeprefix(prefix[1:]) if prefix.startswith("-") else prefix + path


def grown_embeddings(base: BaseWeights, adapter: Adapter, prefix: str) -> dict[str, Replace]:
    """Embeddings that had more or fewer rows in training than the base has, as PEFT saves them
    beside their LoRA.

    `embed_tokens.base_layer.weight` is the weight the LoRA was trained on; of the base's own shape
    it is left aside.
    """
    found: dict[str, Replace] = {}
    for key, value in adapter.extras.items():
        if not key.endswith(BASE_COPY):
            continue
        module = key.removesuffix(BASE_COPY).removeprefix(PEFT_PREFIX)
        path = next((p for p in adapter.modules if p.partition(":")[2] == module), None)
        if path is None:
            continue
        component, _, inner = path.partition(":")
        stored = base.find(f"{component}:{prefixed(prefix, inner)}")
        if stored is not None and stored.shape != tuple(value.shape):
            found[path] = Replace(value)
    return found
