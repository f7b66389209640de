"""The operators of gmc_cuda.ops, executed by the kernels of csrc/cuda on the CPU.

Kernels is called like gmc_cuda.ops with CPU tensors, so that a test can compare the two.
"""

from functools import cache

import numpy as np
import torch

from emulator.compilation import CUDA_SOURCES, HERE, build
from emulator.program import At, Program
from gmc_cuda import ops, reference
from support.cases import assert_same_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # their position is their code
WIRES = reference.WIRE_DTYPES
# Small, so that a few thousand elements take several blocks, groups and rounds of every loop.
SMALL = {
    "GMC_THREADS": 64,
    "GMC_LOOK_THREADS": 128,
    "GMC_SMALLEST_SAMPLE": 512,
    "GMC_GROUPS": 3,
    "GMC_REPAIR_BLOCKS": 2,
    "GMC_SCAN_TILES": 2,
    "GMC_MERGE_THREADS": 64,
    "GMC_MERGE_WINDOW": 96,
    "GMC_INLINE_SEGMENTS": 3,
    "GMC_LARGEST_COUNT": 10_000,
}
OUTCOMES = ("useful", "few values", "useless")  # csrc/cuda/workspace.h
SMALLEST_SAMPLE = SMALL["GMC_SMALLEST_SAMPLE"]
WORK_TILE = 16 * SMALL["GMC_THREADS"]
LARGEST_COUNT = SMALL["GMC_LARGEST_COUNT"]


@cache
def program(flavour, small=True):
    """The program with every kernel of the package, compiled on first use.

    small: with the sizes above, not those that users get.
    """
    sources = sorted((CUDA_SOURCES / "cuda").glob("*.cu"))
    defines = [f"{name}={value}" for name, value in SMALL.items()] if small else []
    return Program(
        build(
            [*sources, HERE / "kernel_cases.cpp"],
            flavour,
            defines=defines,
            include=[CUDA_SOURCES],
        )
    )


def to_numpy(tensor):
    """An array with the tensor's bytes; bf16 and fp16 as uint16."""
    tensor = tensor.detach().reshape(-1)
    if tensor.dtype in DTYPES[1:]:
        tensor = tensor.view(torch.int16)
        return tensor.numpy().view(np.uint16).copy()
    return tensor.numpy().copy()


def from_numpy(array, dtype):
    if dtype in DTYPES[1:]:
        return torch.from_numpy(array.view(np.int16).copy()).view(dtype)
    return torch.from_numpy(array.copy())


def number(name, value):
    """A number by value, or in an array, which stands for device memory."""
    if isinstance(value, torch.Tensor):
        return {f"{name}_array": value.reshape(1).double().numpy()}
    return {} if value is None else {name: float(value)}


def copy_params(params, out):
    for i, param in enumerate(params):
        param.copy_(from_numpy(out[f"param{i}"], param.dtype).view_as(param))


class Kernels:
    """gmc_cuda.ops over one Program; every call runs under the given seed of the schedule.

    After compress_: outcome of the guess, whether the selection read memory itself (from_memory),
    and how many guesses of this state were useless (repairs).
    """

    def __init__(self, running, seed=1, offset=0):
        self.running, self.seed, self.offset = running, seed, offset

    def _call(self, case, **arrays):
        return self.running.call(case, seed=self.seed, **arrays)

    def _segments(self, prefix, tensors, sizes):
        """Each tensor begins `offset` elements past an aligned address."""
        arrays = {
            f"{prefix}_sizes": np.array(sizes, np.int64),
            f"{prefix}_dtypes": np.array(
                [-1 if t is None else DTYPES.index(t.dtype) for t in tensors], np.int64
            ),
        }
        for i, tensor in enumerate(tensors):
            if tensor is not None:
                array = to_numpy(tensor)
                arrays[f"{prefix}{i}"] = At(array, self.offset * array.itemsize)
        return arrays

    def select_state(self, numel, k, ranges=None):
        nbytes = int(self._call("state_nbytes", numel=numel, k=k)["nbytes"][0])
        return torch.zeros(nbytes if ranges is None else (ranges, nbytes), dtype=torch.uint8)

    def compress_(
        self,
        memory,
        grads,
        k,
        *,
        wire_dtype=torch.bfloat16,
        state=None,
        tag=0,
        width=None,
        last_k=None,
        **rule,
    ):
        arrays = {} if state is None else {"state": to_numpy(state)}
        out = self._run_rule(
            "compress",
            memory,
            grads,
            rule,
            wire=WIRES.index(wire_dtype),
            tag=tag,
            **self._ranges(memory.numel(), k, width, last_k),
            **arrays,
        )
        if state is not None:
            state.copy_(torch.from_numpy(out["state"]).view_as(state))
        self.repairs = int(out["repairs"][0])
        self.outcome = OUTCOMES[out["outcome"][0]]
        self.from_memory = bool(out["from_memory"][0])
        return torch.from_numpy(out["payload"])

    def accumulate_(self, memory, grads, *, rank=0, ranks=1, **rule):
        out = self._run_rule("accumulate", memory, grads, rule, rank=rank, ranks=ranks)
        return torch.from_numpy(out["total"])

    def _run_rule(self, case, memory, grads, rule, **arguments):
        """What compress_ and accumulate_ share; updates memory and momentum buffer."""
        rule = {name: value for name, value in rule.items() if value is not None}
        params = rule.get("params")
        sizes = [t.numel() for t in (grads if params is None else params)]
        weight_decay = rule.get("weight_decay", 0.0)
        arrays = self._segments("grad", grads, sizes)
        if weight_decay:
            arrays |= self._segments("param", params, sizes)
        for name in ("momentum", "grad_scale", "found_inf"):
            arrays |= number(name, rule.get(name))
        for name in ("aggregate", "momentum_buffer"):
            if name in rule:
                arrays[name] = to_numpy(rule[name])
        out = self._call(
            case,
            memory=At(to_numpy(memory), 4 * self.offset),
            weight_decay=float(weight_decay),
            memory_decay=float(rule.get("memory_decay", 1.0)),
            maximize=int(rule.get("maximize", False)),
            nesterov=int(rule.get("nesterov", False)),
            **arrays,
            **arguments,
        )
        for name, tensor in (("memory", memory), ("momentum_buffer", rule.get("momentum_buffer"))):
            if tensor is not None:
                tensor.copy_(torch.from_numpy(out[name]))
        return out

    def apply_dense_(self, params, memory, total, lr, **skipping):
        out = self._move(
            "apply_dense",
            params,
            lr,
            skipping,
            memory=At(to_numpy(memory), 4 * self.offset),
            total=At(to_numpy(total), 4 * self.offset),
        )
        for name, tensor in (("memory", memory), ("total", total)):
            tensor.copy_(torch.from_numpy(out[name]))

    def _move(self, case, params, lr, skipping, **arguments):
        """What apply_ and apply_dense_ share; updates params and what steps leave behind."""
        arrays = self._segments("param", params, [p.numel() for p in params]) | number("lr", lr)
        given = {name: tensor for name, tensor in skipping.items() if tensor is not None}
        arrays |= {name: to_numpy(tensor) for name, tensor in given.items()}
        out = self._call(case, **arguments, **arrays)
        copy_params(params, out)
        for name in ("skipped_steps", "flags", "memory"):
            if name in given:
                given[name].copy_(torch.from_numpy(out[name]).view(given[name].dtype))
        return out

    def _payload(self, name, payload, numel, k, wire_dtype, skip=None):
        arrays = {name: to_numpy(payload), "numel": numel, "k": k}
        if skip is not None:
            arrays["skip"] = to_numpy(skip)
        return arrays | {"wire": WIRES.index(wire_dtype)}

    def verdict(self, payloads, counts=()):
        arrays = {f"payloads{i}": to_numpy(p) for i, p in enumerate(payloads)}
        arrays |= {f"counts{i}": to_numpy(c) for i, c in enumerate(counts)}
        ranks = np.array([p.size(0) for p in payloads], np.int64)
        out = self._call("verdict", buckets=len(payloads), dense=len(counts), ranks=ranks, **arrays)
        return torch.from_numpy(out["flags"].view(np.int32))

    def merge(self, payloads, numel, k, wire_dtype=torch.bfloat16, *, skip=None):
        arrays = self._payload("payloads", payloads, numel, k, wire_dtype, skip)
        out = self._call("merge", ranks=payloads.size(0), **arrays)
        return torch.from_numpy(out["aggregate"])

    def _ranges(self, numel, k, width, last_k):
        """The shape of a bucket that is cut into ranges; width None: it is not."""
        if width is None:
            return {"numel": numel, "k": k}
        count = -(-numel // width)
        last = {"last_numel": numel - (count - 1) * width, "last_k": last_k}
        return {"numel": width, "k": k, "ranges": count} | last

    def merge_ranges(
        self, payloads, numel, width, k, last_k, wire_dtype=torch.bfloat16, *, skip=None
    ):
        arrays = self._payload("payloads", payloads, width, k, wire_dtype, skip)
        out = self._call("merge_ranges", **arrays | self._ranges(numel, k, width, last_k))
        return torch.from_numpy(out["aggregate"])

    def apply_(self, params, aggregate, lr, *, k=1, wire_dtype=torch.bfloat16, **skipping):
        numel = sum(p.numel() for p in params)
        shape = {"numel": numel, "k": k, "wire": WIRES.index(wire_dtype)}
        self._move("apply", params, lr, skipping, aggregate=to_numpy(aggregate), **shape)

    def restore_(
        self, memory, payload, k, wire_dtype=torch.bfloat16, *, skip=None, width=None, last_k=None
    ):
        arrays = self._payload("payload", payload, memory.numel(), k, wire_dtype, skip)
        arrays |= self._ranges(memory.numel(), k, width, last_k)
        memory.copy_(
            torch.from_numpy(self._call("restore", memory=to_numpy(memory), **arrays)["memory"])
        )

    def mask_(
        self,
        momentum_buffer,
        payload,
        k,
        wire_dtype=torch.bfloat16,
        *,
        skip=None,
        width=None,
        last_k=None,
    ):
        numel = momentum_buffer.numel()
        arrays = self._payload("payload", payload, numel, k, wire_dtype, skip)
        arrays |= self._ranges(numel, k, width, last_k)
        out = self._call("mask", momentum_buffer=to_numpy(momentum_buffer), **arrays)
        momentum_buffer.copy_(torch.from_numpy(out["momentum_buffer"]))

    def unpack(self, payload, numel, k, wire_dtype=torch.bfloat16):
        out = self._call("unpack", **self._payload("payload", payload, numel, k, wire_dtype))
        return tuple(torch.from_numpy(out[name]) for name in ("indices", "values", "nonfinite"))

    def sparsify(self, dense):
        return torch.from_numpy(self._call("sparsify", dense=to_numpy(dense))["aggregate"])

    def densify(self, aggregate, numel):
        out = self._call("densify", aggregate=to_numpy(aggregate), numel=numel)
        return torch.from_numpy(out["dense"])


def assert_same_aggregate(kernels, expected, numel):
    """Header, starts, counts, runs and the entries; the gaps between tiles hold anything."""
    tiles = -(-numel // 65536)
    padded = -(-4 * tiles // 16) * 16
    filled = expected[16 + padded : 16 + padded + 4 * tiles].view(torch.int32) != 0
    runs = slice(16 + 2 * padded, 16 + 2 * padded + 32 * tiles)
    assert_same_bytes(
        kernels[runs].view(tiles, 32)[filled], expected[runs].view(tiles, 32)[filled], "runs"
    )
    assert_same_bytes(kernels[: 16 + 4 * tiles], expected[: 16 + 4 * tiles], "aggregate's starts")
    counts = slice(16 + padded, 16 + padded + 4 * tiles)
    assert_same_bytes(kernels[counts], expected[counts], "aggregate's counts")
    assert_same_bytes(
        ops.densify(kernels, numel), ops.densify(expected, numel), "aggregate's entries"
    )
