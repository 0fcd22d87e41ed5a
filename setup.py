"""The parts of the build that pyproject.toml can't state.

experiments/ becomes diffaccel/experiments in a wheel, and the loop of the noise on a CPU is compiled. The compiler is
optional, see diffaccel/noise/host.py. With DIFFACCEL_PURE=1 nothing is compiled: the wheel of a release is one file for
every platform and version of Python.
"""

import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py


def shipped() -> list[str]:
    """Return the files of experiments/ that a wheel and an sdist contain.

    Results stay in the clone, and so do weights without averaging (``*_raw``), which no experiment names.
    """
    files = [file for pattern in ("*/*.yaml", "*/weights/*") for file in Path("experiments").glob(pattern)]
    return sorted(file.as_posix() for file in files if not _stays(file))


def _stays(file: Path) -> bool:
    return file.stem.endswith("_raw")


class BuildWithExperiments(build_py):
    """Copies the experiments beside the modules; an editable installation reads the clone's own."""

    def run(self) -> None:
        """Build the package."""
        super().run()
        if not self.editable_mode:
            for source, target in zip(shipped(), self._targets(), strict=True):
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target, preserve_mode=False)

    def get_source_files(self) -> list[str]:
        """Return what is built from: an sdist contains these files."""
        return [*super().get_source_files(), *shipped()]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return what is built."""
        built: list[str] = super().get_outputs(include_bytecode)
        return built if self.editable_mode else [*built, *self._targets()]

    def _targets(self) -> list[str]:
        return [str(Path(self.build_lib, "diffaccel", file)) for file in shipped()]


LOOP = Extension(
    "diffaccel.noise._philox",
    ["diffaccel/noise/philox.c"],
    extra_compile_args=["-O3", "-ffp-contract=off"],  # fused operations would round differently from PyTorch's
    optional=True,
)

PURE = os.environ.get("DIFFACCEL_PURE") == "1"
setup(cmdclass={"build_py": BuildWithExperiments}, ext_modules=[] if PURE else [LOOP])
