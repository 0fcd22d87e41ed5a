"""Print the lowest versions that pyproject.toml allows, as constraints for pip: python .ci/lowest.py > lowest.txt."""

import re
from pathlib import Path


def lowest(pyproject: str) -> dict[str, str]:
    """Return dependency -> lowest version, of those that a user installs."""
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", pyproject, re.DOTALL | re.MULTILINE)
    assert listed is not None
    return dict(re.findall(r'^ *"([\w.-]+)>=([\w.]+)",', listed[1], re.MULTILINE))


if __name__ == "__main__":
    for name, version in lowest((Path(__file__).parent.parent / "pyproject.toml").read_text()).items():
        print(f"{name}=={version}")
