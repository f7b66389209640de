"""The operators against the reference, a float64 oracle and closed forms."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gmc_cuda import ops, reference
from support.cases import (
    DTYPES,
    NUMELS,
    VALUES,
    WIRES,
    Call,
    assert_same_bytes,
    ks,
    payloads_of,
    range_payloads,
    sample_call,
)  # fmt: skip
from support.payload_sections import aggregate_flags, nonfinite_counts


def assert_backends_agree(call: Call, state=None):
    mine, payload = call.run_on_both(state)
    assert mine.memory.isfinite().all()
    return payload


@pytest.mark.parametrize("values", VALUES)
def test_compress_equals_reference(values):
    for seed, n in enumerate(NUMELS):
        for k in ks(n):
            assert_backends_agree(sample_call(seed * 1000 + k, values, n, k))


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    values=st.sampled_from(sorted(VALUES)),
    n=st.integers(1, 3000),
    share=st.floats(0, 1),
)
def test_compress_equals_reference_on_anything(seed, values, n, share):
    assert_backends_agree(sample_call(seed, values, n, max(1, int(share * n))))


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("n,k", [(1, 1), (1000, 1), (1000, 10), (1000, 1000), (70_001, 700)])
def test_selection_equals_float64_oracle(values, n, k):
    vector = VALUES[values](n)
    memory = torch.zeros(n)
    payload = ops.compress_(memory, [vector], k, wire_dtype=torch.float32)
    magnitude = vector.double().abs().tolist()
    oracle = sorted(sorted(range(n), key=lambda i: (-magnitude[i], i))[:k])
    indices, sent, nonfinite = ops.unpack(payload, n, k, torch.float32)
    assert indices.tolist() == oracle
    assert torch.equal(sent, vector[indices] + 0.0)
    assert nonfinite == 0
    assert torch.equal(memory.index_put((indices,), sent), vector + 0.0)


@pytest.mark.parametrize("values", VALUES)
def test_guess_decides_only_the_speed(values):
    """The same state through changes of scale."""
    n, k = 140_001, 1400
    state = ops.select_state(n, k, "cpu")
    for seed, scale in enumerate([1, 1, 1, 1e-3, 1e3, 1, 0, 1, 1e30, 1e-30]):
        call = sample_call(seed, values, n, k)
        call.memory.mul_(scale)
        for grad in call.grads:
            if grad is not None:
                grad.mul_(scale)
        assert_backends_agree(call, state)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_share_the_work_without_changing_it(threads):
    torch.set_num_threads(threads)
    for seed, values in enumerate(VALUES):
        n = 65536 * 5 + 4321
        call = sample_call(seed, values, n, n // 50)
        payload = assert_backends_agree(call)
        aggregate = ops.merge(payload.unsqueeze(0), n, call.k, call.options["wire_dtype"])
        indices, sent, _ = ops.unpack(payload, n, call.k, call.options["wire_dtype"])
        assert torch.equal(ops.densify(aggregate, n)[indices], sent + 0.0)
        params = [torch.zeros(n - 9), torch.zeros(9)]
        ops.apply_(params, aggregate, 1.0)
        assert torch.equal(torch.cat(params), -ops.densify(aggregate, n) + 0.0)


def test_guess_holds_on_steady_data():
    n, k = 200_000, 2000
    state = ops.select_state(n, k, "cpu")
    for _ in range(20):
        ops.compress_(torch.randn(n), [torch.randn(n)], k, state=state)
    assert ops.repairs(state) == 0


@settings(max_examples=60)
@given(st.lists(st.integers(-100, 100), min_size=2, max_size=300), st.data())
def test_nothing_is_lost_on_integers(integers, data):
    """Invariant 6: memory + sent = what came in, exactly."""
    n = len(integers)
    k = data.draw(st.integers(1, n))
    gradient = torch.tensor(integers, dtype=torch.float32)
    memory = torch.arange(n, dtype=torch.float32)
    before = memory.clone()
    wire = data.draw(st.sampled_from(WIRES))
    payload = ops.compress_(memory, [gradient], k, wire_dtype=wire)
    sent = ops.densify(ops.merge(payload.unsqueeze(0), n, k, wire), n)
    assert torch.equal(memory + sent, before + gradient)


def test_wire_saturates_and_memory_keeps_the_rest():
    memory = torch.zeros(2)
    payload = ops.compress_(memory, [torch.tensor([1e6, -1e-6])], 2, wire_dtype=torch.float16)
    _, sent, _ = ops.unpack(payload, 2, 2, torch.float16)
    assert sent.tolist() == [65504.0, pytest.approx(-1e-6, rel=0.1)]
    assert memory[0] == 1e6 - 65504


def test_conversions_equal_torch():
    """Wire values (saturated), parameters (to infinity) and gradients, bit for bit."""
    x = torch.randint(-(2**31), 2**31, (20_000,)).to(torch.int32)
    x[:10_000] = (x[:10_000] & 0x07FFFFFF) + 0x34000000  # around the range of float16
    x[5000:10_000] = -x[5000:10_000].view(torch.float32).view(torch.int32)
    x = x.view(torch.float32)
    x = x[x.isfinite()]
    x[:5] = torch.tensor([65519.99, 65520.0, -65520.0, 2.0**-25, 0.0])
    n = x.numel()
    for dtype in DTYPES[1:]:
        payload = ops.compress_(torch.zeros(n), [x], n, wire_dtype=dtype)
        _, sent, _ = ops.unpack(payload, n, n, dtype)
        assert_same_bytes(sent, reference.encode(x + 0.0, dtype).float(), f"{dtype} on the wire")
        param = torch.zeros(n, dtype=dtype)
        ops.apply_dense_([param], torch.zeros(n), torch.cat([x, torch.zeros(1)]), -1.0)
        assert_same_bytes(param, (x + 0.0).to(dtype), f"{dtype} parameters")
        every = torch.arange(2**16).to(torch.int16).view(dtype)
        total = ops.accumulate_(torch.zeros(2**16), [every])[:-1]
        exact = every.float()
        assert_same_bytes(total, torch.where(exact.isfinite(), exact, 0.0) + 0.0, f"{dtype} read")


FLOAT4_LEVELS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FLOAT8_LEVELS = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().tolist()


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**31),
    exponent=st.integers(-120, 120),
    spread=st.sampled_from([0.0, 1.0, 10.0, 60.0]),
)
@pytest.mark.parametrize(
    "wire,levels",
    [(torch.float8_e4m3fn, FLOAT8_LEVELS), (torch.float4_e2m1fn_x2, FLOAT4_LEVELS)],
)
def test_small_values_are_the_nearest_levels(wire, levels, seed, exponent, spread):
    """Each value sent is the level nearest to it, ties to the even one, in float64 arithmetic."""
    torch.manual_seed(seed)
    n = 257
    x = torch.randn(n) * 2.0 ** (spread * torch.rand(n)) * 2.0**exponent
    x[::5] = x[::5].sign() * 2.0**exponent * torch.tensor(1.25)  # halves between levels
    x = torch.where(x.isfinite(), x, 1.0)
    memory = torch.zeros(n)
    payload = ops.compress_(memory, [x], n, wire_dtype=wire)
    _, sent, _ = ops.unpack(payload, n, n, wire)
    scale = int(payload[16:20].view(torch.int32))
    grid = torch.tensor(levels, dtype=torch.float64) * 2.0**scale
    magnitude = x.double().abs().clamp(max=grid[-1])
    distance = (magnitude[:, None] - grid).abs()
    nearest = distance.min(1)
    odd = (nearest.indices % 2 == 1) & (nearest.indices + 1 < len(levels))
    tie = odd & (distance.gather(1, (nearest.indices + odd)[:, None])[:, 0] == nearest.values)
    expected = grid[nearest.indices + tie] * x.double().sign()
    assert torch.equal(sent.double(), expected)
    assert_same_bytes(memory, x - sent + 0.0, "memory")


@pytest.mark.parametrize(
    "wire,octaves,count,sent_as",
    [
        (torch.float8_e4m3fn, 6, 1, 2.0**6),  # never
        (torch.float4_e2m1fn_x2, 6, 3, 1.5),  # 1 in 256: the ones are 4 of 2**-2, and the largest 6
        (torch.float4_e2m1fn_x2, 6, 4, 2.0**6),  # more than may
        (torch.float4_e2m1fn_x2, 7, 3, 2.0**7),  # too far above the others
    ],
)
def test_which_values_saturate(wire, octaves, count, sent_as):
    x = torch.ones(1000)
    x[:count] = 2.0**octaves
    payload = ops.compress_(torch.zeros(1000), [x], 1000, wire_dtype=wire)
    _, sent, _ = ops.unpack(payload, 1000, 1000, wire)
    assert sent[0] == sent_as


@pytest.mark.parametrize("wire", WIRES[3:])
def test_what_saturates_does_not_pile_up(wire):
    """Entries that are always the largest by far: memory stays within a step's gradient."""
    n, k = 2000, 512
    memory, state = torch.zeros(n), ops.select_state(n, k, "cpu")
    gradient = torch.randn(n)
    gradient[:2] = 512.0
    for _ in range(400):
        ops.compress_(memory, [gradient], k, wire_dtype=wire, state=state)
    assert memory[:2].abs().max() <= 512 * 2


def test_float32_overflow_keeps_the_old_memory_and_is_counted():
    memory = torch.tensor([3e38, 1.0, float("nan")])
    payload = ops.compress_(memory, [torch.tensor([3e38, 1.0, 1.0])], 1, wire_dtype=torch.float32)
    indices, values, nonfinite = ops.unpack(payload, 3, 1, torch.float32)
    assert (indices.item(), nonfinite.item()) == (0, 2)
    assert values.item() == torch.tensor(3e38)
    assert memory.tolist() == [0.0, 2.0, 0.0]


@pytest.mark.parametrize("decay", [1.0, 0.95, 1 / 3, 1e-39, 0.0, 1.02, 2.0])
@pytest.mark.parametrize("local", [False, True])
def test_memory_decay_is_a_product_before_the_rule(decay, local):
    """As memory.mul_(d) and then a call without it."""
    for seed in range(8):
        call = sample_call(seed, "gaussian", 3000, 100)
        call.momentum_buffer = torch.randn(3000) if local else None
        call.aggregate = None if local else torch.randn(3000)
        call.options["nesterov"] = local and seed % 2 == 0
        decayed, before = call.copy(), call.copy()
        decayed.options = call.options | {"memory_decay": decay}
        before.options = call.options | {"memory_decay": 1.0}
        before.memory.mul_(decay)
        for run in (lambda side: side.run(ops), lambda side: side.accumulate(ops, 0, 1)):
            mine, theirs = decayed.copy(), before.copy()
            mine.assert_same(theirs, run(mine), run(theirs))


@pytest.mark.parametrize("backend", [ops, reference])
@pytest.mark.parametrize("local", [False, True])
def test_what_overflows_does_not_decay(backend, local):
    memory = torch.tensor([3e38, 2.0, float("inf"), 4.0])
    buffer = torch.zeros(4) if local else None
    gradient = torch.tensor([3e38, 1.0, 1.0, float("nan")])
    rule = {"memory_decay": 0.5, "momentum": 1.0, "momentum_buffer": buffer}
    sent, dense = memory.clone(), memory.clone()
    payload = backend.compress_(sent, [gradient], 1, wire_dtype=torch.float32, **rule)
    indices, values, nonfinite = backend.unpack(payload, 4, 1, torch.float32)
    assert (indices.item(), values.item(), nonfinite.item()) == (0, torch.tensor(3e38).item(), 3)
    assert sent.tolist() == [0.0, 2.0, 0.0, 2.0]
    if local:
        assert buffer.tolist() == [0.0, 1.0, 0.0, 0.0]
        buffer.zero_()
    total = backend.accumulate_(dense, [gradient], **rule)
    assert dense.tolist() == [torch.tensor(3e38).item(), 2.0, 0.0, 2.0]
    assert total.tolist() == [*dense.tolist(), 3.0]


def test_the_guess_knows_of_memory_decay():
    """With memory far above the gradient, a sample that forgot it would be far too high."""
    n, k = 200_000, 2000
    state = ops.select_state(n, k, "cpu")
    for _ in range(5):
        ops.compress_(100 * torch.randn(n), [torch.randn(n)], k, memory_decay=0.01, state=state)
    assert ops.repairs(state) == 0


def test_payload_sizes():
    for wire, percent, permille in [
        (torch.bfloat16, 3.2, 3.75),
        (torch.float8_e4m3fn, 2.2, 2.75),
        (torch.float4_e2m1fn_x2, 1.7, 2.25),
    ]:
        assert ops.payload_nbytes(10**8, 10**6, wire) <= percent * 1e6
        assert ops.payload_nbytes(10**8, 10**5, wire) <= permille * 1e5
    for n, wire in itertools.product(NUMELS, WIRES):
        for k in ks(n):
            assert ops.payload_nbytes(n, k, wire) == reference.payload_nbytes(n, k, wire)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize(
    "p,n,k", [(1, 100, 3), (3, 70_000, 700), (8, 5000, 5000), (2, 1, 1), (2, 140_000, 3000)]
)
def test_merge_apply_restore_mask_equal_reference(p, n, k, wire, crowded):
    payloads = payloads_of(p, n, k, wire, seed=n, crowded=crowded)
    params = [torch.randn(n // 3).bfloat16(), torch.randn(n - n // 3 - n // 5)]
    params.append(torch.randn(n // 5).half())
    memory, buffer = torch.randn(n), torch.randn(n)
    outcomes = []
    for backend in (ops, reference):
        aggregate = backend.merge(payloads, n, k, wire)
        moved = [param.clone() for param in params]
        backend.apply_(moved, aggregate, 0.1)
        restored, masked = memory.clone(), buffer.clone()
        backend.restore_(restored, payloads[0], k, wire)
        backend.mask_(masked, payloads[0], k, wire)
        outcomes.append([backend.densify(aggregate, n), *moved, restored, masked])
    for name, mine, theirs in zip(
        ["aggregate", "params[0]", "params[1]", "params[2]", "memory", "buffer"],
        *outcomes,
        strict=True,
    ):
        assert_same_bytes(mine, theirs, name)


@pytest.mark.parametrize("values", VALUES)
def test_accumulate_equals_reference(values):
    for seed, n in enumerate(NUMELS):
        for ranks in (1, 3):
            call = sample_call(seed * 10 + ranks, values, n, 1)
            mine, theirs = call.copy(), call.copy()
            total = mine.accumulate(ops, ranks // 2, ranks)
            expected = theirs.accumulate(reference, ranks // 2, ranks)
            mine.assert_same(theirs, total, expected)
            assert_same_bytes(total[:n], mine.memory, "what is sent")


@pytest.mark.parametrize("absent", [False, True])
def test_a_gradient_with_the_negative_bit_has_its_sign(absent):
    """A view that torch negates when it is read, as conj() leaves it."""
    values = torch.randn(50)
    seen, others = torch._neg_view(values), [None if absent else torch.ones(9)]
    plain, params = [-values, *others], [torch.zeros(50), torch.zeros(9)]
    assert seen.is_neg()
    for operator, rest in ((ops.compress_, (7,)), (ops.accumulate_, ())):
        mine, theirs = torch.zeros(59), torch.zeros(59)
        sent = operator(mine, [seen, *others], *rest, params=params)
        expected = operator(theirs, plain, *rest, params=params)
        assert torch.equal(sent, expected)
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("values", ["gaussian", "heavy ties", "near overflow"])
def test_compress_and_accumulate_make_the_same_v(values):
    """With every entry sent in float32, the payload's values are v."""
    for seed in range(12):
        n = 3000
        call = sample_call(seed, values, n, n)
        call.options["wire_dtype"] = torch.float32
        sparse, dense = call.copy(), call.copy()
        payload = sparse.run(ops)
        total = dense.accumulate(ops, 1, 2)
        _, sent, nonfinite = ops.unpack(payload, n, n, torch.float32)
        assert_same_bytes(total[:n], sent, "v")
        assert total[n:].tolist() == [0.0, float(nonfinite)]


def test_count_of_a_dense_bucket_ends_where_float32_counts_on():
    n = 2**24 + 9
    gradient = torch.full((n,), float("nan"), dtype=torch.bfloat16)
    total = ops.accumulate_(torch.zeros(n), [gradient], rank=1, ranks=3)
    assert total[n:].tolist() == [0.0, 2.0**24, 0.0]
    assert total[:n].count_nonzero() == 0


@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize("n", [1, 9, 5000, 140_001])
def test_apply_dense_equals_reference(n, ranks):
    sizes = [n // 3, n // 5, n - n // 3 - n // 5]
    params = [torch.randn(size).to(dtype) for size, dtype in zip(sizes, DTYPES)]
    params[2][:3] = torch.tensor([-0.0, 65519.0, 1e-7])[: sizes[2]]
    memory = torch.randn(n)
    total = torch.cat([torch.randn(n) * 10 ** (8 * torch.rand(n) - 4), torch.zeros(ranks)])
    total[0] = -0.0
    for lr, skip in [(0.1, None), (torch.tensor(3e5), 0), (0.1, 1)]:
        flag = None if skip is None else torch.tensor([skip], dtype=torch.int32)
        outcomes = []
        for backend in (ops, reference):
            args = [param.clone() for param in params], memory.clone(), total.clone()
            backend.apply_dense_(*args, lr, skip=flag)
            outcomes.append([*args[0], *args[1:]])
        for mine, theirs in zip(*outcomes, strict=True):
            assert_same_bytes(mine, theirs, f"lr {lr}, skip {skip}")
        if skip:
            for param, moved in zip(params, outcomes[0], strict=False):
                assert_same_bytes(moved, param, "params of a skipped step")


def test_a_dense_bucket_is_momentum_sgd():
    """accumulate_, sum and apply_dense_ against torch.optim.SGD, three ranks simulated."""
    ranks, n, lr, beta = 3, 4000, 0.25, 0.5
    params = [torch.randn(n - 100), torch.randn(100)]
    theirs = [param.clone().requires_grad_() for param in params]
    sgd = torch.optim.SGD(theirs, lr=lr, momentum=beta, weight_decay=0.125)
    memories, aggregate = [torch.zeros(n) for _ in range(ranks)], None
    for _ in range(5):
        gradients = torch.randint(-8, 8, (ranks, n)).float() * ranks
        totals = [
            ops.accumulate_(memory, gradient.split([n - 100, 100]), rank=rank, ranks=ranks,
                            momentum=beta, aggregate=aggregate, weight_decay=0.125, params=params)
            for rank, (memory, gradient) in enumerate(zip(memories, gradients, strict=True))
        ]  # fmt: skip
        total = sum(totals[1:], totals[0])
        for memory in memories[1:]:
            memory.zero_()
        ops.apply_dense_(params, memories[0], total, lr)
        aggregate = total[:n]
        for param, gradient in zip(theirs, gradients.mean(0).split([n - 100, 100]), strict=True):
            param.grad = gradient
        sgd.step()
        for mine, param in zip(params, theirs, strict=True):
            torch.testing.assert_close(mine, param.detach())


def test_threads_share_dense_buckets_without_changing_them():
    n = 65536 * 3 + 77
    call = sample_call(3, "gaussian", n, 1)
    outcomes = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        mine, params = call.copy(), [torch.ones(n - 9), torch.ones(9).bfloat16()]
        total = mine.accumulate(ops, 0, 1)
        ops.apply_dense_(params, mine.memory, total, 0.1)
        outcomes.append([total, mine.memory, *params])
    for one, three in zip(*outcomes, strict=True):
        assert_same_bytes(three, one, "with three threads")


def test_skip():
    n, k, wire = 1000, 10, torch.bfloat16
    payloads = payloads_of(2, n, k, wire)
    go, stop = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    assert ops.densify(ops.merge(payloads, n, k, wire, skip=stop), n).count_nonzero() == 0
    aggregate = ops.merge(payloads, n, k, wire, skip=go)
    assert ops.densify(aggregate, n).count_nonzero() > 0
    for operator, state in [
        (lambda x, skip: ops.apply_([x], aggregate, 1.0, skip=skip), go),
        (lambda x, skip: ops.restore_(x, payloads[0], k, wire, skip=skip), stop),
        (lambda x, skip: ops.mask_(x, payloads[0], k, wire, skip=skip), go),
    ]:
        vector = torch.ones(n)
        operator(vector, stop if state is go else go)
        assert torch.equal(vector, torch.ones(n))
        operator(vector, state)
        assert not torch.equal(vector, torch.ones(n))


@pytest.mark.parametrize(
    "ranges,numel,width,k,last_k",
    [(1, 7, 7, 2, 2), (3, 900, 304, 30, 28), (4, 70_000, 17_504, 170, 170),
     (2, 200_000, 131_072, 900, 300), (9, 600_000, 66_672, 1, 1), (30, 4000, 136, 136, 56)],
)  # fmt: skip
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("threads", [1, 3])
def test_ranges_side_by_side(ranges, numel, width, k, last_k, wire, threads):
    torch.set_num_threads(threads)
    payloads = range_payloads(ranges, numel, width, k, last_k, wire, seed=ranges)
    arguments = (payloads, numel, width, k, last_k, wire)
    aggregate = ops.merge_ranges(*arguments)
    expected = reference.densify(reference.merge_ranges(*arguments), numel)
    assert expected.any()
    assert_same_bytes(ops.densify(aggregate, numel), expected, "a")
    # The next step's pass finds entries by the run, and apply_ by the tile.
    memory, moved = torch.zeros(numel), torch.zeros(numel)
    ops.compress_(memory, [torch.zeros(numel)], 1, momentum=1.0, aggregate=aggregate)
    again = torch.zeros(numel)
    reference.compress_(
        again, [torch.zeros(numel)], 1, momentum=1.0, aggregate=reference.sparsify(expected)
    )
    assert_same_bytes(memory, again, "v")
    ops.apply_([moved], aggregate, -1.0)
    assert_same_bytes(moved, expected, "w")
    skip = torch.ones(1, dtype=torch.int32)
    assert not ops.densify(ops.merge_ranges(*arguments, skip=skip), numel).any()
    payloads[-1, 0] ^= 1
    with pytest.raises(RuntimeError, match=f"payload of rank {ranges - 1} is damaged"):
        ops.merge_ranges(*arguments)


def test_merge_into_an_older_aggregate():
    n, k, wire = 200_000, 2000, torch.bfloat16
    older, newer = payloads_of(2, n, k, wire, seed=1), payloads_of(2, n, k, wire, seed=2)
    aggregate = ops.merge(older, n, k, wire)
    assert ops.merge(newer, n, k, wire, out=aggregate) is aggregate
    expected = ops.densify(ops.merge(newer, n, k, wire), n)
    assert_same_bytes(ops.densify(aggregate, n), expected, "aggregate")
    skip = torch.ones(1, dtype=torch.int32)
    ops.merge(newer, n, k, wire, skip=skip, out=aggregate)
    assert not ops.densify(aggregate, n).any()
    for wrong in (aggregate[:-16].contiguous(), aggregate.view(torch.float32)):
        with pytest.raises((ValueError, TypeError), match="aggregate: got"):
            ops.merge(newer, n, k, wire, out=wrong)


@pytest.mark.parametrize("backend", [ops, reference])
def test_skipped_steps_are_counted(backend):
    counted, total, memory = torch.zeros(1, dtype=torch.int64), torch.ones(9), torch.ones(8)
    aggregate = backend.sparsify(torch.ones(8))
    for skip in (0, 1, 2):
        w = torch.ones(8)
        words = {"skip": torch.tensor([skip], dtype=torch.int32), "skipped_steps": counted}
        backend.apply_([w], aggregate, 0.5, **words)
        backend.apply_dense_([w], memory, total.clone(), 0.5, **words)
        assert torch.equal(w, torch.ones(8) if skip else torch.zeros(8))
        assert counted.item() == 2 * skip


@pytest.mark.parametrize("backend", [ops, reference])
def test_what_should_not_have_happened_is_kept(backend):
    aggregate, w = backend.sparsify(torch.ones(8)), torch.ones(8)
    moves = [
        lambda **words: backend.apply_([w], aggregate, 0.5, **words),
        lambda **words: backend.apply_dense_([w], torch.ones(8), torch.ones(9), 0.5, **words),
    ]
    for move in moves:
        for verdict in range(16):
            flags = torch.tensor([256], dtype=torch.int32)
            move(skip=torch.tensor([verdict], dtype=torch.int32), flags=flags)
            assert flags.item() == 256 | verdict & (ops.DAMAGED | ops.MISMATCH | ops.OFF)
            move(skip=torch.zeros(1, dtype=torch.int32), flags=flags)
            move(flags=flags)
            assert flags.item() == 256 | verdict & 14


@pytest.mark.parametrize("backend", [ops, reference])
def test_a_skipped_step_gives_back(backend):
    memory, w = torch.zeros(100), torch.ones(100)
    payload = ops.compress_(memory, [torch.arange(100.0)], 7)
    own = {"memory": memory, "payload": payload, "k": 7}
    for skip in (0, 1):
        flag = torch.tensor([skip], dtype=torch.int32)
        backend.apply_([w], backend.sparsify(torch.zeros(100)), 0.5, skip=flag, **own)
        assert torch.equal(memory, torch.arange(100.0) * (torch.arange(100) < 93 + 7 * skip))


def test_a_payload_needs_the_memory_it_came_from():
    memory, w = torch.zeros(100), torch.ones(100)
    payload, aggregate = ops.compress_(memory, [torch.ones(100)], 7), ops.sparsify(torch.ones(100))
    with pytest.raises(ValueError, match="memory: must be given together with payload"):
        ops.apply_([w], aggregate, 0.5, payload=payload, k=7)
    with pytest.raises(ValueError, match=r"payload: got shape \[\d+\], must be"):
        ops.apply_([w], aggregate, 0.5, memory=memory, payload=payload, k=20)
    with pytest.raises(ValueError, match=r"memory: got shape \[90\], must be \[100\]"):
        ops.apply_([w], aggregate, 0.5, memory=memory[:90], payload=payload, k=7)
    assert torch.equal(w, torch.ones(100))


def test_verdict():
    healthy = payloads_of(2, 1000, 10, torch.bfloat16)
    assert ops.verdict([healthy]).tolist() == [0]
    gradient = torch.ones(1000)
    gradient[5] = float("inf")
    sick = ops.compress_(torch.zeros(1000), [gradient], 10)
    gathered = torch.stack([healthy[0], sick])
    for backend in (ops, reference):
        assert backend.verdict([healthy, gathered]).tolist() == [1]
    healthy[1, 0] ^= 1
    assert ops.verdict([gathered, healthy]).item() & 2
    assert nonfinite_counts(gathered) == [0, 1]
    for backend in (ops, reference):
        none, one = torch.zeros(6), torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
        assert backend.verdict([], [none]).tolist() == [0]
        assert backend.verdict([], [none, one]).tolist() == [1]
        assert backend.verdict([gathered[:1]], [one]).tolist() == [1]
    gathered[0, 4:8] = 255
    for backend in (ops, reference):
        assert backend.unpack(gathered[0], 1000, 10, torch.bfloat16)[2] == 2**32 - 1


BUCKETS = [
    # what each rank sent: its tag, or what else is to be known of it; the verdict
    ([0], 0),
    ([0, 0, 0], 0),
    ([7, 7, 7], 0),
    ([2**24 - 1, 2**24 - 1], 0),
    ([7, 7, 8], ops.MISMATCH),
    ([7, 8, 7], ops.MISMATCH),
    ([8, 7, 7], ops.MISMATCH),
    ([7, 7, 8, 8], ops.MISMATCH),
    ([0, 7], ops.MISMATCH),
    ([2**24 - 1, 2**24 - 2], ops.MISMATCH),
    ([ops.CALLED_OFF], ops.OFF),
    ([ops.CALLED_OFF, ops.CALLED_OFF], ops.OFF),
    ([7, ops.CALLED_OFF, 7], ops.OFF),
    ([0, ops.CALLED_OFF], ops.OFF),
    ([7, ops.CALLED_OFF, 8], ops.OFF | ops.MISMATCH),
    (["nonfinite", 7], ops.NONFINITE),
    (["nonfinite", ops.CALLED_OFF, 8], ops.NONFINITE | ops.OFF | ops.MISMATCH),
    (["damaged"], ops.DAMAGED),
    (["damaged", 7, 7], ops.DAMAGED),
    (["damaged", 7, 8], ops.DAMAGED | ops.MISMATCH),
    ([7, "damaged", 8], ops.DAMAGED | ops.MISMATCH),
    (["damaged", "damaged", ops.CALLED_OFF], ops.DAMAGED | ops.OFF),
    (["damaged and called off", 7], ops.DAMAGED),
]


def sparse_bucket(ranks):
    n, k = 1000, 10
    payloads = []
    for rank in ranks:
        # What is damaged has a tag that would be a mismatch.
        tag = rank if isinstance(rank, int) else {"nonfinite": 7, "damaged": 99}.get(rank, 1)
        gradient = torch.full((n,), float("nan") if rank == "nonfinite" else 1.0)
        payloads.append(ops.compress_(torch.zeros(n), [gradient], k, tag=tag))
        payloads[-1][0] ^= isinstance(rank, str) and rank.startswith("damaged")
    return torch.stack(payloads)


def dense_bucket(ranks):
    counts = torch.tensor([float(rank == "nonfinite") for rank in ranks])
    return torch.cat(
        [counts, torch.tensor([7.0 if isinstance(rank, str) else rank for rank in ranks])]
    )


def can_be_dense(ranks):
    """A dense bucket has no header that could be damaged."""
    return not any(str(rank).startswith("damaged") for rank in ranks)


@pytest.mark.parametrize("backend", [ops, reference])
def test_verdict_over_tags(backend):
    for ranks, expected in BUCKETS:
        assert backend.verdict([sparse_bucket(ranks)]).item() == expected, ranks
        if can_be_dense(ranks):
            assert backend.verdict([], [dense_bucket(ranks)]).item() == expected, ranks


@pytest.mark.parametrize("backend", [ops, reference])
def test_verdict_over_tags_of_several_buckets(backend):
    """Each is compared in itself: what two say together is what one or the other says."""
    for (one, says), (other, too) in itertools.product(BUCKETS, BUCKETS[4:]):
        sparse = [sparse_bucket(one), sparse_bucket(other)]
        assert backend.verdict(sparse).item() == says | too, (one, other)
        if can_be_dense(other):
            mixed = backend.verdict(sparse[:1], [dense_bucket(other)])
            assert mixed.item() == says | too, (one, other)
    assert backend.verdict([sparse_bucket([7, 7]), sparse_bucket([8, 8])]).item() == 0
    assert backend.verdict([sparse_bucket([7, 7])], [dense_bucket([8, 8])]).item() == 0


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([0, ops.CALLED_OFF, 7, 8, "nonfinite", "damaged"]), min_size=1),
    st.randoms(use_true_random=False),
)
def test_every_rank_comes_to_the_same_verdict(ranks, draw):
    """The order of the ranks does not matter, so nobody's own place does."""
    expected = reference.verdict([sparse_bucket(ranks)])
    assert torch.equal(ops.verdict([sparse_bucket(ranks)]), expected)
    draw.shuffle(ranks)
    assert torch.equal(ops.verdict([sparse_bucket(ranks)]), expected)


def test_tags_of_a_dense_bucket_that_are_no_numbers():
    """A sum that went wrong: compared by their bits, on every backend alike."""
    nan, inf = float("nan"), float("inf")
    for tags in itertools.product((nan, inf, -0.0, 0.0, 0.5, 1.0, 2.0**31, 1e-45), repeat=2):
        counts = torch.tensor([0.0, 0.0, *tags])
        assert torch.equal(ops.verdict([], [counts]), reference.verdict([], [counts])), tags


def test_an_untagged_payload_is_what_it_was():
    """The tag took the place of zeros that padded the header."""
    payload = ops.compress_(torch.zeros(100), [torch.ones(100)], 5)
    assert not payload[20:32].any()
    tagged = ops.compress_(torch.zeros(100), [torch.ones(100)], 5, tag=0xABCDEF)
    assert tagged[20:24].tolist() == [0xEF, 0xCD, 0xAB, 0]
    payload[20:24] = tagged[20:24]
    assert torch.equal(payload, tagged)


def test_the_flags_of_an_aggregate():
    n, k, wire = 1000, 10, torch.bfloat16
    payloads = payloads_of(2, n, k, wire)
    skip = torch.ones(1, dtype=torch.int32)
    aggregates = [ops.merge(payloads, n, k, wire), ops.merge(payloads, n, k, wire, skip=skip),
                  ops.sparsify(torch.ones(3))]  # fmt: skip
    assert [aggregate_flags(aggregate) for aggregate in aggregates] == [0, ops.NONFINITE, 0]


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 100_000))
def test_sparsify_densify_round_trip(seed, n):
    torch.manual_seed(seed)
    dense = torch.randn(n) * (torch.rand(n) < 0.3)
    assert torch.equal(ops.densify(ops.sparsify(dense), n), dense)


def test_apply_tells_autograd_that_parameters_changed():
    w = torch.ones(100, requires_grad=True)
    loss = (w * w).sum()
    with torch.no_grad():
        ops.apply_([w], ops.sparsify(torch.ones(100)), 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_operators_inside_a_compiled_function():
    def step(memory, grad, w, state, tag):
        payload = ops.compress_(
            memory, [grad], 10, momentum=0.5, memory_decay=0.9, state=state, tag=tag
        )
        aggregate = ops.merge(payload.unsqueeze(0), 100, 10)
        ops.apply_([w], aggregate, 0.1)
        return ops.densify(aggregate, 100), payload

    grad = torch.randn(100)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        memory, w, state = torch.zeros(100), torch.ones(100), ops.select_state(100, 10, "cpu")
        sent = [function(memory, grad, w, state, tag) for tag in (5, 6, 7)]
        results.append([memory, w, *itertools.chain(*sent)])
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*results))


ALL, CHOSEN, WIRE = 300, 30, torch.bfloat16
BETA, LR = torch.tensor(0.9), torch.tensor(0.1)


def zeros():
    return torch.zeros(ALL)


def parts():
    return list(torch.randn(ALL).split([200, 100]))


def flag():
    return torch.zeros(1, dtype=torch.int32)


def payload():
    return ops.compress_(zeros(), [torch.randn(ALL)], CHOSEN)


def gathered():
    return payload().unsqueeze(0)


def aggregate():
    return ops.sparsify(torch.randn(ALL))


def state():
    return ops.select_state(ALL, CHOSEN, "cpu")


def call(*args, **kwargs):
    return args, kwargs


# The operator, and a call of it.
OPCHECKS = {
    "compress_ for GMC": ("compress_", lambda: call(
        zeros(), [parts()[0], None], CHOSEN, momentum=BETA, wire_dtype=WIRE, state=state(),
        aggregate=None, params=parts(), tag=9)),
    "compress_ for DGC": ("compress_", lambda: call(
        zeros(), [torch.randn(ALL)], CHOSEN, momentum=BETA, wire_dtype=WIRE, state=state(),
        momentum_buffer=zeros(), memory_decay=0.5)),
    "compress_ over ranges": ("compress_", lambda: call(
        zeros(), [torch.randn(ALL)], CHOSEN, momentum=BETA, wire_dtype=WIRE,
        state=ops.select_state(128, CHOSEN, "cpu", ranges=3), width=128, last_k=4)),
    "accumulate_": ("accumulate_", lambda: call(
        zeros(), [parts()[0], None], rank=0, ranks=2, momentum=BETA, aggregate=torch.randn(ALL),
        memory_decay=0.5, params=parts())),
    "apply_dense_": ("apply_dense_", lambda: call(
        [zeros()], zeros(), torch.randn(ALL + 2), LR, skip=flag(),
        skipped_steps=torch.zeros(1, dtype=torch.int64), flags=flag())),
    "unpack": ("unpack", lambda: call(payload(), ALL, CHOSEN, WIRE)),
    "verdict": ("verdict", lambda: call([gathered()], [torch.zeros(4)])),
    "merge": ("merge", lambda: call(gathered(), ALL, CHOSEN, WIRE, skip=flag())),
    "merge_": ("merge_", lambda: call(
        ops.merge(gathered(), ALL, CHOSEN, WIRE), gathered(), ALL, CHOSEN, WIRE, skip=flag())),
    "merge_ranges": ("merge_ranges", lambda: call(
        gathered(), ALL, ALL, CHOSEN, CHOSEN, WIRE, skip=flag())),
    "apply_": ("apply_", lambda: call(
        [zeros()], aggregate(), LR, skip=flag(), memory=zeros(), payload=payload(), k=CHOSEN,
        wire_dtype=WIRE, flags=flag())),
    "restore_": ("restore_", lambda: call(zeros(), payload(), CHOSEN, WIRE, skip=flag())),
    "mask_": ("mask_", lambda: call(zeros(), payload(), CHOSEN, WIRE, skip=flag())),
    "sparsify": ("sparsify", lambda: call(torch.randn(ALL))),
    "densify": ("densify", lambda: call(aggregate(), ALL)),
}  # fmt: skip
# An aggregate has gaps that nothing writes or reads, so two runs of these differ there.
WITH_GAPS = ("merge", "merge_", "merge_ranges", "sparsify")


@pytest.mark.parametrize("operator,make_call", OPCHECKS.values(), ids=OPCHECKS)
def test_opcheck(operator, make_call):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if operator not in WITH_GAPS:
        checks.append("test_aot_dispatch_dynamic")
    args, kwargs = make_call()
    overload = getattr(torch.ops.gmc_cuda, operator).default
    torch.library.opcheck(overload, args, kwargs, test_utils=checks)
