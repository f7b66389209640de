"""Scripts as users start them, in forks of a process that has imported what they need.

A Python that imports torch takes seconds of processor time, one that imports a framework ten and
more. ``Scripts`` starts one Python that imports them once; each script then runs in a fork of it,
with its own arguments, environment, folder and output, up to its exit handlers. ``run`` does so
where torch and gmc_cuda are imported.
"""

from __future__ import annotations

import atexit
import gc
import os
import pickle
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
# One thread for each worker: two cores are shared by all of them.
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
}
LAUNCHERS = ("GROUP_", "LOCAL_", "MASTER_", "RANK", "ROLE_", "TORCHELASTIC_", "WORLD_SIZE")


@dataclass
class _Task:
    command: list[str]
    environments: list[dict[str, str]]  # one for each process
    folder: str
    outputs: tuple[str, str]  # files
    timeout: float
    pids: list[int] = field(default_factory=list)


class Scripts:
    """Runs scripts in forks of one process, which starts at the first use.

    Args:
        preload: modules that it imports, beside torch and gmc_cuda.
    """

    def __init__(self, *preload: str) -> None:
        self._preload = preload
        self._server: Any = None

    def run(
        self,
        *command: object,
        workers: int = 0,
        timeout: float = 300,
        cwd: Path | str = ".",
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        """Runs ``command`` as Python would: a script, ``-m`` and a module or ``-c`` and code.

        Args:
            workers: if above 0, as many processes as this, with the variables that torchrun sets.
                The first one that fails ends the others.
            environment: variables beside those of this process.
        Raises AssertionError if it takes longer than timeout.
        """
        if self._server is None:
            self._start()
        own = {name: x for name, x in os.environ.items() if not name.startswith(LAUNCHERS)}
        own |= ENVIRONMENT | environment
        environments, store = [own], None
        if workers:
            import torch.distributed as dist

            # As torchrun does: the store outlives every worker.
            store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            environments = [
                own | _of_torchrun(rank, workers, store.port) for rank in range(workers)
            ]
        with tempfile.TemporaryDirectory(prefix="gmc_cuda-script-") as folder:
            outputs = (f"{folder}/stdout", f"{folder}/stderr")
            words = [str(word) for word in command]
            task = _Task(words, environments, str(Path(cwd).resolve()), outputs, timeout)
            pickle.dump(task, self._server.stdin)
            self._server.stdin.flush()
            status = pickle.load(self._server.stdout)
            said = [Path(output).read_text(errors="replace") for output in outputs]
        del store
        if status is None:
            raise AssertionError(f"{words} took longer than {timeout} s:\n{said[0]}\n{said[1]}")
        return subprocess.CompletedProcess(words, status, *said)

    def _start(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__, *self._preload],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **ENVIRONMENT},
        )  # fmt: skip


# What the demo and the benchmarks import as well, where it is installed.
_USUAL = ("matplotlib.pyplot", "numpy", "rich.table", "sklearn.datasets", "tqdm")
run = Scripts(*(name for name in _USUAL if find_spec(name.partition(".")[0]))).run


def _of_torchrun(rank: int, workers: int, port: int) -> dict[str, str]:
    count = str(workers)
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "ROLE_RANK": str(rank),
        "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_WORLD_SIZE": "1",
        "ROLE_WORLD_SIZE": count, "ROLE_NAME": "default", "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port), "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip


# ------------------------------------------------------------------------------ in the server


def serve(preload: list[str]) -> Callable[[], object]:
    """Forks for each task that comes by standard input; returns in the forks alone."""
    tasks, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what an import prints is no reply
    for name in ("torch", "torch.distributed", "torch._dynamo", "gmc_cuda", *preload):
        __import__(name)
    assert threading.active_count() == 1, "a fork has one thread only"
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page
    while True:
        try:
            task = pickle.load(tasks)
        except EOFError:
            sys.exit()
        for environment in task.environments:
            pid = os.fork()
            if pid == 0:
                replies.close()
                return _become(task, environment)
            task.pids.append(pid)
        pickle.dump(_wait(task), replies)
        replies.flush()


def _wait(task: _Task) -> int | None:
    """The status of the first that failed, 0 if none did, None after the time-out."""
    left, failed, deadline = set(task.pids), 0, time.monotonic() + task.timeout
    while left:
        for pid in list(left):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                left.remove(pid)
                failed = failed or os.waitstatus_to_exitcode(status)
        late = time.monotonic() > deadline
        if left and (late or failed):
            time.sleep(0 if late else 2)  # for what the others have to say
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return None if late else failed
        time.sleep(0.01)
    return failed


def _become(task: _Task, environment: dict[str, str]) -> Callable[[], object]:
    """Makes this fork look like a Python of its own; returns what that runs."""
    for number, path in enumerate((os.devnull, *task.outputs)):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY
        os.dup2(os.open(path, flags), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(task.folder)
    option, rest = task.command[0], task.command[1:]
    sys.path[0] = ""
    if option == "-c":
        sys.argv, code = ["-c", *rest[1:]], compile(rest[0], "<string>", "exec")
        return lambda: exec(code, {"__name__": "__main__"})
    if option == "-m":
        sys.argv = rest
        return lambda: runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    sys.argv, sys.path[0] = task.command, str(Path(option).resolve().parent)
    return lambda: runpy.run_path(option, run_name="__main__")


def _end(run_script: Callable[[], object]) -> int:
    """Runs a script as a Python does, up to the exit handlers; returns the status."""
    status = 0
    try:
        run_script()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    # Not by the end of the interpreter: it takes seconds to let go of all that was imported.
    os._exit(_end(serve(sys.argv[1:])))
