"""OFT, BOFT, HRA, IA3 and GLoRA between the tensors of a file and the classes: which convention a
file follows, and which one a dialect can hold.

PEFT rotates inputs, LyCORIS and Kohya outputs; the two are different maps and are never exchanged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch

from peftsurgery.algorithms import BOFT, IA3, OFT, GLoRA, WeightAdapter, WeightMap
from peftsurgery.codec import peft_only, projections
from peftsurgery.codec.map_shapes import NEEDED, Source, ia3_sides, old_glora, version_of
from peftsurgery.codec.refusals import BAKED, Refused, way_out
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.layouts import Dialect, Layout

MAPS = tuple(NEEDED)
PEFT_TERMS = 5  # of the Neumann series where no config says otherwise; OneTrainer's too
Tensors = Mapping[str, torch.Tensor]


# reading ------------------------------------------------------------------------------------------


def read(algorithm: str, tensors: Tensors, source: Source) -> tuple[str, dict[str, object]]:
    """(algorithm, its fields and options) of a record; the shared arguments are not touched.

    Raises UnsupportedError or UsageError naming the key when the file does not say enough.
    """
    if source.conv1d and algorithm not in ("ia3", *peft_only.KINDS, *projections.KINDS):
        raise UnsupportedError(
            f"{source.key!r}: {algorithm.upper()} on a transformers Conv1D (fan_in_fan_out): PEFT "
            "turns such a layer differently when it runs and when it merges; this version does "
            "not handle it."
        )
    if algorithm in peft_only.KINDS:
        return algorithm, peft_only.read(algorithm, tensors, source)
    if algorithm in projections.KINDS:
        return projections.read(algorithm, tensors, source)
    if algorithm == "oft":
        return _read_oft(tensors, source)
    if algorithm == "boft":
        return "boft", {n: tensors[n] for n in ("blocks", "rescale")}
    if algorithm == "hra":
        return "hra", {"u": tensors["u"], "orthogonal": _flag(source, "apply_GS", False)}
    if algorithm == "ia3":
        return "ia3", _read_ia3(tensors, source)
    found: dict[str, object] = {n: tensors[n] for n in ("a1", "a2", "b1", "b2")}
    if old_glora({}, lambda n: tuple(tensors[n].shape)):
        found = {"a1": found["a2"], "a2": found["a1"], "b1": found["b2"], "b2": found["b1"]}
        if "bm" in tensors:
            raise UnsupportedError(
                f"{source.key!r}: a Tucker core beside first-generation GLoRA factors is not "
                "something any tool writes."
            )
    return "glora", {**found, "bm": tensors.get("bm")}


def _read_oft(tensors: Tensors, source: Source) -> tuple[str, dict[str, object]]:
    if "blocks" in tensors:
        blocks = tensors["blocks"]
        kind = {3: "oft", 4: "boft"}.get(blocks.ndim)
        if kind is None:
            raise UsageError(
                f"{source.key!r}: oft_blocks has shape {list(blocks.shape)}; expected [n, b, b] "
                "(OFT) or [m, n, b, b] (BOFT)."
            )
        rows = math.prod(blocks.shape[-3:-1])
        constraint = source.alpha * rows if source.alpha and source.alpha > 0 else None
        found: dict[str, object] = {
            "blocks": blocks,
            "rescale": tensors.get("rescale"),
            "constraint": constraint,
        }
        if kind == "boft":
            return kind, {**found, "form": "lycoris"}
        return kind, {**found, "acts_on": "out", "inverse": True}
    embedding = "embedding_vector" in tensors
    vector = tensors["embedding_vector" if embedding else "vector"]
    exact = not _flag(source, "use_cayley_neumann", True)
    terms = _number(source, "num_cayley_neumann_terms", PEFT_TERMS)
    b = (1 + math.isqrt(1 + 8 * vector.shape[-1])) // 2
    found = {
        "vector": vector,
        "series": 0 if exact else int(terms),
        "half_last": source.config is None or version_of(source.config) >= (0, 18),
        "inverse": exact != embedding,
        "limit": _number(source, "eps", 6e-5) if _flag(source, "coft", False) else None,
        "shared": _flag(source, "block_share", False),
        "spread": 2 * math.sqrt(b - 1) if "scaled" in tensors else 1.0,
    }
    if embedding:
        found["stored"] = "embedding"
    return "oft", found


def _read_ia3(tensors: Tensors, source: Source) -> dict[str, object]:
    vector = tensors["vector"]
    if "on_input" in tensors:
        inputs = bool(tensors["on_input"].reshape(-1)[0] != 0)
        return {"vector": vector, "acts_on": "in" if inputs else "out", "centred": True}
    sides = ia3_sides(tuple(vector.shape))
    if len(sides) > 1:
        if source.config is None:
            raise UsageError(
                f"{source.key!r}: ia3_l of shape {list(vector.shape)} can scale inputs or outputs; "
                "feedforward_modules in adapter_config.json tells which. Give the folder that "
                "holds it."
            )
        inputs = _feedforward(source.config, source.name)
    else:
        inputs = sides == ("in",)
    found: dict[str, object] = {"vector": vector, "on_bias": not inputs}
    found["acts_on"] = "in" if inputs != source.conv1d else "out"
    if source.conv1d:
        found["stored"] = "conv1d"
    return found


def _feedforward(config: Mapping[str, object], name: str) -> bool:
    """PEFT's own rule (tuners/ia3/model.py): a whole match, or the end of the name."""
    wanted = config.get("feedforward_modules")
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return isinstance(wanted, list) and any(name.endswith(str(w)) for w in wanted)


def _flag(source: Source, name: str, default: bool) -> bool:
    return bool((source.config or {}).get(name, default))


def _number(source: Source, name: str, default: float) -> float:
    value = (source.config or {}).get(name, default)
    if not isinstance(value, int | float):
        raise UsageError(f"adapter_config.json: {name} is {value!r}; expected a number.")
    return value


# writing ------------------------------------------------------------------------------------------


def write(layout: Layout, dialect: Dialect, module: WeightAdapter) -> dict[str, torch.Tensor]:
    """Suffix -> tensor of one of these algorithms, magnitude and bias apart; Refused where the
    dialect's own reader would make another map of them.
    """
    fields = dialect.algorithms.get(module.algorithm)
    if fields is None:
        held = ", ".join(a for a in dialect.algorithms if a != "norm")
        reason = f"{layout.title} has no keys for {module.algorithm}; it holds {held}"
        raise Refused(reason, way_out([module]))
    if module.algorithm in peft_only.KINDS:
        return peft_only.write(fields, module)
    if module.algorithm in projections.KINDS:
        return projections.write(fields, module)
    if isinstance(module, GLoRA):
        return {fields[n]: t for n, t in module.tensors().items() if n in fields}
    if isinstance(module, OFT):
        return _write_oft(layout, fields, module)
    if isinstance(module, BOFT):
        return _write_boft(layout, fields, module)
    if isinstance(module, IA3):
        return _write_ia3(layout, fields, module)
    return {fields[n]: t for n, t in module.tensors().items() if n in fields}


def _wrong_side(layout: Layout, module: WeightMap) -> Refused:
    side, other = ("inputs", "outputs") if module.acts_on == "in" else ("outputs", "inputs")
    return Refused(
        f"this {module.algorithm.upper()} rotates {side}, and {layout.title} holds only rotations "
        f"of {other}",
        BAKED,
    )


def _write_oft(layout: Layout, fields: dict[str, str], module: OFT) -> dict[str, torch.Tensor]:
    if "blocks" in fields:
        if module.acts_on == "in":
            raise _wrong_side(layout, module)
        plain = module.series == 0 and module.inverse and module.limit is None
        if module.blocks is None or module.shared or module.spread != 1 or not plain:
            raise Refused(
                f"{layout.title} holds only the exact Cayley form on unshared blocks", BAKED
            )
        return _blocks(layout, fields, module)
    if module.acts_on == "out":
        raise _wrong_side(layout, module)
    if module.vector is None or module.constraint is not None:
        raise Refused(f"{layout.title} holds no constraint over all blocks", BAKED)
    embedding = module.stored == "embedding"
    if "scaled" not in fields:  # PEFT
        if module.spread != 1:
            raise Refused(f"{layout.title} has no scaled OFT", BAKED)
        if (module.series == 0) != (module.inverse != embedding):
            raise Refused(f"{layout.title} turns the other way round", BAKED)
        return {fields["embedding_vector" if embedding else "vector"]: module.vector}
    spread = 2 * math.sqrt(module.block_size - 1)
    series = (module.series, module.half_last, module.inverse) == (PEFT_TERMS, True, False)
    if embedding or not series or module.shared or module.limit is not None:
        raise Refused(
            f"{layout.title} holds only unshared, unprojected blocks of the Neumann series with "
            f"{PEFT_TERMS} terms, on linear layers and convolutions",
            BAKED,
        )
    found: dict[str, torch.Tensor] = {fields["vector"]: module.vector}
    if math.isclose(module.spread, spread):
        found[fields["scaled"]] = torch.tensor(1)
    elif module.spread != 1:
        raise Refused(f"{layout.title} has no factor {module.spread:g} of the angles", BAKED)
    return found


def _write_boft(layout: Layout, fields: dict[str, str], module: BOFT) -> dict[str, torch.Tensor]:
    if fields["blocks"] == "oft_blocks":
        if module.form == "peft":
            raise _wrong_side(layout, module)
        return _blocks(layout, fields, module)
    if module.form == "lycoris":
        raise _wrong_side(layout, module)
    rescale = module.rescale
    if rescale is None:
        if not module.shape[0]:
            raise Refused(
                f"{layout.title} wants a factor per output (boft_s), and their number is not known",
                BAKED,
            )
        rescale = torch.ones(module.shape[0], 1)
    return {fields["blocks"]: module.blocks, fields["rescale"]: rescale}


def _blocks(layout: Layout, fields: dict[str, str], module: OFT | BOFT) -> dict[str, torch.Tensor]:
    """Blocks on outputs; alpha is the constraint per output, 0 for none."""
    blocks, rescale = module.blocks, module.rescale
    assert blocks is not None
    if layout.container == "comfy" and (rescale is not None or module.constraint is not None):
        raise Refused(f"{layout.title} ignores rescale and takes alpha for the norm itself", BAKED)
    alpha = 0.0 if module.constraint is None else module.constraint / module.shape[0]
    found: dict[str, torch.Tensor] = {fields["blocks"]: blocks}
    found["alpha"] = torch.tensor(alpha, dtype=torch.float32)
    if rescale is not None:
        found[fields["rescale"]] = rescale
    return found


def _write_ia3(layout: Layout, fields: dict[str, str], module: IA3) -> dict[str, torch.Tensor]:
    lycoris = "on_input" in fields
    logical_out = (module.acts_on == "out") != (module.stored == "conv1d")
    if logical_out and module.on_bias == lycoris:
        does, holds = (
            ("scales the bias of its layer too", "never does")
            if module.on_bias
            else ("leaves the bias of its layer alone", "always scales it")
        )
        raise Refused(f"this IA3 {does}, and {layout.title} {holds}", BAKED)
    vector = module.vector
    if lycoris and module.stored == "conv1d":
        raise Refused(f"{layout.title} has no transposed layers", BAKED)
    if module.centred != lycoris:
        vector = _shifted(vector, -1.0 if lycoris else 1.0)
    if lycoris:
        if vector.ndim == 2:
            vector = vector.reshape(-1)
        return {
            fields["vector"]: vector,
            fields["on_input"]: torch.tensor(int(module.acts_on == "in")),
        }
    if vector.ndim < 3:
        vector = vector.reshape((-1, 1) if logical_out else (1, -1))
    return {fields["vector"]: vector}


def _shifted(vector: torch.Tensor, step: float) -> torch.Tensor:
    """vector + step in the narrowest of its dtype, fp32 and fp64 that holds it exactly."""
    exact = vector.detach().double() + step
    for dtype in (vector.dtype, torch.float32):
        if torch.equal((rounded := exact.to(dtype)).double(), exact):
            return rounded
    return exact
