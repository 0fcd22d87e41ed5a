"""What a point records of the program that made it."""

import subprocess
from pathlib import Path

from diffaccel.evaluation.provenance import git_commit


def test_the_commit_is_that_of_the_package_and_of_no_other_repository(tmp_path: Path):
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "own.py").write_text("")
    (tmp_path / ".gitignore").write_text(".venv/\n")
    git("add", ".")
    git("commit", "-qm", "another project")
    installed = tmp_path / ".venv" / "diffaccel" / "provenance.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    assert git_commit(installed) is None, "a wheel in that project's environment"
    assert git_commit(tmp_path / "own.py") == git("rev-parse", "--short=12", "HEAD")
    (tmp_path / "own.py").write_text("# changed")
    assert str(git_commit(tmp_path / "own.py")).endswith("+")
