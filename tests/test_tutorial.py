"""The tutorial, followed literally: every command and every line of Python, with small values of its variables."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from own_images import save_images

from diffaccel.report import read_points

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL = {"IMAGES": "photos", "SIZE": "16", "LENGTH": "256", "N": "200", "NFE": "10,12"}


def blocks() -> list[tuple[str, str]]:
    """Language and content of each block of code."""
    found = BLOCK.findall(TUTORIAL.read_text(encoding="utf-8"))
    assert {language for language, _ in found} == {"bash", "python"}
    return found


def script() -> str:
    """All blocks in one shell, with the Python blocks as scripts."""
    lines = ["set -eu"]
    for number, (language, content) in enumerate(blocks(), start=1):
        lines.append(f"echo '--- block {number}' >&2")
        lines.append(f"python - <<'END'\n{content}END" if language == "python" else content)
    return "\n".join(lines) + "\n"


def test_its_variables_can_be_set_from_outside():
    """By which the test below shortens it, and by nothing else."""
    language, content = blocks()[0]
    assert language == "bash"
    assert set(re.findall(r'^(\w+)="\$\{\1:-', content, re.MULTILINE)) == SMALL.keys()
    values = subprocess.run(
        ["bash", "-c", f"{content}\necho $IMAGES $SIZE $LENGTH $N $NFE"],
        env={**os.environ, **SMALL}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert values.stdout.split() == list(SMALL.values())


def test_its_commands_have_no_word_that_zsh_expands():
    for language, content in blocks():
        for line in content.splitlines() if language == "bash" else ():
            command = line.partition("  #")[0]
            assert not re.search(r"(?<![\"'{])[\[\]*?]|=~", command), f"zsh would expand {command!r}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_it_can_be_followed(tmp_path: Path):
    save_images(tmp_path / "photos", n=200, side=20)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, arguments in (("diffaccel", "-m diffaccel"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, **SMALL, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", script()], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "(16, 3, 16, 16)" in done.stdout.replace("torch.Size([16, 3, 16, 16])", "(16, 3, 16, 16)")
    for name in ("edm", "dlg", "small_t"):
        points = read_points(tmp_path / "mine" / "runs" / name / "points.jsonl")
        assert [point["nfe_budget"] for point in points] == [10, 12]
        assert list(points[0]["judges"]) == ["efficientnet_lite0", "mobilenetv2"]
    assert [point["solver"] for point in read_points(tmp_path / "mine" / "ipndm" / "edm" / "points.jsonl")] == [
        "ipndm"
    ] * 2
    for page in ("runs/curve", "solvers"):
        assert (tmp_path / "mine" / page / "index.html").is_file()
    assert len(list((tmp_path / "mine" / "samples").rglob("*.png"))) >= 16
    assert not (tmp_path / "theirs" / "fits").exists()
