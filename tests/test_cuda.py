"""The operators on CUDA tensors: the same bytes as the CPU ops; graphs, streams, no waiting."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from gmc_cuda import ops
from support.cases import (
    DTYPES,
    NUMELS,
    RANGES,
    VALUES,
    WIRES,
    Call,
    assert_same_bytes,
    ks,
    payloads_of,
    range_payloads,
    sample_call,
)
from support.payload_sections import aggregate_flags
from support.sampling import misleading


def missing():
    """Why these tests cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        ops.sparsify(torch.zeros(1, device="cuda"))
    except NotImplementedError as error:
        return str(error)
    return None


@pytest.fixture(scope="module", autouse=True)
def gpu():
    reason = missing()
    if reason:
        pytest.skip(reason)


pytestmark = pytest.mark.gpu


def on_gpu(value):
    """A copy on the GPU that lies as far from an aligned address as the original."""
    if isinstance(value, (list, tuple)):
        return [on_gpu(item) for item in value]
    if isinstance(value, dict):
        return {name: on_gpu(item) for name, item in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    if value.dim() == 0:
        return value.cuda()
    offset = value.storage_offset() % 8
    room = torch.empty(value.numel() + offset, dtype=value.dtype, device="cuda")
    room[offset:] = value.reshape(-1)
    return room[offset:].view(value.shape)


def gpu_call(call: Call) -> Call:
    return Call(
        on_gpu(call.memory),
        on_gpu(call.grads),
        call.k,
        on_gpu(call.aggregate),
        on_gpu(call.momentum_buffer),
        on_gpu(call.options),
    )


def assert_backends_agree(call: Call, state=None):
    mine, theirs = gpu_call(call), call.copy()
    payload = mine.run(ops, state)
    mine.assert_same(theirs, payload, theirs.run(ops))
    return payload


@pytest.mark.parametrize("values", VALUES)
def test_compress_equals_cpu(values):
    for seed, n in enumerate(NUMELS):
        for k in ks(n):
            assert_backends_agree(sample_call(seed * 1000 + k, values, n, k))


@pytest.mark.parametrize("values", VALUES)
def test_dense_ops_equals_cpu(values):
    for seed, n in enumerate((*NUMELS, 1_000_003)):
        ranks = seed % 3 + 1
        call = sample_call(seed, values, n, 1)
        mine, theirs = gpu_call(call), call.copy()
        total, expected = (side.accumulate(ops, 0, ranks) for side in (mine, theirs))
        mine.assert_same(theirs, total, expected)
        for skip in (1, 0):
            flag = torch.tensor([skip], dtype=torch.int32)
            params = call.options["params"]
            moved = on_gpu(params)
            ops.apply_dense_(moved, mine.memory, total, 0.1, skip=flag.cuda())
            ops.apply_dense_(params, theirs.memory, expected, 0.1, skip=flag)
            mine.assert_same(theirs, total, expected)
            for one, other in zip(moved, params, strict=True):
                assert_same_bytes(one, other, "params")


@pytest.mark.parametrize(("ranges", "numel", "width", "k", "last_k"), RANGES)
def test_merge_ranges_equals_cpu(ranges, numel, width, k, last_k):
    for seed, wire in enumerate(WIRES):
        payloads = range_payloads(ranges, numel, width, k, last_k, wire, seed)
        for skip in (0, 1):
            flag = torch.tensor([skip], dtype=torch.int32)
            mine, theirs = (
                ops.merge_ranges(where, numel, width, k, last_k, wire, skip=its_flag)
                for where, its_flag in ((payloads.cuda(), flag.cuda()), (payloads, flag))
            )
            dense = [ops.densify(aggregate, numel) for aggregate in (mine, theirs)]
            assert_same_bytes(*dense, "densified")
            assert bool(dense[1].any()) != bool(skip)


@pytest.mark.parametrize("n", [1_000_003, 4096 * 1024 * 2 + 17])
def test_compress_equals_cpu_at_size(n):
    """Several tiles to a group, several rounds of the last kernel."""
    for seed, k in enumerate((n // 1000, n // 100, n // 3)):
        assert_backends_agree(sample_call(seed, "gaussian", n, k))


@pytest.mark.parametrize("factor", [0.0, 0.01, 1.0, 100.0])
def test_whatever_comes_of_the_guess(factor):
    """Too few candidates, too many, or as they should be."""
    n, k = 300_000, 3000
    state = ops.select_state(n, k, "cuda")
    torch.manual_seed(0)
    for _ in range(3):
        gradient = misleading(torch.randn(n), k, factor)
        memory, expected = torch.zeros(n, device="cuda"), torch.zeros(n)
        payload = ops.compress_(memory, [gradient.cuda()], k, state=state)
        assert_same_bytes(payload, ops.compress_(expected, [gradient], k), "payload")
        assert_same_bytes(memory, expected, "memory")
    assert ops.repairs(state) == (0 if factor == 1.0 else 3)


def test_scales_that_jump():
    n, k = 300_000, 3000
    state = ops.select_state(n, k, "cuda")
    torch.manual_seed(0)
    memory, expected = torch.zeros(n, device="cuda"), torch.zeros(n)
    for scale in [1.0, 1.0, 10.0, 2.0, 0.3, 3.0, 1.0, 0.1, 0.0, 0.0, 1.0] * 3:
        gradient = scale * torch.randn(n)
        payload = ops.compress_(memory, [gradient.cuda()], k, state=state)
        assert_same_bytes(payload, ops.compress_(expected, [gradient], k), "payload")
        assert_same_bytes(memory, expected, "memory")
    assert ops.repairs(state) <= 1


def test_many_tensors():
    """More than travel in a kernel's parameters."""
    torch.manual_seed(1)
    sizes = torch.randint(1, 900, (700,)).tolist()
    n = sum(sizes)
    params = [torch.randn(size).to(DTYPES[i % 3]) for i, size in enumerate(sizes)]
    grads = [
        None if i % 50 == 7 else torch.randn(size).to(DTYPES[(i + 1) % 3])
        for i, size in enumerate(sizes)
    ]
    options = {"params": params, "weight_decay": 0.1, "wire_dtype": torch.float16}
    assert_backends_agree(Call(torch.randn(n), grads, n // 100, torch.randn(n), None, options))
    aggregate = torch.randn(n) * (torch.rand(n) < 0.1)
    moved = on_gpu(params)
    ops.apply_(moved, ops.sparsify(aggregate.cuda()), 0.1)
    ops.apply_(params, ops.sparsify(aggregate), 0.1)
    for mine, theirs in zip(moved, params, strict=True):
        assert_same_bytes(mine, theirs, "params")


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(
    "ranks,n,k,crowded",
    [
        (1, 1, 1, False),
        (2, 900, 900, False),
        (8, 200_000, 2000, False),
        (8, 200_000, 5000, True),
        (67, 70_000, 700, False),
        (3, 140_001, 70, False),
    ],
)
def test_everything_else_equals_cpu(ranks, n, k, crowded, wire):
    torch.manual_seed(ranks)
    payloads = payloads_of(ranks, n, k, wire, crowded=crowded)
    for skip in (None, 0, 1):
        flag = None if skip is None else torch.tensor([skip], dtype=torch.int32)
        aggregate = ops.merge(payloads.cuda(), n, k, wire, skip=on_gpu(flag))
        expected = ops.merge(payloads, n, k, wire, skip=flag)
        assert aggregate.numel() == expected.numel()
        assert_same_bytes(ops.densify(aggregate, n), ops.densify(expected, n), "aggregate")
        assert_same_bytes(ops.densify(aggregate.cpu(), n), ops.densify(expected, n), "read on CPU")
        for dtype in DTYPES:
            param = torch.randn(n).to(dtype)
            moved, memory = param.cuda(), torch.randn(n)
            given_back = memory.cuda()
            flags = torch.zeros(1, dtype=torch.int32, device="cuda")
            own = {"k": k, "wire_dtype": wire}
            lr = torch.tensor(0.1, device="cuda")
            own_cuda = own | {"memory": given_back, "payload": payloads[0].cuda()}
            ops.apply_([moved], aggregate, lr, skip=on_gpu(flag), flags=flags, **own_cuda)
            ops.apply_([param], expected, 0.1, skip=flag, memory=memory, payload=payloads[0], **own)
            assert_same_bytes(moved, param, "params")
            assert_same_bytes(given_back, memory, "memory")
            assert flags.item() == 0
        for op in (ops.restore_, ops.mask_):
            theirs = torch.randn(n)
            mine = theirs.cuda()
            op(mine, payloads[0].cuda(), k, wire, skip=on_gpu(flag))
            op(theirs, payloads[0], k, wire, skip=flag)
            assert_same_bytes(mine, theirs, op.__name__)
    for mine, theirs in zip(
        ops.unpack(payloads[0].cuda(), n, k, wire), ops.unpack(payloads[0], n, k, wire), strict=True
    ):
        assert_same_bytes(mine, theirs, "unpack")
    assert ops.verdict([payloads.cuda()]).item() == 0
    payloads[-1, 4] = 1
    assert ops.verdict([payloads.cuda()] * 200).item() == 1
    assert ops.unpack(payloads[-1].cuda(), n, k, wire)[2].item() == 1
    skipped = ops.merge(payloads.cuda(), n, k, wire, skip=torch.ones(1, device="cuda").int())
    assert aggregate_flags(skipped) == ops.NONFINITE


@pytest.mark.parametrize("wire", WIRES)
def test_damaged_payloads(wire):
    """Called damaged where the CPU op raises; the next step and the device go on."""
    n, k = 66_000, 12
    torch.manual_seed(2)
    payloads = payloads_of(2, n, k, wire)
    for byte in range(payloads.size(1)):
        broken = payloads.clone()
        broken[1, byte] ^= 0xFF
        aggregate = ops.merge(broken.cuda(), n, k, wire)
        try:
            expected = ops.densify(ops.merge(broken, n, k, wire), n)
        except RuntimeError:
            expected = torch.zeros(n)
            assert aggregate_flags(aggregate) & ops.DAMAGED, byte
            flags = torch.zeros(1, dtype=torch.int32, device="cuda")
            ops.apply_([torch.zeros(n, device="cuda")], aggregate, 0.1, flags=flags)
            assert flags.item() == ops.DAMAGED, byte
        assert_same_bytes(ops.densify(aggregate, n), expected, f"byte {byte}")
        memory = torch.zeros(n, device="cuda")
        ops.restore_(memory, broken[1].cuda(), k, wire)
        assert bool(memory.isfinite().all())
        assert ops.verdict([broken.cuda()]).item() == ops.verdict([broken]).item()


def test_verdict_over_tags_equals_cpu():
    """More ranks than a warp has lanes, and more buckets than a launch takes."""
    torch.manual_seed(9)
    payload = ops.compress_(torch.zeros(900), [torch.randn(900)], 9)
    for ranks, buckets in [(1, 1), (2, 1), (8, 3), (70, 1), (300, 2), (3, 200)]:
        for choices in ([7], [7, ops.CALLED_OFF], [7, 8], [7, 8, ops.CALLED_OFF]):
            tags = torch.tensor(choices)[torch.randint(len(choices), (buckets, ranks))]
            words = tags.to(torch.int32).unsqueeze(-1).view(torch.uint8)
            sparse = payload.repeat(buckets, ranks, 1)
            sparse[:, :, 20:24] = words
            sparse[-1, 0, 0] ^= ranks % 2  # a damaged header's tag does not count
            dense = torch.cat([torch.zeros(buckets, ranks), tags.float()], 1)
            for args in ([list(sparse), []], [[], list(dense)], [list(sparse), list(dense)]):
                flags = torch.zeros(1, dtype=torch.int32, device="cuda")
                skip = ops.verdict(*on_gpu(args))
                expected = ops.verdict(*args).item()
                assert skip.item() == expected, (ranks, buckets, choices)
                w, total = torch.ones(9, device="cuda"), torch.zeros(10, device="cuda")
                ops.apply_dense_(
                    [w], torch.zeros(9, device="cuda"), total, 1.0, skip=skip, flags=flags
                )
                assert flags.item() == expected


def test_capture_and_replay_of_compress():
    n, k = 200_000, 2000
    torch.manual_seed(3)
    memory, gradient = torch.zeros(n, device="cuda"), torch.randn(n, device="cuda")
    scale = torch.tensor(2.0, device="cuda")
    state = ops.select_state(n, k, "cuda")
    expected = torch.zeros(n)

    def run():
        return ops.compress_(memory, [gradient], k, state=state, grad_scale=scale)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    ops.compress_(expected, [gradient.cpu()], k, grad_scale=2.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        payload = run()
    for step in range(4):
        gradient.copy_(torch.randn(n) * (1 + step % 2 * 100))  # replays with and without repair
        scale.fill_(1.0 + step)
        graph.replay()
        cpu = ops.compress_(expected, [gradient.cpu()], k, grad_scale=1.0 + step)
        assert_same_bytes(payload, cpu, "payload")
        assert_same_bytes(memory, expected, "memory")


def test_capture_at_each_k():
    """One state, large enough for the largest k, in graphs of several."""
    n = 200_000
    torch.manual_seed(3)
    memory, expected = torch.zeros(n, device="cuda"), torch.zeros(n)
    gradient = torch.randn(n, device="cuda")
    state = ops.select_state(n, 20_000, "cuda")
    ops.compress_(torch.zeros_like(memory), [gradient], 20_000, state=state)
    graphs = {}
    for k in (20_000, 2000, 200):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graphs[k] = graph, ops.compress_(memory, [gradient], k, state=state)
    for k in (20_000, 2000, 200, 200, 2000, 20_000):
        gradient.normal_()
        graph, payload = graphs[k]
        graph.replay()
        assert_same_bytes(payload, ops.compress_(expected, [gradient.cpu()], k), "payload")
        assert_same_bytes(memory, expected, "memory")
    assert ops.repairs(state) <= 1


def test_capture_without_state_and_with_many_tensors():
    """Temporaries come from torch's allocator, and the table of tensors from the graph itself."""
    torch.manual_seed(4)
    grads = [torch.randn(50, device="cuda") for _ in range(600)]
    n = 50 * len(grads)
    memory, expected = torch.zeros(n, device="cuda"), torch.zeros(n)
    ops.compress_(torch.zeros_like(memory), grads, 300)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        payload = ops.compress_(memory, grads, 300)
    for _ in range(2):
        for gradient in grads:
            gradient.normal_()
        graph.replay()
        cpu = ops.compress_(expected, [gradient.cpu() for gradient in grads], 300)
        assert_same_bytes(payload, cpu, "payload")
        assert_same_bytes(memory, expected, "memory")


def test_capture_and_replay_of_merge_and_apply():
    ranks, n, k = 4, 150_000, 1500
    torch.manual_seed(5)
    payloads = payloads_of(ranks, n, k, torch.bfloat16)
    static = payloads.cuda()
    param = torch.randn(n, device="cuda")
    expected = param.cpu()
    lr = torch.tensor(0.1, device="cuda")

    def run():
        skip = ops.verdict([static])
        ops.apply_([param], ops.merge(static, n, k, skip=skip), lr, skip=skip)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    ops.apply_([expected], ops.merge(payloads, n, k), 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for step in range(4):
        payloads = payloads_of(ranks, n, k, torch.bfloat16, seed=step)
        payloads[1, 4] = step == 2  # a skipped step
        static.copy_(payloads)
        lr.fill_(0.1 * step)
        graph.replay()
        if step != 2:
            ops.apply_([expected], ops.merge(payloads, n, k), lr.cpu())
        assert_same_bytes(param, expected, "params")


def test_two_streams():
    """Buckets on two streams at once share nothing."""
    n, k = 3_000_000, 30_000
    torch.manual_seed(6)
    streams = [torch.cuda.Stream() for _ in range(2)]
    gradients = [[torch.randn(n) for _ in range(4)] for _ in streams]
    on_device = on_gpu(gradients)
    memories = [torch.zeros(n, device="cuda") for _ in streams]
    states = [ops.select_state(n, k, "cuda"), None]
    payloads = [[], []]
    torch.cuda.synchronize()
    for step in range(4):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                payloads[i].append(
                    ops.compress_(memories[i], [on_device[i][step]], k, state=states[i])
                )
    torch.cuda.synchronize()
    for i in range(2):
        expected = torch.zeros(n)
        for step in range(4):
            cpu = ops.compress_(expected, [gradients[i][step]], k)
            assert_same_bytes(payloads[i][step], cpu, "payload")
        assert_same_bytes(memories[i], expected, "memory")


def test_no_op_waits_for_the_device():
    n, k = 100_000, 1000
    torch.manual_seed(7)
    payloads = payloads_of(2, n, k, torch.bfloat16).cuda()
    call = gpu_call(sample_call(1, "gaussian", n, k))
    scale = torch.tensor(2.0, device="cuda")
    call.options |= {"grad_scale": scale}
    param, memory = torch.randn(n, device="cuda"), torch.zeros(n, device="cuda")
    found_inf = torch.zeros(1, device="cuda")
    state = ops.select_state(n, k, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.run(ops)
        for _ in range(3):
            payload = ops.compress_(memory, [param], k, state=state, found_inf=found_inf)
        skip = ops.verdict([payloads])
        aggregate = ops.merge(payloads, n, k, skip=skip)
        ops.apply_([param], aggregate, 0.1, skip=skip)
        ops.restore_(memory, payload, k, skip=skip)
        ops.mask_(memory, payload, k, skip=skip)
        ops.unpack(payload, n, k)
        ops.densify(ops.sparsify(memory), n)
        total = ops.accumulate_(memory, [param], ranks=2, grad_scale=scale, found_inf=found_inf)
        skip = ops.verdict([payloads], [total[n:]])
        ops.apply_dense_([param], memory, total[: n + 1], 0.1, skip=skip, flags=skip.clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_other_device_is_current():
    """Ops run on their tensors' device, whichever is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    torch.manual_seed(8)
    gradient = torch.randn(10_000)
    with torch.cuda.device(0):
        memory = torch.zeros(10_000, device="cuda:1")
        payload = ops.compress_(memory, [gradient.to("cuda:1")], 100)
    assert_same_bytes(payload, ops.compress_(torch.zeros(10_000), [gradient], 100), "payload")


@pytest.mark.parametrize("k", [1, 2_147_484, 40_000_000])
def test_largest_bucket(k):
    """2**31 - 1 elements: k of them, none smaller than one that stayed."""
    n = 2**31 - 1
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    gradient = torch.empty(n, dtype=torch.bfloat16, device="cuda")
    state = ops.select_state(n, k, "cuda")
    memory = torch.zeros(n, device="cuda")
    for seed in range(2):  # without a guess, then with one
        gradient.normal_(generator=torch.Generator("cuda").manual_seed(seed))
        gradient[-1] = 100.0
        payload = ops.compress_(memory, [gradient], k, wire_dtype=torch.float32, state=state)
        indices, values, nonfinite = ops.unpack(payload, n, k, torch.float32)
        assert nonfinite.item() == 0
        assert int(indices[-1]) == n - 1
        assert bool((indices[1:] > indices[:-1]).all())
        assert not bool(memory[indices].any())
        largest = max(float(part.abs().max()) for part in memory.split(2**28))
        assert float(values.abs().min()) >= largest
    aggregate = ops.merge(payload.unsqueeze(0), n, k, torch.float32)
    del memory, state
    ops.apply_([gradient], aggregate, 1.0)
    assert int(gradient[-1].float()) == 100 - int(values[-1])


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(("n", "width"), [(1_000_003, 250_008), (70_000, 8), (300_000, 300_000)])
def test_ranges_in_one_chain_of_launches(n, width, wire):
    ranges = -(-n // width)
    k, last_k = max(1, width // 100), max(1, (n - (ranges - 1) * width) // 100)
    cut = {"width": width, "last_k": last_k, "wire_dtype": wire}
    sides = {}
    for device in ("cpu", "cuda"):
        state = ops.select_state(width, k, device, ranges=ranges)
        memory, payloads = torch.zeros(n, device=device), []
        for seed in range(3):
            torch.manual_seed(seed)
            gradient = torch.randn(n)
            gradient[seed] = float("nan")
            payloads.append(ops.compress_(memory, [gradient.to(device)], k, state=state, **cut))
        skip = torch.arange(ranges, dtype=torch.int32, device=device) % 2
        ops.restore_(memory, payloads[-1], k, skip=skip, **cut)
        sides[device] = [*payloads, memory]
    for mine, theirs in zip(sides["cuda"], sides["cpu"], strict=True):
        assert_same_bytes(mine, theirs, "a payload or memory")


EARLY_STARTS = """
import torch
from gmc_cuda import ops

torch.manual_seed(0)
n, k, digest = 1_000_000, 10_000, 0
memory, state = torch.zeros(n, device="cuda"), ops.select_state(n, k, "cuda")
gradients = [torch.randn(n, device="cuda") for _ in range(4)]
weights = torch.randint(1, 1 << 20, (ops.payload_nbytes(n, k),), device="cuda")
total = torch.zeros((), dtype=torch.int64, device="cuda")
for step in range(20_000):
    scale = (1.0, 1.0, 1e-3, 1.0, 1.0, 1e3, 0.0)[step % 7]  # good guesses and bad ones
    payload = ops.compress_(memory, [gradients[step % 4] * scale], k, state=state)
    total = total * 31 + (payload * weights).sum()
print(int(total))
"""


def test_early_starts_change_nothing():
    """A kernel that began too early would now and then read what was not written yet."""
    said = {
        subprocess.run(
            [sys.executable, "-c", EARLY_STARTS], check=True, capture_output=True, text=True,
            env={**os.environ, "GMC_NO_EARLY_START": off}, timeout=60,
        ).stdout
        for off in ("0", "1")
    }  # fmt: skip
    assert len(said) == 1
