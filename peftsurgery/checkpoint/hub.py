"""Hub ids, `owner/repo[@rev][:file]` and `hf://owner/repo[@rev][/file]`, to a path in the Hugging
Face cache.

huggingface_hub is imported only when an id is fetched; it reads HF_HOME, HF_HUB_CACHE, HF_TOKEN,
HF_ENDPOINT and HF_HUB_OFFLINE from the environment. Only the files a Checkpoint needs are
downloaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from peftsurgery.checkpoint import folders, strict_json
from peftsurgery.checkpoint.header import Limits
from peftsurgery.checkpoint.pickles import is_pickle_name, refuse_pickle
from peftsurgery.errors import PeftSurgeryError, UsageError

SCHEME = "hf://"
_PART = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
_SHORT = re.compile(rf"(?P<repo>{_PART}/{_PART})(@(?P<revision>[^:@]+))?(:(?P<file>.+))?")
_URL = re.compile(
    rf"(?P<repo>{_PART}/{_PART})"
    r"(@(?P<revision>refs/(?:pr/\d+|convert/[^/]+)|[^/@]+))?(/(?P<file>.+))?"
)


@dataclass(frozen=True)
class HubId:
    repo: str  # owner/name
    revision: str = "main"
    file: str | None = None  # a file or sub-folder, with `/`


def parse(source: str) -> HubId | None:
    """The hub id in `source`, or None when it has another form.

    A bare `owner/name` that ends like a weights file is a mistyped path, not a repository. Raises
    UsageError for an `hf://` address that is malformed, and for a file or revision that leads
    outside the repository.
    """
    if source.startswith(SCHEME):
        found = _URL.fullmatch(source[len(SCHEME) :])
        if found is None:
            raise UsageError(f"{source}: expected hf://owner/repo[@revision][/file]")
    else:
        found = _SHORT.fullmatch(source)
        if found is None or found["repo"].endswith((*folders.SUFFIXES, ".json")):
            return None
        if is_pickle_name(found["repo"]):
            return None
    revision, file = unquote(found["revision"] or "main"), found["file"]
    for text in (revision, file or "x"):
        if (
            ".." in text.split("/")
            or text.startswith("/")
            or "\\" in text
            or not text.isprintable()
        ):
            raise UsageError(f"{source}: {text!r} does not stay inside the repository")
    return HubId(found["repo"], revision, file.rstrip("/") if file else None)


def fetch(
    hub_id: HubId, *, tried: list[str], limits: Limits, allow_pickle: bool = False
) -> Path | None:
    """A local path with what `hub_id` names: from the hub, else from the cache; None when neither
    has it.

    Each place that failed adds a line to `tried`. Refusals of the content (PeftSurgeryError) are
    raised.
    """
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError:
        tried.append("the hub: huggingface_hub is not installed (pip install huggingface_hub)")
        return None
    if constants.HF_HUB_OFFLINE:
        tried.append("the hub: not asked, HF_HUB_OFFLINE is set")
    else:
        try:
            return _Download(hub_id, huggingface_hub, limits, allow_pickle).run()
        except PeftSurgeryError:
            raise
        except (
            Exception
        ) as error:  # every failure of the network or the hub ends in the report of what was tried
            lines = str(error).strip().splitlines() or [""]
            tried.append(
                f"the hub ({constants.ENDPOINT}): {type(error).__name__}: {lines[0][:300]}"
            )
    return _cached(hub_id, Path(constants.HF_HUB_CACHE), tried)


class _Download:
    """The files of one hub id, into the cache."""

    def __init__(self, hub_id: HubId, library, limits: Limits, allow_pickle: bool) -> None:
        self.id = hub_id
        self.library = library
        self.limits = limits
        self.allow_pickle = allow_pickle

    def run(self) -> Path:
        info = self.library.HfApi().repo_info(self.id.repo, revision=self.id.revision)
        names = {sibling.rfilename for sibling in info.siblings or ()}
        if self.id.file in names:
            return self.weights(str(self.id.file))
        prefix = f"{self.id.file}/" if self.id.file else ""
        below = {name[len(prefix) :] for name in names if name.startswith(prefix)}
        where = f"{self.id.repo}@{self.id.revision}{':' if prefix else ''}{self.id.file or ''}"
        if prefix and not below:
            raise UsageError(f"{where}: no such file or folder in the repository")
        plan = folders.plan(
            below,
            where=where,
            read_json=lambda name: strict_json.read(
                self.file(prefix + name), limit=self.limits.json_bytes
            ),
        )
        for name in {plan.config, *(part.config for part in plan.parts)}:
            if name:
                self.file(prefix + name)
        path = Path()
        for part in plan.parts:
            path = self.weights(prefix + part.weights)
            for _ in PurePosixPath(part.weights).parts:
                path = path.parent
        return path

    def weights(self, name: str) -> Path:
        if not self.allow_pickle and (is_pickle_name(name) or name.endswith(".bin.index.json")):
            refuse_pickle(f"{self.id.repo}@{self.id.revision}:{name}")
        path = self.file(name)
        if folders.is_index(name):
            from peftsurgery.checkpoint.opening import shard_map

            folder = PurePosixPath(name).parent
            for shard in sorted(set(shard_map(path, limit=self.limits.json_bytes).values())):
                self.file(str(folder / shard))
        return path

    def file(self, name: str) -> Path:
        found = self.library.hf_hub_download(self.id.repo, name, revision=self.id.revision)
        return Path(found)


def _cached(hub_id: HubId, cache: Path, tried: list[str]) -> Path | None:
    """The snapshot in the cache: `<cache>/models--owner--name/snapshots/<commit>`, the commit
    through `refs/<rev>`.
    """
    repository = cache / f"models--{hub_id.repo.replace('/', '--')}"
    ref = repository / "refs" / hub_id.revision
    commit = ref.read_text().strip() if ref.is_file() else hub_id.revision
    snapshot = repository / "snapshots" / commit
    path = snapshot / hub_id.file if hub_id.file else snapshot
    if re.fullmatch(r"[\w.-]+", commit) and commit.strip(".") and path.exists():
        return path
    tried.append(f"the cache: no {path}")
    return None
