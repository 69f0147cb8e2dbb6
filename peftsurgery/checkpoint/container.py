"""Checkpoint: a read-only mapping of lazy tensors, whatever files they lie in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from peftsurgery.checkpoint.hashing import sha256_of
from peftsurgery.checkpoint.tensors import FileMap, LazyTensor


class Checkpoint(Mapping[str, LazyTensor]):
    """What `open_checkpoint` returns.

    kind: "file" | "sharded" | "transformers" | "pipeline" | "peft" | "pickle" | "gguf".
    A pipeline, and a folder of PEFT folders, names its tensors `component:tensor`; `components`
    holds one Checkpoint for each, with the names of its own files, and `configs` their configs.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, LazyTensor],
        *,
        source: str,
        kind: str,
        metadata: Mapping[str, str],
        files: tuple[Path, ...],
        config: dict[str, object] | None = None,
        components: Mapping[str, Checkpoint] | None = None,
    ) -> None:
        self.path = path  # the file, index or folder
        self.source = source  # as the caller gave it
        self.kind = kind
        self.metadata = dict(metadata)  # __metadata__ of the first file
        self.config = config  # adapter_config.json, config.json or model_index.json
        self.files = files
        self.components: Mapping[str, Checkpoint] = MappingProxyType(dict(components or {}))
        self._tensors = dict(tensors)

    @cached_property
    def _maps(self) -> tuple[FileMap, ...]:
        return tuple({id(t.file): t.file for t in self._tensors.values()}.values())

    def with_tensors(self, tensors: Mapping[str, LazyTensor]) -> Checkpoint:
        """The checkpoint with other tensors over the same files."""
        return Checkpoint(
            self.path,
            tensors,
            source=self.source,
            kind=self.kind,
            metadata=self.metadata,
            files=self.files,
            config=self.config,
            components=self.components,
        )

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __repr__(self) -> str:
        return f"Checkpoint({self.source!r}, {self.kind}, {len(self)} tensors)"

    @property
    def configs(self) -> dict[str, dict[str, object]]:
        """Component -> its config, for the components that have one."""
        return {
            name: part.config for name, part in self.components.items() if part.config is not None
        }

    @property
    def shard_of(self) -> Mapping[str, Path]:
        """Tensor -> the file it lies in."""
        return {name: tensor.path for name, tensor in self._tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def populate(self) -> None:
        """Map the files for reading them whole; see `FileMap.populate`."""
        for file in self._maps:
            file.populate()

    def release(self) -> None:
        """Give the memory of everything read so far back to the system; see `FileMap.release`."""
        for file in self._maps:
            file.release()

    def sha256(self) -> dict[str, str]:
        """File name (below the folder, with `/`) -> SHA-256 of the whole file, in hex."""
        root = self.path if self.path.is_dir() else self.path.parent
        return {file.relative_to(root).as_posix(): sha256_of(file) for file in self.files}
