"""Python programs in processes of their own that start at once, from one that has imported the libraries already.

`import torch, transformers` takes five seconds, and the tests start some fifty programs.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_LIBRARIES = [
    "pyarrow.parquet",
    "torch.distributed",
    "transformers.models.llama.modeling_llama",
    "peft",
    "accelerate",
    "datasets",
    "sacrebleu",
    "compressor.api",
    "compressor.commands.cli",
    "compressor.commands.train",
    "compressor.commands.evaluate",
    "compressor.training.loop",
    "compressor.training.answer",
    "compressor.evaluation.runner",
]
_FORKS = sys.platform == "linux"
_server = multiprocessing.get_context("forkserver" if _FORKS else "spawn")
if _FORKS:
    _server.set_forkserver_preload(_LIBRARIES)


def _run(argv: list[str], folder: str, environment: dict[str, str], out: str, err: str) -> None:
    """What `python ARGUMENTS` does, in the server's child."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False, buffering=1) for number in (1, 2))  # noqa: SIM115
    if environment.get("PYTHONWARNINGS") == "ignore":
        import warnings

        warnings.simplefilter("ignore")
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    if (train := sys.modules.get("compressor.commands.train")) is not None:
        train.step_bytes = lambda *_: 0  # as `no_estimate`
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        elif argv[0] == "-c":
            sys.argv = ["-c", *argv[2:]]
            exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = list(argv)
            sys.path.insert(0, str(Path(argv[0]).resolve().parent))
            runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


class Program:
    """`python ARGUMENTS`, as one process or several that train or evaluate together; used as a `Popen` is."""

    def __init__(
        self,
        argv: Sequence[str],
        folder: Path,
        cwd: Path,
        environment: Mapping[str, str] | None = None,
        processes: int = 1,
        merged: bool = False,
    ):
        """`folder`: for what it prints; `merged`: errors go where output goes."""
        self.args = argv
        self.files = [folder / "out", folder / ("out" if merged else "err")]
        for file in self.files:
            file.write_bytes(b"")
        shared = dict(os.environ if environment is None else environment)
        if processes > 1:  # what a launcher tells its processes
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        self.processes = []
        for rank in range(processes):
            own = shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
            arguments = (list(map(str, argv)), str(cwd), own, *map(str, self.files))
            process = _server.Process(target=_run, args=arguments)
            process.start()
            self.processes.append(process)
        self.pid = self.processes[0].pid

    @property
    def returncode(self) -> int | None:
        """0 if all ended well, None while one runs, else that of one that did not."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next((code for code in codes if code), 0)

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            if process.exitcode is None and process.pid is not None:
                os.kill(process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 240) -> int | None:
        patience = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, patience - time.monotonic()))
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """What it printed, and its errors (again its output if they are merged)."""
        self.wait(timeout)
        out, err = (file.read_text(encoding="utf-8", errors="replace") for file in self.files)
        return out, err
