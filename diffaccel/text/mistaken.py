"""Detection of files of the wrong kind by their first bytes."""

from pathlib import Path

_UNPACK = "{}: unpack it first"
_SIGNS = {
    b"version https://git-lfs": "a git-lfs pointer, not the file itself: run `git lfs pull` in its repository",
    b"\x1f\x8b": _UNPACK.format("a gzip archive"),
    b"BZh": _UNPACK.format("a bzip2 archive"),
    b"\xfd7zXZ": _UNPACK.format("an xz archive"),
    b"\x28\xb5\x2f\xfd": _UNPACK.format("a zstd archive"),
    b"7z\xbc\xaf\x27\x1c": _UNPACK.format("a 7z archive"),
    b"Rar!": _UNPACK.format("a rar archive"),
    b"\x89HDF": "an HDF5 file, which is not supported",
    b"\x93NUMPY": "a single NumPy array",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"%PDF": "a PDF",
}
_HEAD = 1024
_AGAIN = "{}, such as a failed download leaves: get the file again"


def what_it_is(path: Path) -> str | None:
    """Describe a file that can't be a binary file of weights or statistics, with a remedy; None for other files.

    Raises:
        OSError: The file can't be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return _AGAIN.format("empty")
    for sign, meaning in _SIGNS.items():
        if head.startswith(sign):
            return meaning
    if head[257:262] == b"ustar":
        return _UNPACK.format("a tar archive")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")):
        return _AGAIN.format("a web page")
    if len(head) > 8 and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return _AGAIN.format("text")
    return None
