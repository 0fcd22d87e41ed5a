"""Processes of a run on one machine: they are started by the first, and none outlives another that failed."""

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

LAUNCHER = "DIFFACCEL_LAUNCHER"
"""Environment variable that names, to the processes it starts, the one that starts them."""
INTERVAL = 0.3
"""Seconds between two looks at the others."""
GRACE = 5.0
"""Seconds in which a process may end by itself, with its own message, once another has failed."""


class Watch:
    """A thread that ends this process when another one of the run has failed.

    One that waits for the failed one in a collective cannot be reached by an exception.

    Args:
        children: Processes that this one has started, in the order of their ranks from 1 on.
    """

    def __init__(self, children: Sequence["subprocess.Popen[bytes]"] = ()) -> None:
        self.children = children
        self._over = threading.Event()
        self._parent = int(os.environ.get(LAUNCHER, 0)) if not children else 0

    def start(self) -> None:
        """Begin to watch, if there is anybody to watch."""
        if self.children or self._parent:
            threading.Thread(target=self._run, name="watch", daemon=True).start()

    def stop(self) -> None:
        """End: the others may go."""
        self._over.set()

    def failed(self) -> str | None:
        """Say which process has failed, and how."""
        for rank, process in enumerate(self.children, start=1):
            if status := process.poll():
                how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                return f"process {rank} {how}, and all end with it: its own message, if it had one, is above"
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
    """Starts the other processes by running the command again, and watches them as they watch it.

    Lightning's own observer kills the first process without a word.
    """

    started: ClassVar[list["subprocess.Popen[bytes]"]] = []
    """The processes, which a later trainer of the same script runs in again."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Call a function in every process.

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
            said = _wait_for(watch.failed) or f"another process of the run is gone ({reason:.200}), and all end with it"
            raise SharedError(said) from error
        finally:
            watch.stop()


def _lost(error: RuntimeError) -> bool:
    """Whether a collective failed because a process is gone; gloo's errors have no class of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _wait_for(said: Callable[[], str | None]) -> str | None:
    """Wait until another process, whose connection is closed, has an exit status."""
    deadline = time.monotonic() + GRACE
    while (found := said()) is None and time.monotonic() < deadline:
        time.sleep(INTERVAL)
    return found


class Together:
    """What a DDP strategy, the Trainer's or Fabric's, needs so that its processes end together."""

    cluster_environment: Any
    num_processes: int
    _num_nodes: int

    def _configure_launcher(self) -> None:
        self._launcher: Any = Launcher(self.cluster_environment, self.num_processes, self._num_nodes)

    def setup_environment(self) -> None:
        """Connect to the other processes.

        Raises:
            UsageError: The port is taken.
        """
        try:
            super().setup_environment()  # type: ignore[misc]  # the strategy's
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise UsageError(
                f"MASTER_PORT={os.environ['MASTER_PORT']} is taken: unset it, and a free port is found, or set another"
            ) from None


class Processes(Together, DDPStrategy):
    """DDP of a fit; also for a fit without gradients, which has nothing to wrap."""

    def setup_environment(self) -> None:
        """Connect to the other processes, and check that ``precision: auto`` means the same on every node.

        Raises:
            UsageError: The port is taken.
            SharedError: It doesn't.
        """
        super().setup_environment()
        check_agreed(self.precision_plugin.precision)

    def configure_ddp(self) -> None:
        """Wrap the module if there are gradients to sum."""
        assert self.lightning_module is not None
        if any(parameter.requires_grad for parameter in self.lightning_module.parameters()):
            super().configure_ddp()


class Workers(Together, FabricDDPStrategy):
    """Processes that share work without training: sampling, scoring, statistics."""


def check_agreed(precision: str) -> None:
    """Refuse processes whose ``precision: auto`` was settled differently, on nodes of different kinds.

    Raises:
        SharedError: They differ.
    """
    chosen = set(all_gather(precision))
    if len(chosen) > 1:
        raise SharedError(f"processes compute in {' and in '.join(sorted(chosen))}: set precision=32-true")
