"""Print the lowest versions that pyproject.toml allows, as constraints for pip: python .ci/lowest.py > lowest.txt."""

import re
from pathlib import Path


def requirements(pyproject: str) -> dict[str, list[str]]:
    """Return the requirements of each extra; those of every installation have the empty name."""
    project, _, rest = pyproject.partition("\n[project.optional-dependencies]")
    lists = re.compile(r"^([\w-]+) = \[(.*?)\]$", re.DOTALL | re.MULTILINE)  # Python 3.10 has no reader of TOML
    found = {"": dict(lists.findall(project))["dependencies"], **dict(lists.findall(rest.partition("\n[")[0]))}
    return {extra: re.findall(r'"(.+?)"', listed) for extra, listed in found.items()}


def lowest(pyproject: str) -> dict[str, str]:
    """Return dependency -> lowest version, of those that a user installs, extras included."""
    tools = ("dev", "docs")
    listed = [one for extra, needed in requirements(pyproject).items() if extra not in tools for one in needed]
    return dict(re.findall(r"^([\w.-]+)>=([\w.]+)$", "\n".join(listed), re.MULTILINE))


if __name__ == "__main__":
    for name, version in lowest((Path(__file__).parent.parent / "pyproject.toml").read_text()).items():
        print(f"{name}=={version}")
