"""Python scripts in processes of their own, without the seconds that importing torch takes each time.

A server, started once, imports torch and the library; each script runs in a fork of it, as the main module, and so its process
ends as any interpreter does: unlike a fork of the tests, it waits for threads, runs exit handlers and takes its modules down.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any


class Script:
    """A script that runs, as subprocess.Popen with pipes would have it. It leads a session of its own.

    arguments: its sys.argv[1:]. file: what it takes for its file. environment: variables that it has beside those of the tests.
    """

    def __init__(
        self, text: str, *arguments: object, cwd: object = ".", file: object = "<script>", environment: dict[str, str] | None = None
    ) -> None:
        self._channel, _ = _server()
        pipes = [os.pipe() for _ in range(2)]
        ends = [os.open(os.devnull, os.O_RDONLY), *(write for _, write in pipes)]
        argv = [str(file), *map(str, arguments)]
        request = {"text": text, "argv": argv, "cwd": os.path.abspath(str(cwd)), "environment": environment or {}}
        socket.send_fds(self._channel, [json.dumps(request).encode()], ends)
        for fd in ends:
            os.close(fd)
        self.stdout, self.stderr = (open(read, encoding="utf-8") for read, _ in pipes)  # noqa: SIM115
        self.pid = int(self._channel.recv(100))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, a negative signal number, or None while it runs."""
        if self.returncode is None:
            self._channel.send(json.dumps({"pid": self.pid}).encode())
            self.returncode = json.loads(self._channel.recv(100))
        return self.returncode

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise TimeoutError(f"a script still runs after {timeout} seconds")
            time.sleep(0.005)
        return code

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What is left of its output and errors, which must fit into a pipe, once it has ended."""
        self.wait(timeout)
        with self.stdout as out, self.stderr as errors:
            return out.read(), errors.read()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def _server() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with there:
        command = [sys.executable, __file__, str(there.fileno())]
        return here, subprocess.Popen(command, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)


def _serve(channel: socket.socket) -> dict[str, Any]:
    """Answer requests until the tests are over. Returns in each fork, with the script that it is to run."""
    import numpy as np

    import leanreplay.torch

    with leanreplay.ClassBalancedBuffer(2) as buffer:  # which loads what every kernel needs
        buffer.add((np.zeros((3, 2)), np.arange(3)))
        buffer.sample(1)
    del buffer
    gc.freeze()
    while True:
        message, fds, _, _ = socket.recv_fds(channel, 1 << 17, 3)
        if not message:
            os._exit(0)
        request: dict[str, Any] = json.loads(message)
        if "pid" in request:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            channel.send(json.dumps(os.waitstatus_to_exitcode(status) if pid else None).encode())
            continue
        pid = os.fork()
        if pid == 0:
            os.setsid()
            channel.close()
            for target, fd in enumerate(fds):
                os.dup2(fd, target)
                os.close(fd)
            os.chdir(request["cwd"])
            os.environ.update(request["environment"])
            return request
        for fd in fds:
            os.close(fd)
        channel.send(str(pid).encode())


if __name__ == "__main__":
    sys.path[0] = ""  # as of `python -c`
    _request = _serve(socket.socket(fileno=int(sys.argv[1])))
    sys.argv, __file__ = _request["argv"], _request["argv"][0]
    exec(compile(_request["text"], __file__, "exec", dont_inherit=True))
