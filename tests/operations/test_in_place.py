"""merge --in-place: only touched bytes change, nothing is lost whenever it is killed, and the
way back is exact.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import peftsurgery as ps
from peftsurgery.checkpoint import open_checkpoint
from peftsurgery.errors import CheckFailed, UnsupportedError, UsageError
from peftsurgery.operations import apply
from peftsurgery.operations import in_place as in_place_module
from peftsurgery.operations.journal import SUFFIX, journal_path, pending
from peftsurgery.operations.merge_report import MergeReport
from tests.operations.small_llm import contents, write_adapter, write_folder

ROOT = Path(__file__).resolve().parents[2]
STRENGTH = 0.7  # as in killed.py


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, its adapter, and the same base after an uninterrupted merge."""
    folder = tmp_path_factory.mktemp("template")
    write_folder(folder / "base", 1)
    write_adapter(folder / "adapter", 2)
    return folder


@pytest.fixture(scope="module")
def finished(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "case"
    shutil.copytree(template, folder)
    report = merge(folder, undo=folder / "undo")
    assert report.ok
    return folder


def merge(case: Path, **options: object) -> MergeReport:
    return ps.merge(case / "base", [(case / "adapter", STRENGTH)], in_place=True, **options)  # type: ignore[arg-type]


# what it does -------------------------------------------------------------------------------------


def test_touched_bytes_equal_a_merge_to_a_file_and_the_rest_stays(
    template: Path, finished: Path, tmp_path: Path
) -> None:
    ps.merge(template / "base", [(template / "adapter", STRENGTH)], tmp_path / "out")
    expected, found = open_checkpoint(tmp_path / "out"), open_checkpoint(finished / "base")
    before = open_checkpoint(template / "base")
    changed = [name for name in before if bytes(before[name].read()) != bytes(found[name].read())]
    assert len(changed) == 12
    for name in expected:
        assert bytes(expected[name].read()) == bytes(found[name].read()), name
    files = contents(template / "base")
    assert files.keys() == contents(finished / "base").keys()
    for name, data in contents(finished / "base").items():
        assert len(data) == len(files[name])
        if not name.endswith(".safetensors"):
            assert data == files[name]


def test_without_undo_no_journal_stays(template: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(template, tmp_path / "case")
    report = merge(tmp_path / "case")
    assert contents(tmp_path / "case/base") == contents(finished / "base")
    assert any(finding.code == "in-place" for finding in report.findings)
    assert report.modules


def test_with_undo_the_same_command_again_changes_nothing(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "case")
    before = contents(tmp_path / "case")
    report = merge(tmp_path / "case", undo=tmp_path / "case/undo")
    assert "already complete" in str(report.summary["written"])
    assert contents(tmp_path / "case") == before


@pytest.mark.parametrize("tile", [1 << 20, 100])
def test_a_single_file_and_a_float32_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tile: int
) -> None:
    """With small tiles a tensor is overwritten in many pieces."""
    monkeypatch.setattr(apply, "TILE", tile)
    write_folder(tmp_path / "folder", 3, torch.float32, shard_size=None)
    write_adapter(tmp_path / "adapter", 4)
    base = tmp_path / "b.safetensors"
    shutil.copyfile(tmp_path / "folder/model.safetensors", base)
    original = base.read_bytes()
    adapters = [(tmp_path / "adapter", 1.3)]
    ps.merge(base, adapters, tmp_path / "out.safetensors")
    ps.merge(base, adapters, in_place=True, undo=tmp_path / "u.safetensors")
    expected, found = open_checkpoint(tmp_path / "out.safetensors"), open_checkpoint(base)
    assert all(bytes(expected[n].read()) == bytes(found[n].read()) for n in expected)
    ps.unmerge(base, tmp_path / "u.safetensors", in_place=True)
    assert base.read_bytes() == original
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["folder", "adapter", "b.safetensors", "out.safetensors", "u.safetensors"]
    )


# killed -------------------------------------------------------------------------------------------


def killed(call: str, template: Path, cases: Path, times: int = 0) -> list[Path]:
    """The folders of all cases of `killed.py`; the last call of the first column lived."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("killed.py")
    done = subprocess.run(
        [sys.executable, str(script), call, str(template), str(cases), str(times)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "lived 0" in done.stdout, done.stdout
    return [cases / line.split()[0] for line in done.stdout.splitlines()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("call", ["merge", "merge-undo"])
def test_killed_anywhere_it_resumes_and_rolls_back(
    call: str, template: Path, finished: Path, tmp_path: Path
) -> None:
    original, merged = contents(template / "base"), contents(finished / "base")
    cases = killed(call, template, tmp_path, times=6)
    assert len(cases) > 20 + 6
    halfway = 0
    for case in cases:
        undo = case / "undo" if call == "merge-undo" else None
        journal = pending(open_checkpoint(case / "base"))
        if journal is None:  # before the first byte was overwritten, or after the last check
            state = {n: d for n, d in contents(case / "base").items() if not n.endswith(".part")}
            assert state in (original, merged), case.name
            if undo is not None:
                merge(case, undo=undo)
                assert contents(case / "base") == merged, case.name
            continue
        halfway += contents(case / "base") not in (original, merged)
        again = case.with_name(f"{case.name}-again")
        shutil.copytree(case, again)
        report = merge(case, undo=undo)
        assert report.summary["in place"] == "resumed and finished"
        assert contents(case / "base") == merged, case.name
        assert journal_path(open_checkpoint(again / "base")) == again / "base" / journal.name
        ps.unmerge(again / "base", again / "base" / journal.name, in_place=True)
        assert contents(again / "base") == original, case.name
    assert halfway > 12


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("written", ["in place", "to a folder"])
def test_an_unmerge_killed_anywhere_goes_on(
    written: str, template: Path, finished: Path, tmp_path: Path
) -> None:
    """A merge to a folder has other headers, so its files are replaced instead of overwritten."""
    original = contents(template / "base")
    if written == "to a folder":
        finished = tmp_path / "finished"
        finished.mkdir()
        adapters = [(template / "adapter", STRENGTH)]
        ps.merge(template / "base", adapters, finished / "base", undo=finished / "undo")
        (finished / "base/config.json").write_text("{}")
    (tmp_path / "cases").mkdir()
    cases = killed("unmerge", finished, tmp_path / "cases", times=3)
    assert len(cases) > 15
    for case in cases:
        ps.unmerge(case / "base", case / "undo", in_place=True)
        assert contents(case / "base") == original, case.name


def test_the_journal_is_on_disk_before_the_first_byte_changes(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(template, tmp_path / "case")
    base = open_checkpoint(tmp_path / "case/base")
    journal = journal_path(base)
    calls: list[str] = []
    real = {name: getattr(os, name) for name in ("pwrite", "fsync", "unlink")}

    def noted(name: str) -> object:
        def call(first: object, *rest: object) -> object:
            if name == "fsync":
                calls.append("fsync " + Path(os.readlink(f"/proc/self/fd/{first}")).name)
            elif name == "pwrite":
                assert journal.is_file()
                calls.append("pwrite")
            elif Path(str(first)) == journal:
                calls.append("journal removed")
            return real[name](first, *rest)

        return call

    for name in real:
        monkeypatch.setattr(os, name, noted(name))
    merge(tmp_path / "case")
    first = calls.index("pwrite")
    assert any(call.startswith(f"fsync .{journal.name}") for call in calls[:first])
    assert "fsync base" in calls[:first]  # the folder, after the rename
    last = max(i for i, call in enumerate(calls) if call == "pwrite")
    removed = calls.index("journal removed")
    touched = {t.path.name for n, t in base.items() if "_proj" in n}
    synced = {call.removeprefix("fsync ") for call in calls[first:removed]}
    assert touched <= synced
    assert last < removed


# while a journal lies there -----------------------------------------------------------------------


@pytest.fixture
def interrupted(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A case killed halfway: as SIGKILL would leave it, neither finished nor rolled back."""
    case = tmp_path / "case"
    shutil.copytree(template, case)
    real, count = os.pwrite, [0]

    class Killed(BaseException):
        pass

    def dying(*args: object) -> object:
        count[0] += 1
        if count[0] > 3:
            raise Killed
        return real(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", dying)
        patch.setattr(in_place_module, "roll_back", dying)
        with pytest.raises(Killed):
            merge(case)
    assert pending(open_checkpoint(case / "base"))
    return case


def test_everything_else_is_refused_and_both_ways_out_are_named(
    interrupted: Path, tmp_path: Path
) -> None:
    base, adapter = interrupted / "base", interrupted / "adapter"
    before = contents(base)
    shard = sorted(base.glob("*.safetensors"))[1]
    for attempt in (
        lambda: ps.merge(base, [(adapter, STRENGTH)], tmp_path / "out"),
        lambda: ps.merge(base, [(adapter, 0.5)], in_place=True),
        lambda: ps.merge(base, [(adapter, STRENGTH)], in_place=True, relative_to="base"),
        lambda: ps.verify(base, base, [(adapter, STRENGTH)]),
        lambda: ps.convert(base, tmp_path / "o.safetensors", to="comfy"),
        lambda: ps.convert(shard, tmp_path / "o.safetensors", to="comfy"),
        lambda: ps.convert(adapter, tmp_path / "o", to="peft", base=base, architecture="llm"),
    ):
        with pytest.raises(UsageError, match="interrupted") as caught:
            attempt()
        assert "same command" in str(caught.value)
        assert "unmerge" in str(caught.value)
        assert SUFFIX in str(caught.value)
    assert contents(base) == before
    assert not (tmp_path / "out").exists()


def test_a_base_that_changed_meanwhile_is_not_touched(interrupted: Path) -> None:
    base = interrupted / "base"
    tensor = open_checkpoint(base)["model.norm.weight"]
    begin, _ = tensor.file_range() or (0, 0)
    with open(tensor.path, "r+b") as file:
        file.seek(begin)
        file.write(b"\x7f")
    before = contents(base)
    journal = pending(open_checkpoint(base))
    assert journal is not None
    for attempt in (lambda: merge(interrupted), lambda: ps.unmerge(base, journal, in_place=True)):
        with pytest.raises(CheckFailed, match=tensor.path.name):
            attempt()
    assert contents(base) == before


def test_rolled_back_to_another_folder_too(
    interrupted: Path, template: Path, tmp_path: Path
) -> None:
    journal = pending(open_checkpoint(interrupted / "base"))
    assert journal is not None
    ps.unmerge(interrupted / "base", journal, tmp_path / "back")
    original = contents(template / "base")
    for name, data in contents(tmp_path / "back").items():
        assert data == original[name]
    assert {n for n in original if n.endswith(".safetensors")} <= contents(tmp_path / "back").keys()


def test_two_processes_do_not_work_on_one_journal(interrupted: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    journal = pending(open_checkpoint(interrupted / "base"))
    assert journal is not None
    with open(journal, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another process"):
            merge(interrupted)
    assert journal.exists()


# errors and Ctrl-C --------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, CheckFailed])
def test_an_error_halfway_puts_the_originals_back(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    case = tmp_path / "case"
    shutil.copytree(template, case)

    def failing(done: int, total: int, label: str = "") -> None:
        if done > total // 2:
            raise error("now")

    with pytest.raises(error, match="now"):
        merge(case, progress=failing)
    assert contents(case) == contents(template)


def test_too_little_survival_puts_the_originals_back(tmp_path: Path) -> None:
    write_folder(tmp_path / "base", 5)
    write_adapter(tmp_path / "adapter", 6, size=1e-3)
    before = contents(tmp_path / "base")
    with pytest.raises(CheckFailed, match="survives"):
        ps.merge(tmp_path / "base", [(tmp_path / "adapter", 1)], in_place=True, min_survival=0.9)
    assert contents(tmp_path / "base") == before


def test_what_cannot_be_done_in_place_is_refused_by_name(template: Path, tmp_path: Path) -> None:
    case = tmp_path / "case"
    shutil.copytree(template, case)
    adapters = [(case / "adapter", STRENGTH)]
    with pytest.raises(UnsupportedError, match=r"--dtype to F32 changes the size"):
        ps.merge(case / "base", adapters, in_place=True, dtype="fp32")
    with pytest.raises(UsageError, match="one of the two"):
        ps.merge(case / "base", adapters, case / "out", in_place=True)
    with pytest.raises(UsageError, match="one of the two"):
        ps.merge(case / "base", adapters)
    shard = sorted((case / "base").glob("*.safetensors"))[0]
    os.link(shard, case / "second-name")
    with pytest.raises(UnsupportedError, match=shard.name):
        merge(case)
    (case / "second-name").unlink()
    shutil.move(shard, case / "base/real")
    shard.symlink_to("real")
    with pytest.raises(UnsupportedError, match="is a link"):
        merge(case)
