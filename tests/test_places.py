"""Which files of a folder or an archive are images, and that the others are counted aloud."""

import os
import pickle
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from stored import RGB, SIDE, N, data, save_folder, whole

from diffaccel.data import places
from diffaccel.data.places import FolderFiles, ZipFiles
from diffaccel.errors import UsageError


def save(path: Path, i: int = 0, format: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RGB[i]).save(path, format)
    return path


def archive_of(path: Path, members: dict[str, Path | bytes]) -> ZipFiles:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content if isinstance(content, bytes) else content.read_bytes())
    return ZipFiles(str(path))


def test_suffixes_that_people_have(tmp_path: Path) -> None:
    for name, format in (
        ("a.PNG", None),
        ("b.jfif", "JPEG"),
        ("c.jpe", "JPEG"),
        ("d.JPEG", None),
        ("e.png", "JPEG"),
        ("no_suffix", "PNG"),
        ("f.webp", None),
    ):
        save(tmp_path / name, format=format)
    (tmp_path / "README").write_text("Python reads this")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "g.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / ".DS_Store").write_bytes(b"hidden")
    save(tmp_path / ".ipynb_checkpoints" / "a.png")
    files = FolderFiles(str(tmp_path))
    assert files.names == ["a.PNG", "b.jfif", "c.jpe", "d.JPEG", "e.png", "f.webp", "no_suffix"]
    (note,) = files.notes
    assert note == "7 files used, 5 skipped: 1 .heic, 1 .txt, 2 hidden, 1 without a suffix and no images"


def test_a_format_without_a_decoder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "b.avif").write_bytes(b"a Pillow without a decoder can't read it")
    monkeypatch.setattr("diffaccel.data.decode.formats", lambda: ("PNG",))
    assert FolderFiles(str(tmp_path)).notes == ["1 files used, 1 skipped: 1 .avif"]


def test_nothing_that_hangs_or_multiplies(tmp_path: Path) -> None:
    """Pipes, devices, sockets, dead links, and links to folders that lead back; links to files elsewhere are fine."""
    root, elsewhere = tmp_path / "root", save(tmp_path / "elsewhere" / "far.png", 2)
    save(root / "a.png")
    save(root / "zz" / "real.png", 1)
    os.mkfifo(root / "pipe.png")
    os.mkfifo(root / "pipe")
    (root / "zero.png").symlink_to("/dev/zero")
    (root / "dead.png").symlink_to("nowhere")
    (root / "itself.png").symlink_to("itself.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "s.png"))
    for name, target in (("here", "."), ("up", ".."), ("top", "/"), ("aa", "zz"), ("zz/back", "..")):
        (root / name).symlink_to(target)
    (root / "one.png").symlink_to(elsewhere)
    (root / "out").symlink_to(elsewhere.parent)
    files = FolderFiles(str(root))
    assert files.names == ["a.png", "one.png", "out/far.png", "zz/real.png"]
    assert files.skipped == {places.NO_FILE: 6, places.READ_TWICE: 5}


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def refuse(path: str) -> object:
        if path.rstrip("/").endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match="closed/ can't be read .Permission denied"):
        FolderFiles(str(tmp_path))


def test_names_in_archives(tmp_path: Path) -> None:
    """Windows' backslashes, leading ./ and /, doubled names (the last counts, as for unzip), folders and links."""
    first, last = save(tmp_path / "first.png", 0), save(tmp_path / "last.png", 1)
    path = tmp_path / "a.zip"
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "w") as archive:
        for name, file in (
            ("x\\0.png", first),
            ("./b.png", first),
            ("/c.png", first),
            ("d.png", first),
            ("d.png", last),
            ("../e.png", first),
            ("__MACOSX/._b.png", first),
        ):
            archive.write(file, name)
        archive.writestr("x\\", b"")
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "b.png")
    files = ZipFiles(str(path))
    assert files.names == ["b.png", "c.png", "d.png", "x/0.png"]
    with files.open("d.png") as stream:
        assert np.array_equal(np.asarray(Image.open(stream)), RGB[1])
    assert files.skipped == {places.OLDER: 1, places.OUTSIDE: 1, places.HIDDEN: 1, places.NO_FILE: 1}


def test_a_member_is_not_unpacked_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "MAX_BYTES", 2000)
    save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "b.png").write_bytes(bytes(2001))
    members: dict[str, Path | bytes] = {file.name: file for file in (tmp_path / "images").iterdir()}
    archive_of(tmp_path / "a.zip", members)
    for source, path in (("zip", "a.zip"), ("folder", "images")):
        with pytest.raises(UsageError, match="1 of 2 images .*b.png .2001 bytes, the limit is 2000"):
            data(source, path=str(tmp_path / path)).setup("fit")


def test_a_tar_and_a_wrong_source_are_named(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "folder")
    (tmp_path / "a.tar.gz").write_bytes(b"anything")
    file = save(tmp_path / "a.png")
    for source, path, words in (
        ("zip", tmp_path / "a.tar.gz", "is a tar archive, not zip: unpack it and use the source folder"),
        ("zip", folder, "it is a folder: use the source folder"),
        ("folder", file, "it is a file: use the source zip or npz"),
    ):
        with pytest.raises(UsageError, match=words):
            data(source, path=str(path)).setup("fit")


def test_an_archive_travels_without_its_handle(tmp_path: Path) -> None:
    files = archive_of(tmp_path / "a.zip", {"a.png": save(tmp_path / "a.png")})
    again = pickle.loads(pickle.dumps(files))
    assert again.names == files.names
    assert again.open("a.png").read() == (tmp_path / "a.png").read_bytes()


def test_colour_is_that_of_the_whole_split(tmp_path: Path) -> None:
    """The first images are grey, by mode or palette; the limit does not make grey what is colour without it."""
    for i in range(4):
        Image.fromarray(RGB[i, ..., 0].copy()).convert("P" if i % 2 else "L").save(tmp_path / f"a{i}.png")
    save(tmp_path / "b.png", 4)
    (tmp_path / "c.png").write_bytes(b"not looked at")
    images, _ = whole(data("folder", path=str(tmp_path), module={"limit": 4}))
    assert images.shape == (4, 3, SIDE, SIDE)
    assert torch.equal(images[:, 0], images[:, 2])
    (tmp_path / "b.png").unlink()
    assert data("folder", path=str(tmp_path), module={"limit": 4}).shape == (1, SIDE, SIDE)


def test_notes_are_printed_once_by_one_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_folder(tmp_path / "name[red]")
    alpha = np.dstack([RGB[0], np.zeros((SIDE, SIDE), np.uint8)])
    Image.fromarray(alpha).save(tmp_path / "name[red]" / "class0" / "0000.png")
    Image.fromarray(RGB[1, ..., 0].copy()).save(tmp_path / "name[red]" / "class0" / "0001.png")
    (tmp_path / "name[red]" / "a.\x1b[31mtxt").write_text("")
    module = data("folder", path=folder)
    module.setup("fit")
    module.images("train")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        f"name[red] (train): {N} files used, 1 skipped: 1 .\\x1b[31mtxt",
        f"name[red] (train): 1 of {N} images with transparency, composited over white",
        f"name[red] (train): 1 of {N} images grey among colour images, read as RGB",
    ]
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    data("folder", path=folder).setup("fit")
    assert capsys.readouterr().err == ""


def test_nothing_is_said_of_ordinary_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data("folder", path=save_folder(tmp_path / "images")).setup("fit")
    assert capsys.readouterr().err == ""
