"""``diffaccel`` for scripts of the tests: commands run in forks of a process that has imported everything already.

    python tests/forked.py SOCKET          # the server; it prints a line when it is ready
    python -IS tests/forked.py SOCKET ...  # the command: words, folder, environment and files go to the server

An import of PyTorch and Lightning takes seconds, and the documentation has dozens of commands.
"""

import array
import json
import os
import socket
import sys

CLIENT = """#!{python} -IS
import array, json, os, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect({path!r})
files = array.array("i", [0, 1, 2])
message = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
link.sendmsg([len(message).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
link.sendall(message)
sys.exit(int(link.recv(8) or b"1"))
"""
"""Script of the command ``diffaccel``; without site-packages it starts in milliseconds."""


def serve(path: str) -> None:
    """Carry out one command after the other, each in a fork."""
    import torch

    import diffaccel.experiment
    import diffaccel.verbs.bench
    import diffaccel.verbs.fit  # noqa: F401
    from diffaccel.__main__ import main

    torch.set_num_threads(1)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    print("ready", flush=True)
    while True:
        link, _ = server.accept()
        head, ancillary, *_ = link.recvmsg(4, socket.CMSG_SPACE(3 * 4))
        files = array.array("i", ancillary[0][2])
        message = b""
        while len(message) < int.from_bytes(head, "big"):
            message += link.recv(1 << 16)
        child = os.fork()
        if child == 0:
            _run(main, files, *json.loads(message))
        for file in files:
            os.close(file)
        link.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
        link.close()


def _run(main: object, files: "array.array[int]", words: list[str], folder: str, environment: dict[str, str]) -> None:
    """Become the command: its files, folder and environment, and its end."""
    import atexit

    for target, file in enumerate(files):
        os.dup2(file, target)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["diffaccel", *words]
    code = 1
    try:
        code = main(words)  # type: ignore[operator]
        atexit._run_exitfuncs()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
