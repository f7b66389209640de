"""Bad input to the operators: an error that names the argument, and nothing changed."""

import pytest
import torch

from gmc_cuda import ops, reference
from gmc_cuda._engine.library import build_config

N, K, WIRE = 100, 5, torch.bfloat16


def compress(**changes):
    arguments = {"memory": torch.zeros(N), "grads": [torch.ones(N)], "k": K} | changes
    memory, grads, k = (arguments.pop(name) for name in ("memory", "grads", "k"))
    return ops.compress_(memory, grads, k, **arguments)


def payload():
    return compress()


def aggregate():
    return ops.merge(payload().unsqueeze(0), N, K, WIRE)


CASES = {
    # name: (call, exception, words of the message)
    "memory dtype": (
        lambda: compress(memory=torch.zeros(N, dtype=torch.float64)),
        TypeError,
        "memory: got torch.float64, must be torch.float32",
    ),
    "memory shape": (
        lambda: compress(memory=torch.zeros(10, 10)),
        ValueError,
        r"memory: got shape \[10, 10\], must be \[100\]",
    ),
    "memory empty": (
        lambda: compress(memory=torch.zeros(0), grads=[]),
        ValueError,
        "memory: got 0 elements, must be between 1",
    ),
    "grads dtype": (
        lambda: compress(grads=[torch.ones(N, dtype=torch.float64)]),
        TypeError,
        r"grads\[0\]: got torch.float64, must be torch.float32, torch.bfloat16 or torch.float16",
    ),
    "grads complex": (
        lambda: compress(grads=[torch.ones(N, dtype=torch.complex64)]),
        TypeError,
        r"grads\[0\]: got torch.ComplexFloat",
    ),
    "grads sparse": (
        lambda: compress(grads=[torch.ones(N).to_sparse()]),
        TypeError,
        r"grads\[0\]: got layout torch.sparse_coo, must be a dense tensor",
    ),
    "grads size": (
        lambda: compress(grads=[torch.ones(60), torch.ones(30)]),
        ValueError,
        "grads: got 90 elements in all, must be 100 like memory",
    ),
    "grads not contiguous": (
        lambda: compress(grads=[torch.ones(50), torch.ones(10, 5).t()]),
        ValueError,
        r"grads\[1\]: got a non-contiguous tensor of shape \[5, 10\] and strides \[1, 5\]",
    ),
    "grads None": (
        lambda: compress(grads=[None]),
        ValueError,
        r"grads\[0\]: got None, must be a tensor when params is None",
    ),
    "grads against params": (
        lambda: compress(params=[torch.ones(60), torch.ones(40)], grads=[torch.ones(N), None]),
        ValueError,
        r"grads\[0\]: got 100 elements, must be 60 like params\[0\]",
    ),
    "grads count": (
        lambda: compress(params=[torch.ones(60), torch.ones(40)]),
        ValueError,
        "grads: got 1 tensors, must be 2 like params",
    ),
    "k zero": (lambda: compress(k=0), ValueError, "k: got 0, must be between 1 and numel = 100"),
    "k above numel": (lambda: compress(k=101), ValueError, "k: got 101, must be between 1 and"),
    "wire dtype": (
        lambda: compress(wire_dtype=torch.int8),
        TypeError,
        "wire_dtype: got torch.Char, must be torch.float32, torch.bfloat16, torch.float16, "
        "torch.float8_e4m3fn or torch.float4_e2m1fn_x2",
    ),
    "momentum": (
        lambda: compress(momentum=torch.ones(3)),
        ValueError,
        r"momentum: got shape \[3\], must hold one number",
    ),
    "momentum type": (
        lambda: compress(momentum="0.9"),
        TypeError,
        "momentum: got str, must be a number or a tensor",
    ),
    "memory decay below zero": (
        lambda: compress(memory_decay=-0.1),
        ValueError,
        "memory_decay: got -0.1, must be between 0 and 2",
    ),
    "memory decay above one": (
        lambda: ops.accumulate_(torch.zeros(N), [torch.ones(N)], memory_decay=2.01),
        ValueError,
        "memory_decay: got 2.01, must be between 0 and 2",
    ),
    "memory decay that is no number": (
        lambda: compress(memory_decay=float("nan")),
        ValueError,
        "memory_decay: got nan, must be between 0 and 2",
    ),
    "memory decay type": (
        lambda: compress(memory_decay="0.9"),
        TypeError,
        "memory_decay: got str, must be a number",
    ),
    "memory decay of the reference": (
        lambda: reference.compress_(torch.zeros(N), [torch.ones(N)], K, memory_decay=2.5),
        ValueError,
        "memory_decay: got 2.5, must be between 0 and 2",
    ),
    "tag below zero": (
        lambda: compress(tag=-1),
        ValueError,
        r"tag: got -1, must be between 0 and 2\*\*24 - 1",
    ),
    "tag too large": (
        lambda: compress(tag=2**24),
        ValueError,
        "tag: got 16777216, must be between 0 and",
    ),
    "tag far too large": (
        lambda: compress(tag=2**63),
        ValueError,
        "tag: got 9223372036854775808, must be between 0 and",
    ),
    "tag type": (lambda: compress(tag=7.0), TypeError, "tag: got float, must be a whole number"),
    "tag of the reference": (
        lambda: reference.compress_(torch.zeros(N), [torch.ones(N)], K, tag=2**24),
        ValueError,
        "tag: got 16777216, must be between 0 and",
    ),
    "weight decay without params": (
        lambda: compress(weight_decay=0.1),
        ValueError,
        "params: got None with weight_decay = 0.1",
    ),
    "aggregate of another size": (
        lambda: compress(aggregate=ops.sparsify(torch.ones(N + 1))),
        ValueError,
        "aggregate: got one for 101 elements, must be for 100",
    ),
    "aggregate that is none": (
        lambda: compress(aggregate=torch.zeros(1000, dtype=torch.uint8)),
        ValueError,
        "aggregate: got bytes that are no aggregate",
    ),
    "both momenta": (
        lambda: compress(aggregate=aggregate(), momentum_buffer=torch.zeros(N)),
        ValueError,
        "aggregate: got a tensor beside momentum_buffer",
    ),
    "nesterov": (
        lambda: compress(nesterov=True),
        ValueError,
        "nesterov: got True without momentum_buffer",
    ),
    "state": (
        lambda: compress(state=torch.zeros(3, dtype=torch.uint8)),
        ValueError,
        r"state: got shape \[3\]",
    ),
    "device": (
        lambda: compress(grads=[torch.ones(N, device="meta")]),
        ValueError,
        r"grads\[0\]: got device meta, must be cpu",
    ),
    "payload size": (
        lambda: ops.unpack(payload()[:-16], N, K, WIRE),
        ValueError,
        r"payload: got shape \[80\], must be \[96\]",
    ),
    "payload dtype": (
        lambda: ops.unpack(payload().int(), N, K, WIRE),
        TypeError,
        "payload: got torch.int32, must be torch.uint8",
    ),
    "payloads shape": (
        lambda: ops.merge(payload(), N, K, WIRE),
        ValueError,
        r"payloads: got shape \[96\], must be \[world size, 96\]",
    ),
    "verdict of nothing": (lambda: ops.verdict([]), ValueError, "payloads: got an empty list"),
    "counts without tags": (
        lambda: ops.verdict([], [torch.zeros(4), torch.zeros(3)]),
        ValueError,
        r"counts\[1\]: got 3 elements, must be a count for each rank and then a tag for each",
    ),
    "counts of nobody": (
        lambda: ops.verdict([], [torch.zeros(0)]),
        ValueError,
        r"counts\[0\]: got 0 elements, must be a count for each rank",
    ),
    "flags": (
        lambda: ops.apply_dense_(
            [torch.ones(N)], torch.zeros(N), torch.zeros(N + 1), 0.1, flags=torch.zeros(1)
        ),
        TypeError,
        "flags: got torch.float32, must be torch.int32",
    ),
    "skip dtype": (
        lambda: ops.merge(payload().unsqueeze(0), N, K, WIRE, skip=torch.zeros(1)),
        TypeError,
        "skip: got torch.float32, must be torch.int32",
    ),
    "aggregate of a size that none has": (
        lambda: ops.densify(torch.cat([aggregate(), torch.zeros(1, dtype=torch.uint8)]), N),
        ValueError,
        "aggregate: got damaged bytes",
    ),
    "params of another size": (
        lambda: ops.apply_([torch.zeros(N - 1)], aggregate(), 0.1),
        ValueError,
        "aggregate: got one for 100 elements, must be for 99",
    ),
    "params not contiguous": (
        lambda: ops.apply_([torch.zeros(10, 10).t()], aggregate(), 0.1),
        ValueError,
        r"params\[0\]: got a non-contiguous tensor",
    ),
    "lr": (
        lambda: ops.apply_([torch.zeros(N)], aggregate(), None),
        TypeError,
        "lr: got NoneType, must be a number or a tensor",
    ),
    "numel": (
        lambda: ops.payload_nbytes(2**31, 1, WIRE),
        ValueError,
        "numel: got 2147483648 elements, must be between 1 and",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message(case):
    call, exception, words = CASES[case]
    with pytest.raises(exception, match=words):
        call()


def test_an_error_changes_nothing():
    memory, buffer = torch.ones(N), torch.ones(N)
    with pytest.raises(ValueError):
        ops.compress_(memory, [torch.ones(N)], K, momentum_buffer=buffer, weight_decay=0.1)
    for wrong in ({"tag": -1}, {"memory_decay": 3.0}):
        with pytest.raises(ValueError):
            reference.compress_(memory, [torch.ones(N)], K, momentum_buffer=buffer, **wrong)
    assert torch.equal(memory, torch.ones(N))
    assert torch.equal(buffer, torch.ones(N))


def test_the_operators_themselves_check_too():
    """Without gmc_cuda.ops the kind of an error is a word of its text."""
    memory, momentum = torch.zeros(N), torch.tensor(0.9)
    with pytest.raises(RuntimeError, match=r"^ValueError: k: got 0, must be between 1 and"):
        torch.ops.gmc_cuda.compress_(memory, [torch.ones(N)], 0, momentum=momentum, wire_dtype=WIRE)
    with pytest.raises(RuntimeError, match=r"^TypeError: wire_dtype: got torch\.Char"):
        torch.ops.gmc_cuda.payload_nbytes(N, K, torch.int8)
    with pytest.raises(RuntimeError, match=r"^ValueError: tag: got -1, must be between 0 and"):
        torch.ops.gmc_cuda.compress_(
            memory, [torch.ones(N)], K, momentum=momentum, wire_dtype=WIRE, tag=-1
        )


def test_other_errors_pass_unchanged():
    damaged = payload()
    damaged[0] ^= 1
    with pytest.raises(RuntimeError, match="^payload of rank 0 is damaged") as raised:
        ops.unpack(damaged, N, K, WIRE)
    assert type(raised.value) is RuntimeError


@pytest.mark.skipif(build_config["with_cuda"], reason="this build has CUDA kernels")
@pytest.mark.parametrize("name", ["sparsify", "densify"])
def test_a_build_without_cuda_says_so(name):
    """What is registered for CUDA tensors, called with tensors of the CPU."""
    arguments = {"sparsify": (torch.ones(N),), "densify": (ops.sparsify(torch.ones(N)), N)}[name]
    operator = getattr(torch.ops.gmc_cuda, name).default
    with pytest.raises(RuntimeError, match=f"NotImplementedError: {name}: this build of gmc_cuda"):
        operator._op_dk(torch._C.DispatchKey.CUDA, *arguments)
