"""Nothing depends on torch's default dtype and device, which scripts set for their models."""

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import gmc_cuda
from gmc_cuda import ops, reference
from support.problems import flat, memory_of, parameters

PACKAGE = Path(gmc_cuda.__file__).parent
FACTORIES = {"arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros"}


def test_every_factory_call_names_dtype_and_device():
    unnamed = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            module = node.func.value
            if not (isinstance(module, ast.Name) and module.id == "torch"):
                continue
            if node.func.attr in FACTORIES and not {"dtype", "device"} <= {
                keyword.arg for keyword in node.keywords
            }:
                unnamed.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not unnamed


DEFAULTS = ["float64", "bfloat16", "float16", "meta"]


@contextmanager
def defaults(name):
    """Within it new tensors are of this dtype, or on the device that computes nothing."""
    if name == "meta":
        with torch.device("meta"):
            yield
        return
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


PARAMETERS = [p.detach() for p in parameters()]
GRADIENTS = [[torch.randn_like(p) for p in PARAMETERS] for _ in range(4)]


def results(make, **options):
    params = [torch.nn.Parameter(p.clone()) for p in PARAMETERS]
    optimizer = make(params, lr=0.1, density=0.1, weight_decay=0.01, **options)
    for step, grads in enumerate(GRADIENTS):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        params[1].grad = None if step == 2 else params[1].grad
        optimizer.step()
        optimizer.stats()
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    return flat(params), memory_of(optimizer, params), saved["state"][0]["momentum_buffer"]


CASES = [
    (gmc_cuda.GMC, {}),
    (gmc_cuda.GMC, {"momentum_form": "buffer", "nesterov": True}),
    (gmc_cuda.GMC, {"overlap": True, "memory_decay": 0.9}),
    (gmc_cuda.DGC, {"clip_norm": 1.0}),
    (gmc_cuda.GMC, {"wire_dtype": torch.float4_e2m1fn_x2, "check_replicas_every": 1}),
]


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_steps_are_the_same_bits(case, name):
    make, options = CASES[case]
    wanted = results(make, **options)
    with defaults(name):
        found = results(make, **options)
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got.double(), want.double())


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("wire_dtype", reference.WIRE_DTYPES, ids=str)
def test_payloads_are_the_same_bytes(wire_dtype, name):
    memory, grad = (torch.randn(700, dtype=torch.float32) for _ in range(2))

    def payloads():
        return [
            layer.compress_(memory.clone(), [grad], 40, memory_decay=0.9, wire_dtype=wire_dtype)
            for layer in (ops, reference)
        ]

    wanted = payloads()
    with defaults(name):
        found = payloads()
        values = reference.unpack(found[1], 700, 40, wire_dtype)[1]
    assert values.dtype == torch.float32
    assert values.is_cpu
    for payload in found:
        assert torch.equal(payload, wanted[0])
        assert torch.equal(payload, wanted[1])
