"""Check that a tag is the package's version, or print the notes of a release from CHANGELOG.md.

python .ci/version.py v0.2.0          # exit status 1 if the version is another
python .ci/version.py v0.2.0 --notes  # the section of the version
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def version(code: str) -> str:
    """Return the version that diffaccel/version.py states, without importing it."""
    return re.findall(r'^__version__ = "(.+)"$', code, re.MULTILINE)[0]


def notes(changelog: str, wanted: str) -> str:
    """Return the section of a version.

    Raises:
        SystemExit: The changelog has no such section.
    """
    sections = re.split(r"^## \[(.+?)\].*$", changelog, flags=re.MULTILINE)
    found = dict(zip(sections[1::2], sections[2::2], strict=True))
    if not found.get(wanted, "").strip():
        raise SystemExit(f"CHANGELOG.md has no section for {wanted}: rename [Unreleased]")
    return found[wanted].strip() + "\n"


def main(tag: str, print_notes: bool = False) -> None:
    """Check the tag, and print the notes if asked to.

    Raises:
        SystemExit: The tag is not the version, or the changelog does not contain the version.
    """
    stated = version((ROOT / "diffaccel" / "version.py").read_text())
    if tag != f"v{stated}":
        raise SystemExit(f"the tag is {tag}, but diffaccel/version.py states {stated}")
    text = notes((ROOT / "CHANGELOG.md").read_text(), stated)
    if print_notes:
        print(text, end="")


if __name__ == "__main__":
    main(sys.argv[1], "--notes" in sys.argv[2:])
