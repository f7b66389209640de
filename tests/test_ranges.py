"""Operators on a bucket that is cut into ranges: as the reference, and as a call for each range."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gmc_cuda import ops, reference
from support.cases import VALUES, assert_same_bytes, sample_call


def cut_call(seed, values, numel, width, share):
    """A sample call over ranges, and the bytes of each payload."""
    call = sample_call(seed, values, numel, max(1, int(share * width)))
    call.aggregate = None  # the ranges' owners add it
    last = numel - (-(-numel // width) - 1) * width
    call.options |= {"width": width, "last_k": max(1, min(int(share * last), call.k))}
    wire = call.options["wire_dtype"]
    full = ops.payload_nbytes(width, call.k, wire)
    sizes = [full] * ((numel - 1) // width)
    return call, [*sizes, ops.payload_nbytes(last, call.options["last_k"], wire)]


def states(call, width):
    return ops.select_state(width, call.k, "cpu", ranges=-(-call.memory.numel() // width))


def assert_same_as_reference(call, state):
    mine, payloads = call.run_on_both(state)
    options = {name: call.options[name] for name in ("wire_dtype", "width", "last_k")}
    count = -(-mine.memory.numel() // call.options["width"])
    words = [torch.tensor([skips], dtype=torch.int32) for skips in (1, 0)]
    some = torch.randint(0, 2, (count,), dtype=torch.int32)  # one for each range
    for name, skips in (("restore_", [*words, some]), ("mask_", words)):
        for skip in skips:
            vectors = [mine.memory.clone(), mine.memory.clone()]
            for backend, vector in zip((ops, reference), vectors, strict=True):
                getattr(backend, name)(vector, payloads, call.k, skip=skip, **options)
            assert_same_bytes(*vectors, f"{name} with skip {skip.tolist()}")
    return mine, payloads


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    values=st.sampled_from(sorted(VALUES)),
    numel=st.integers(1, 3000),
    part=st.floats(0.001, 1),
    share=st.floats(0, 1),
)
def test_ranges_equal_the_reference(seed, values, numel, part, share):
    width = max(1, int(part * numel))
    call, _ = cut_call(seed, values, numel, width, share)
    assert_same_as_reference(call, states(call, width) if seed % 2 else None)


@pytest.mark.parametrize("threads", [1, 3])
def test_large_ranges_equal_the_reference(threads):
    torch.set_num_threads(threads)
    for seed, (numel, width) in enumerate([(200_003, 66_672), (131_072, 65_536), (9_001, 8)]):
        call, _ = cut_call(seed, "gaussian", numel, width, 0.01)
        state = states(call, width)
        for _ in range(3):
            assert_same_as_reference(call, state)


@pytest.mark.parametrize("values", VALUES)
def test_each_range_is_compressed_as_by_a_call_of_its_own(values):
    numel, width = 5000, 1304
    for seed in range(6):
        call, sizes = cut_call(seed, values, numel, width, 0.05)
        whole, payloads = assert_same_as_reference(call, states(call, width))
        gradient = torch.cat([
            torch.zeros(p.numel()) if g is None else g.float()
            for g, p in zip(call.grads, call.options["params"], strict=True)
        ])  # fmt: skip
        options = {k: v for k, v in call.options.items() if k not in ("width", "last_k", "params")}
        params = torch.cat([p.float() for p in call.options["params"]])
        counts = set()
        for j, payload in enumerate(payloads.split(sizes)):
            place = slice(j * width, min((j + 1) * width, numel))
            memory, buffer = call.memory[place].clone(), call.momentum_buffer
            if buffer is not None:
                buffer = buffer[place].clone()
            k = call.k if place.stop < numel else call.options["last_k"]
            alone = ops.compress_(memory, [gradient[place]], k, momentum_buffer=buffer,
                                  params=[params[place]], **options)  # fmt: skip
            counts.add(int(payload[4:8].view(torch.int32)))
            alone[4:8] = payload[4:8]  # the header's count is that of the whole bucket
            assert_same_bytes(payload, alone, f"payload of range {j}")
            assert_same_bytes(whole.memory[place], memory, f"memory of range {j}")
        assert len(counts) == 1


def test_headers_count_the_whole_buckets_nonfinite_values():
    gradient = torch.ones(100)
    gradient[[3, 50, 51]] = float("nan")
    for found_inf, expected in ((None, 3), (torch.ones(1), 1)):
        payloads = ops.compress_(
            torch.zeros(100), [gradient], 2, width=32, last_k=1, found_inf=found_inf
        )
        sizes = [ops.payload_nbytes(32, 2)] * 3 + [ops.payload_nbytes(4, 1)]
        assert {int(p[4:8].view(torch.int32)) for p in payloads.split(sizes)} == {expected}


def test_a_damaged_payload_is_found_before_anything_changes():
    numel, width, k = 3000, 1000, 10
    payloads = ops.compress_(torch.zeros(numel), [torch.randn(numel)], k, width=width, last_k=k)
    payloads[2 * ops.payload_nbytes(width, k)] ^= 1  # the last range's magic
    for change in (ops.restore_, ops.mask_):
        vector = torch.ones(numel)
        with pytest.raises(RuntimeError, match="is damaged"):
            change(vector, payloads, k, width=width, last_k=k)
        assert torch.equal(vector, torch.ones(numel))


def test_some_ranges_are_given_back():
    numel, width, k = 1000, 304, 304
    memory, gradient = torch.zeros(numel), torch.arange(1.0, numel + 1)
    cut = {"width": width, "last_k": 88, "wire_dtype": torch.float32}
    payloads = ops.compress_(memory, [gradient], k, **cut)
    assert not memory.any()
    skip = torch.tensor([0, 4, 0, 1], dtype=torch.int32)
    ops.restore_(memory, payloads, k, skip=skip, **cut)
    assert torch.equal(memory[304:608], gradient[304:608])
    assert torch.equal(memory[912:], gradient[912:])
    assert memory.count_nonzero() == 304 + 88
    for wrong in (skip[:3], skip.float()):
        with pytest.raises((ValueError, TypeError), match="skip: got"):
            ops.restore_(memory, payloads, k, skip=wrong, **cut)


def test_a_state_grows_with_k_and_counts_repairs_of_all_ranges():
    state = ops.select_state(1000, 10, "cpu", ranges=3)
    assert state.shape[0] == 3
    assert ops.select_state(1000, 10, "cpu", state, ranges=3) is state
    memory = torch.zeros(3000)
    for scale in (1.0, 1.0, 1e-6, 1e6):
        ops.compress_(memory, [scale * torch.randn(3000)], 10, width=1000, last_k=10, state=state)
    assert ops.repairs(state) == sum(ops.repairs(row) for row in state)


@pytest.mark.parametrize(("wrong", "error", "message"), [
    ({"width": -1, "last_k": 1}, ValueError, "width: got -1, must be between 1 and numel = 100"),
    ({"width": 101, "last_k": 1}, ValueError, "width: got 101, must be"),
    ({"width": 60, "last_k": 0}, ValueError, "last_k: got 0, must be between 1 and 5"),
    ({"width": 60, "last_k": 6}, ValueError, "last_k: got 6, must be between 1 and 5"),
    ({"width": 98, "last_k": 3}, ValueError, "last_k: got 3, must be between 1 and 2"),
    ({"width": 4, "last_k": 1}, ValueError, "k: got 5, must be between 1 and numel = 4"),
    ({"width": 60, "last_k": 5, "aggregate": ops.sparsify(torch.ones(100))}, ValueError,
     "aggregate: got a tensor beside width = 60, must be None"),
    ({"width": 60, "last_k": 5, "state": ops.select_state(100, 5, "cpu")}, ValueError,
     r"state: got shape \[64\], must be \[2, 64\] or longer"),
    ({"state": ops.select_state(50, 5, "cpu", ranges=2)}, ValueError,
     r"state: got shape \[2, 64\], must be \[64\] or longer"),
])  # fmt: skip
def test_wrong_ranges_are_named_and_change_nothing(wrong, error, message):
    memory = torch.ones(100)
    with pytest.raises(error, match=message):
        ops.compress_(memory, [torch.ones(100)], 5, **wrong)
    assert torch.equal(memory, torch.ones(100))


def test_more_ranges_than_a_grid_has_rows():
    memory = torch.ones(65536)
    with pytest.raises(ValueError, match="width: got 1 for 65536 elements.* at most 65535"):
        ops.compress_(memory, [torch.ones(65536)], 1, width=1, last_k=1)
    assert memory.eq(1).all()
