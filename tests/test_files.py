"""Atomic writes, cut off at every place where they can be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpc_dist import files
from gpc_dist.errors import UserError


def fill(path: Path, content: str) -> None:
    with files.new_folder(path, ["file"]) as folder:
        (folder / "file").write_text(content)


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for content in ("old", "new"):
        fill(tmp_path / "folder", content)
        assert (tmp_path / "folder" / "file").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_error_while_filling_leaves_the_old_folder(tmp_path: Path) -> None:
    fill(tmp_path / "folder", "old")
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "folder", ["file"]) as folder:
        (folder / "file").write_text("half")
        raise RuntimeError
    assert (tmp_path / "folder" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_kill_between_the_renames_is_recovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder"
    fill(path, "old")
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if target == path:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        fill(path, "new")
    monkeypatch.undo()
    assert not path.exists()
    files.recover_folder(path, ["file"])
    assert (path / "file").read_text() == "old"


def test_what_a_cut_off_write_left_stands_in_nobodys_way(tmp_path: Path) -> None:
    """A write killed before its rename leaves a temporary file, and nobody else removes it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    left, mine = folder / f".a.{'0123456789abcdef' * 2}", folder / ".a.notes"
    left.touch()
    with files.new_folder(folder, ["a"]) as new:
        (new / "a").touch()
    assert [path.name for path in folder.iterdir()] == ["a"]
    left.touch()
    mine.touch()
    files.remove_folder(folder, ["a"])
    assert list(folder.iterdir()) == [mine]


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(path, {"a": float("nan")})
    assert files.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_what_somebody_else_wrote_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    fill(path, "old")
    for name in ("thesis.tex", "data.csv", "notes.txt", "plot.png"):
        (path / name).write_text("mine")
    with pytest.raises(
        UserError, match=r"holds data\.csv, notes\.txt, plot\.png and 1 more, which gpc-dist did"
    ):
        fill(path, "new")
    assert (path / "file").read_text() == "old"
    assert (path / "thesis.tex").read_text() == "mine"
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(UserError, match="is a file, and a folder is to be written there"):
        fill(path / "file", "new")


def test_the_folder_that_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    elsewhere = tmp_path / "scratch" / "folder"
    fill(elsewhere, "old")
    (tmp_path / "link").symlink_to(elsewhere)
    fill(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (elsewhere / "file").read_text() == "new"


@pytest.mark.parametrize(("mask", "folder_mode", "file_mode"), [(0o002, 0o775, 0o664), (0o077, 0o700, 0o600)])
def test_others_may_read_and_write_what_the_umask_allows(
    tmp_path: Path, mask: int, folder_mode: int, file_mode: int
) -> None:
    path = tmp_path / "folder"
    before = os.umask(mask)
    try:
        with files.new_folder(path, ["file"]) as folder:
            (folder / "file").touch(mode=0o600)  # as some libraries do
        files.write_text(tmp_path / "text", "")
    finally:
        os.umask(before)
    modes = [each.stat().st_mode & 0o777 for each in (path, path / "file", tmp_path / "text")]
    assert modes == [folder_mode, file_mode, file_mode]


def test_what_cannot_be_removed_stays_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on NFS, where a file that another machine has open becomes a hidden one when it is removed."""
    path = tmp_path / "folder"
    fill(path, "old")
    unlink = Path.unlink

    def hidden(self: Path, missing_ok: bool = False) -> None:
        if self.name == "file":
            self.rename(self.with_name(".nfs0001"))
        else:
            unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", hidden)
    fill(path, "new")
    assert (path / "file").read_text() == "new"
    assert "could not be removed, and is left there: Directory not empty" in caplog.text
    monkeypatch.undo()
    # the next writer tries again, and what NFS hides does not count as somebody's file
    for old in tmp_path.glob(".folder.*/.nfs0001"):
        old.rename(path / ".nfs0001")
    fill(path, "newest")
    assert (path / "file").read_text() == "newest"


def test_an_own_file_that_nobody_can_have_written_is_refused(tmp_path: Path) -> None:
    large, pipe = tmp_path / "status.json", tmp_path / "facts.json"
    with large.open("wb") as file:
        file.truncate(files.LARGE_BYTES + 1)  # without taking that much of the disk
    os.mkfifo(pipe)
    for path, said in (
        (large, "is larger than 256 MiB: restore or remove it"),
        (pipe, "it is no file: restore or remove it"),
        (tmp_path, "it is a directory: restore or remove it"),
    ):
        with pytest.raises(UserError, match=said):
            files.read_json(path)
