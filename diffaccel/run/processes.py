"""Processes of a run on one machine, which are started by the first and end together after a failure."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch.distributed as dist
from lightning.fabric.strategies import DDPStrategy as FabricDDPStrategy
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from diffaccel.collective import all_gather
from diffaccel.errors import SharedError, UsageError
from diffaccel.text.terminal import PlainConsole

for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
    logging.getLogger(name).setLevel(logging.ERROR)  # after the imports above, which set these levels

LAUNCHER = "DIFFACCEL_LAUNCHER"
"""Environment variable with the id of the process that started the others."""
INTERVAL = 0.3
"""Interval between checks of the other processes, in seconds."""
GRACE = 5.0
"""Time for a process to end by itself with its own message after another has failed, in seconds."""


class Watch:
    """Thread that ends this process when another process of the run has failed.

    An exception can't interrupt a process that waits for the failed one in a collective.

    Args:
        children: Processes started by this one, in the order of their ranks, from 1 on.
    """

    def __init__(self, children: Sequence["subprocess.Popen[bytes]"] = ()) -> None:
        self.children = children
        self._over = threading.Event()
        self._parent = int(os.environ.get(LAUNCHER, 0)) if not children else 0

    def start(self) -> None:
        """Start watching, if there are other processes."""
        if self.children or self._parent:
            threading.Thread(target=self._run, name="watch", daemon=True).start()

    def stop(self) -> None:
        """Stop watching, after which other processes may end."""
        self._over.set()

    def failed(self) -> str | None:
        """Describe which process has failed and how; None if none has failed."""
        for rank, process in enumerate(self.children, start=1):
            if status := process.poll():
                how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                return f"process {rank} {how}, so that all processes end: see its message above, if any"
        return None

    def _run(self) -> None:
        while not self._over.wait(INTERVAL):
            if self._parent and os.getppid() != self._parent:
                os._exit(1)
            if self.failed() and not self._over.wait(GRACE):
                PlainConsole(stderr=True, soft_wrap=True).print(f"diffaccel: {self.failed()}", style="red")
                for process in self.children:
                    process.kill()
                sys.stderr.flush()
                os._exit(2)


class Launcher(_SubprocessScriptLauncher):
    """Launcher that starts the other processes by running the command again, with mutual watching.

    Lightning's own observer kills the first process without a message.
    """

    started: ClassVar[list["subprocess.Popen[bytes]"]] = []
    """Started processes, which a later trainer in the same script uses again."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Call a function in this process, after starting the others.

        Raises:
            SharedError: Another process has ended.
        """
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            os.environ[LAUNCHER] = str(os.getpid())
            self._call_children_scripts()
            Launcher.started = self.procs
        _set_num_threads_if_needed(num_processes=self.num_processes)
        watch = Watch(Launcher.started)
        watch.start()
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if not _lost(error):
                raise
            reason = str(error).splitlines()[0]
            said = _wait_for(watch.failed) or f"another process of the run has ended ({reason:.200}), so that all end"
            raise SharedError(said) from error
        finally:
            watch.stop()


def _lost(error: RuntimeError) -> bool:
    """Whether a collective failed because a process has ended; gloo's errors have no separate class."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _wait_for(said: Callable[[], str | None]) -> str | None:
    """Wait for the exit status of another process whose connection is closed."""
    deadline = time.monotonic() + GRACE
    while (found := said()) is None and time.monotonic() < deadline:
        time.sleep(INTERVAL)
    return found


class Together:
    """Mixin for DDP strategies of Trainer and Fabric whose processes end together."""

    cluster_environment: Any
    num_processes: int
    _num_nodes: int

    def _configure_launcher(self) -> None:
        self._launcher: Any = Launcher(self.cluster_environment, self.num_processes, self._num_nodes)

    def setup_environment(self) -> None:
        """Connect to the other processes.

        Raises:
            UsageError: The port is in use.
        """
        try:
            super().setup_environment()  # type: ignore[misc]  # the strategy's
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise UsageError(
                f"MASTER_PORT={os.environ['MASTER_PORT']} is in use: unset it to find a free port, or set another one"
            ) from None


class Processes(Together, DDPStrategy):
    """DDP strategy of a fit, including fits without gradients."""

    def setup_environment(self) -> None:
        """Connect to the other processes, and check that ``precision: auto`` is the same on every node.

        Raises:
            UsageError: The port is in use.
            SharedError: The precision differs between nodes.
        """
        super().setup_environment()
        check_agreed(self.precision_plugin.precision)

    def configure_ddp(self) -> None:
        """Wrap the module for DDP, if it has trainable parameters."""
        assert self.lightning_module is not None
        if any(parameter.requires_grad for parameter in self.lightning_module.parameters()):
            super().configure_ddp()


class Workers(Together, FabricDDPStrategy):
    """DDP strategy of runs without training: sampling, scoring, statistics."""


def check_agreed(precision: str) -> None:
    """Check that ``precision: auto`` was resolved equally on all nodes.

    Raises:
        SharedError: The precision differs between nodes.
    """
    chosen = set(all_gather(precision))
    if len(chosen) > 1:
        raise SharedError(f"processes compute in {' and in '.join(sorted(chosen))}: set precision=32-true")
