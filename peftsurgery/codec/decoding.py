"""decode: Checkpoint -> Adapter. Every tensor is mapped, carried, or refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import ALGORITHMS, WeightAdapter
from peftsurgery.checkpoint import Checkpoint
from peftsurgery.codec.conventions import Conventions
from peftsurgery.codec.detect import Explanation
from peftsurgery.codec.explaining import explain_checkpoint
from peftsurgery.codec.keys import BASE_COPY, Record, is_unknown, rank_and_shape
from peftsurgery.codec.labelling import label
from peftsurgery.codec.maps import MAPS, read
from peftsurgery.codec.placing import place
from peftsurgery.codec.resolving import Placement
from peftsurgery.errors import Finding, UsageError

SHARED = {
    *("alpha", "magnitude", "magnitude_out", "bias", "bias_scaled", "bias_value", "padded_shape"),
}


def decode(
    checkpoint: Checkpoint,
    *,
    architecture: str | None = None,
    known: Mapping[str, Iterable[str]] | None = None,
    keep_unknown: bool = False,
) -> Adapter:
    """The canonical adapter of a file.

    architecture: name of the family, when it is not to be detected. known: module names of the
    base, component -> dotted home names, which lets flattened names of any model be read.
    keep_unknown: what nothing explains is among the extras, instead of an error.

    Factors are views of the file's memory map: nothing is copied until something changes.
    """
    explanation = explain_checkpoint(
        checkpoint, architecture=architecture, known=known, keep_unknown=keep_unknown
    )
    return Decoder(checkpoint, explanation).run()


class Decoder:
    """One decoding: builds the modules of `explanation` from the tensors of `checkpoint`."""

    def __init__(self, checkpoint: Checkpoint, explanation: Explanation) -> None:
        self.checkpoint = checkpoint
        self.explanation = explanation
        self.source = checkpoint.source
        self.conventions = Conventions(checkpoint, explanation)
        self.findings = self.conventions.findings
        self.tensors: dict[str, torch.Tensor] = {}

    def run(self) -> Adapter:
        """Decode every record; see `decode`."""
        parsed = self.explanation.parsed
        modules: dict[str, WeightAdapter] = {}
        origin: dict[str, str] = {}
        parameters: dict[str, str] = {}
        ndims: dict[str, int] = {}
        for module, record in parsed.records.items():
            placement = self.explanation.placements[module]
            placed = place(placement.site, self._build(record, placement), self.source)
            for path, adapter in placed.items():
                full = f"{placement.component}:{path}"
                if full in modules:
                    raise UsageError(
                        f"{self.source}: {origin[full]!r} and {module!r} both name the module "
                        f"{full!r}; "
                        "expected each once. Remove one of the two sets of keys."
                    )
                modules[full], origin[full] = adapter, module
                if record.parameter != "weight" and placement.site.parts == (path,):
                    parameters[full] = record.parameter
                ndim = (
                    len(self.checkpoint[record.keys["magnitude"]].shape)
                    if "magnitude" in record.keys
                    else 0
                )
                if ndim > 2:
                    ndims[full] = ndim
        for key in parsed.carried:
            if key.endswith(BASE_COPY):
                self.conventions.once(
                    "warning",
                    "base-copy",
                    "the base's own weight lies beside its adapter (PEFT saves it for embeddings) "
                    "and is carried as it is",
                    key,
                    "merging takes the weight of the base instead; they differ when the vocabulary "
                    "was resized",
                )
        if unknown := [key for key in parsed.carried if is_unknown(key)]:
            self.findings.append(
                Finding(
                    "warning",
                    "kept-unknown",
                    f"{len(unknown)} keys that nothing explains are carried as they are",
                    unknown[0],
                    "what they mean is not checked, and other programs may refuse them",
                )
            )
        layout, deviations = label(
            self.explanation, any("alpha" in r.keys for r in parsed.records.values())
        )
        if deviations:
            self.findings.append(
                Finding(
                    "info", "layout-deviates", f"not pure {layout.name}: {'; '.join(deviations)}"
                )
            )
        return Adapter(
            modules,
            self.explanation.architecture.name,
            layout.name,
            {key: self._tensor(key) for key in parsed.carried},
            dict(self.checkpoint.metadata),
            dict(self.checkpoint.config or {}),
            parameters,
            self.findings,
            ndims,
        )

    # one record -----------------------------------------------------------------------------------

    def _tensor(self, key: str) -> torch.Tensor:
        if key not in self.tensors:
            self.tensors[key] = self.checkpoint[key].torch()
        return self.tensors[key]

    def _build(self, record: Record, placement: Placement) -> WeightAdapter:
        rank, (out, into) = rank_and_shape(record, self.checkpoint)
        scale = self.conventions.scale(record, placement, rank)
        tensors = {n: self._tensor(key) for n, key in record.keys.items() if n != "alpha"}
        shared: dict[str, object] = {"scale": scale}
        self._shared(record, placement, tensors, shared, scale, (out, into))
        algorithm = record.algorithm or "full"
        if algorithm in MAPS:
            own_source = self.conventions.map_source(record, placement)
            algorithm, found = read(algorithm, tensors, own_source)
            return self._made(record, ALGORITHMS[algorithm], {**shared, **found})
        kind = ALGORITHMS[algorithm]
        if "embedding_A" in tensors:
            tensors["up"] = tensors.pop("embedding_A").T
            tensors["down"] = tensors.pop("embedding_B").T
            shared["stored"] = "embedding"
        own = {name: tensors[name] for name in kind.fields if name in tensors}
        if (
            self.conventions.transposed(placement)
            and algorithm == "lora"
            and "stored" not in shared
        ):
            own["up"], own["down"] = own["down"].T, own["up"].T
            shared["stored"] = "conv1d"
        if shared.get("stored") in ("embedding", "conv1d") and "magnitude" in shared:
            shared["magnitude_axis"] = "in"
        left = set(tensors) - set(own) - SHARED
        if left:
            name = sorted(left)[0]
            raise UsageError(
                f"{record.keys[name]!r}: {algorithm} has no tensor {name!r}; expected "
                f"{', '.join(kind.fields)}."
            )
        return self._made(record, kind, {**own, **shared})

    def _made(
        self, record: Record, kind: type[WeightAdapter], arguments: dict[str, object]
    ) -> WeightAdapter:
        try:
            return kind(**arguments)  # pyright: ignore[reportArgumentType, reportCallIssue]
        except UsageError as error:
            raise UsageError(f"{self.source}: {record.module!r}: {error}") from error

    def _shared(
        self,
        record: Record,
        placement: Placement,
        tensors: dict[str, torch.Tensor],
        shared: dict[str, object],
        scale: float,
        shape: tuple[int, int],
    ) -> None:
        out, into = shape
        if "magnitude" in tensors:
            value = tensors["magnitude"]
            shared["magnitude"] = value.reshape(-1)
            shared["magnitude_axis"] = _axis(record, value, out, into)
        elif "magnitude_out" in tensors:
            shared["magnitude"] = tensors["magnitude_out"].reshape(-1)
            shared["magnitude_axis"] = "out"
        if "bias_scaled" in tensors:
            bias = tensors["bias_scaled"]
            change = bias if scale == 1.0 else bias.float() * scale
            if (
                "bias_value" in tensors
            ):  # PEFT's bias="all" with lora_bias: a new value and a change of it
                change = tensors["bias_value"].float() + change.float()
                shared["bias_is_value"] = True
            shared["bias"] = change.to(bias.dtype)
        elif "bias" in tensors:
            shared["bias"] = tensors["bias"]
        elif "bias_value" in tensors:
            shared["bias"], shared["bias_is_value"] = tensors["bias_value"], True
        if "padded_shape" in tensors:
            shared["padded_shape"] = tuple(int(n) for n in tensors["padded_shape"].tolist())
        elif widened(self.explanation, placement, into):
            shared["padded_shape"] = (out, into)


def widened(explanation: Explanation, placement: Placement, into: int) -> bool:
    """Whether the adapter asks for more inputs than the base has, where the family allows it.

    FLUX control LoRAs widen img_in without saying so: the base weight is zero-padded.
    """
    architecture = explanation.architecture
    if not any(pin.widens for pin in architecture.pins):
        return False
    pin = architecture.pin(placement.component, placement.site.parts[0])
    return pin is not None and pin.widens and pin.in_ is not None and into > pin.in_


def _axis(record: Record, value: torch.Tensor, out: int, into: int) -> str:
    """The DoRA axis of a stored magnitude: `[out, 1, …]`, `[1, in, …]` or flat `[out]`."""
    shape = tuple(value.shape)
    if value.numel() == out and (len(shape) < 2 or shape[0] == out):
        return "out"
    if len(shape) >= 2 and shape[0] == 1 and shape[1] == value.numel():
        return "in"
    raise UsageError(
        f"{record.keys['magnitude']!r}: the DoRA magnitude has shape {list(shape)}; expected "
        f"[{out}, 1, …] for a norm "
        f"per output or [1, {into}, …] for a norm per input."
    )
