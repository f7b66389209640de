"""Run cases (executor/case.h) in a program that compilation.py made."""

import contextlib
import os
import re
import signal
import struct
import subprocess
import tempfile
from functools import cache

import numpy as np

FAULT = 86  # executor/report.h


class KernelFault(Exception):
    """The executor or a sanitizer found a fault; the message is its report."""


class At:
    """An array whose first element lies `offset` bytes (0 to 255) past a multiple of 256."""

    def __init__(self, array, offset):
        self.array, self.offset = array, offset


class Program:
    """A running program; calls share one process until a fault ends it, then the next starts anew.

    >>> with Program(build([...], "plain")) as program:
    ...     out = program.call("scale", seed=1, x=np.ones(5, np.float32), factor=2.0)
    ...     out["x"]
    """

    def __init__(self, path):
        self.path = path
        self._process = None
        self._prefix = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End the process."""
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait()
            self._process = None
            self._errors.close()

    def call(
        self, case, *, seed=1, watchdog=10.0, float_atomics=False, multiprocessors=3, **arrays
    ):
        """Run CUDA_CASE(case) and return its arrays by name, as the kernels left them.

        arrays: numpy arrays (numbers of 1 to 8 bytes), `At(array, offset)`, ints or floats.
        seed: of the schedule; 0 runs blocks and threads in index order.
        watchdog: seconds of processor time that one block may take.
        float_atomics: whether floating-point atomicAdd is allowed.
        multiprocessors: what the launcher is told the device has.
        Raises KernelFault with the report.
        """
        request = [
            _string(case),
            struct.pack("<Qdii", seed, watchdog, float_atomics, multiprocessors),
            struct.pack("<I", len(arrays)),
        ]
        shapes = {}
        for name, value in arrays.items():
            array, offset = (value.array, value.offset) if isinstance(value, At) else (value, 0)
            array = np.asarray(array)
            if array.dtype.kind not in "iuf":
                raise TypeError(f"{name} has dtype {array.dtype}, but must be int, uint or float")
            if not 0 <= offset < 256:
                raise ValueError(f"{name} has offset {offset}, but must be within 0 to 255")
            shapes[name] = array.shape
            head = struct.pack("<BBBQ", ord(array.dtype.kind), array.itemsize, offset, array.nbytes)
            request += [_string(name), head, array.tobytes()]
        try:
            return self._exchange(b"".join(request), shapes)
        except KernelFault as fault:
            # An old thread sanitizer cannot live with the random addresses of a new Linux.
            if "unexpected memory mapping" not in str(fault) or self._prefix:
                raise
            self._prefix = ["setarch", "--addr-no-randomize"]
            return self._exchange(b"".join(request), shapes)

    def _exchange(self, request, shapes):
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            return self._receive(shapes)
        except (BrokenPipeError, EOFError):
            raise KernelFault(self._report()) from None
        except BaseException:  # Ctrl-C: half an answer is still in the pipe
            self._process.kill()
            self.close()
            raise

    def _start(self):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- lives as long as the process
        options = {
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "TSAN_OPTIONS": "halt_on_error=1:report_thread_leaks=0:history_size=0",
        }
        self._process = subprocess.Popen(
            [*self._prefix, str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **options},
        )

    def _take(self, count):
        data = self._process.stdout.read(count)
        if len(data) != count:
            raise EOFError
        return data

    def _receive(self, shapes):
        result = {}
        for _ in range(struct.unpack("<I", self._take(4))[0]):
            name = self._take(struct.unpack("<I", self._take(4))[0]).decode()
            kind, item, size = struct.unpack("<BBQ", self._take(10))
            array = np.frombuffer(bytearray(self._take(size)), dtype=f"<{chr(kind)}{item}")
            result[name] = array.reshape(shapes[name]) if name in shapes else array
        return result

    def _report(self):
        code = self._process.wait()
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace")
        self.close()
        if code == -signal.SIGVTALRM:
            text += "emulator: watchdog: one block has run for too long"
        elif code != FAULT:
            text += f"\n(the program ended with code {code})"
        return with_kernel_names(text, self.path)


def with_kernel_names(text, path):
    """A report of a program, or library, with the names of kernels where it has their offsets."""

    def name(match):
        return "kernel " + _symbols(path).get(int(match[1], 16), f"at {match[1]}")

    return re.sub(r"kernel <(0x[0-9a-f]+)>", name, text)


def _string(text):
    data = text.encode()
    return struct.pack("<I", len(data)) + data


@cache
def _symbols(path):
    """Functions of a program by their offset from its start."""
    listing = subprocess.run(["nm", "-C", path], capture_output=True, text=True).stdout
    rows = [line.split(" ", 2) for line in listing.splitlines() if re.match("[0-9a-f]", line)]
    start = next(int(row[0], 16) for row in rows if row[2] == "__ehdr_start")
    return {int(row[0], 16) - start: row[2] for row in rows if row[1] in "tTwW"}
