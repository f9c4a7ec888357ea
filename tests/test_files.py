"""Atomic writes, cut off at every place where they can be."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpc_dist import files


def fill(path: Path, content: str) -> None:
    with files.new_folder(path) as folder:
        (folder / "file").write_text(content)


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for content in ("old", "new"):
        fill(tmp_path / "folder", content)
        assert (tmp_path / "folder" / "file").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_error_while_filling_leaves_the_old_folder(tmp_path: Path) -> None:
    fill(tmp_path / "folder", "old")
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "folder") as folder:
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
    files.recover_folder(path)
    assert (path / "file").read_text() == "old"


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(path, {"a": float("nan")})
    assert files.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]
