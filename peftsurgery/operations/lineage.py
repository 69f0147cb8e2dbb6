"""Where a converted file comes from: the hashes of its inputs, and what its header says of it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

from peftsurgery import __version__
from peftsurgery.checkpoint import Checkpoint
from peftsurgery.codec import Encoded
from peftsurgery.codec.files import kohya_hashes
from peftsurgery.layouts import layout_named


def stamp(
    encoded: Encoded,
    to: str,
    operation: str,
    options: Mapping[str, str | None],
    inputs: Mapping[str, str],
) -> None:
    """Lineage (deterministic, no time) and the hashes a Kohya file carries.

    options: those given, in order; None is left out. inputs: path -> SHA-256.
    """
    metadata = encoded.metadata
    metadata["peftsurgery.operation"] = operation
    metadata["peftsurgery.version"] = __version__
    metadata["peftsurgery.options"] = " ".join(f"{k}={v}" for k, v in options.items() if v)
    metadata["peftsurgery.inputs"] = " ".join(
        f"{Path(name).name}=sha256:{digest}" for name, digest in sorted(inputs.items())
    )
    stale = [k for k in metadata if k.startswith("sshs_") or k == "modelspec.hash_sha256"]
    wants = bool(stale) or any(k.startswith("ss_") for k in metadata)
    for key in stale:
        del metadata[key]
    row = layout_named(to)
    if wants and row.container == "flat":
        hashes = kohya_hashes(encoded.tensors[""], metadata, encoded.release)
        metadata.update(hashes)
        if "modelspec.hash_sha256" in stale:
            metadata["modelspec.hash_sha256"] = "0x" + hashes["sshs_model_hash"]


class Hashing:
    """SHA-256 of the input files, on a second thread while the rest goes on."""

    def __init__(self, checkpoint: Checkpoint, *, enabled: bool) -> None:
        self._digests: dict[str, str] = {}
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if enabled:
            self._thread = threading.Thread(target=self._run, args=(checkpoint,), daemon=True)
            self._thread.start()

    def _run(self, checkpoint: Checkpoint) -> None:
        try:
            self._digests = checkpoint.sha256()
        except BaseException as error:
            self._error = error

    def result(self) -> dict[str, str]:
        """File name -> digest; waits for the thread."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._digests
