"""Every kernel of csrc/cuda, executed on the CPU, gives the same bytes as the CPU op."""

import itertools

import numpy as np
import pytest
import torch

from emulator.compilation import FLAVOURS
from emulator.kernel_ops import (
    DTYPES,
    LARGEST_COUNT,
    SMALLEST_SAMPLE,
    WIRES,
    WORK_TILE,
    Kernels,
    assert_same_aggregate,
    program,
)
from gmc_cuda import ops, reference
from support.cases import RANGES, assert_same_bytes, payloads_of, range_payloads, sample_call
from support.payload_sections import aggregate_flags, section_begin, spare_bits
from support.sampling import misleading, places

FLOAT8, FLOAT4 = reference.FLOAT8, reference.FLOAT4
TILE, BLOCK = reference.TILE, reference.BLOCK


def gaussian(n, rng):
    return torch.from_numpy(rng.standard_normal(n).astype(np.float32))


def heavy_ties(n, rng):
    return torch.from_numpy(rng.integers(-2, 3, n).astype(np.float32))


def sixty_orders(n, rng):
    magnitude = 10.0 ** rng.uniform(-30, 30, n)
    return torch.from_numpy((magnitude * rng.choice([-1, 1], n)).astype(np.float32))


def one_spike(n, rng):
    x = torch.zeros(n)
    x[int(rng.integers(n))] = -3.0
    return x


VALUES = {
    "gaussian": gaussian,
    "laplace": lambda n, rng: torch.from_numpy(rng.laplace(size=n).astype(np.float32)),
    "lognormal": lambda n, rng: gaussian(n, rng) * (3 * gaussian(n, rng)).exp(),
    "all equal": lambda n, rng: torch.full((n,), -0.75),
    "all zero": lambda n, rng: torch.zeros(n),
    "minus zero": lambda n, rng: torch.full((n,), -0.0),
    "heavy ties": heavy_ties,
    "denormals": lambda n, rng: gaussian(n, rng) * 1e-41,
    "sixty orders": sixty_orders,
    "one spike": one_spike,
}


@pytest.fixture(scope="module", params=FLAVOURS)
def running(request):
    started = program(request.param)
    yield started
    started.close()


def seeds(running, count):
    """Schedules to try: fewer where each is slow and checked more closely."""
    return range(1, 1 + (count if running is program("plain") else 1))


def split(x, sizes, dtypes=(torch.float32,)):
    return [
        part.to(dtypes[i % len(dtypes)]).clone()
        for i, part in enumerate(x.split([int(size) for size in sizes]))
    ]


class Bucket:
    """One bucket on both sides: the kernels' and the CPU op's."""

    def __init__(self, kernels, memory, momentum_buffer=None):
        self.kernels = kernels
        self.sides = [[memory.clone(), None], [memory.clone(), None]]
        if momentum_buffer is not None:
            for side in self.sides:
                side[1] = momentum_buffer.clone()

    def compress(self, grads, k, state=None, **options):
        """Runs both, compares payload, memory and momentum buffer; returns the payload."""
        (memory, buffer), (cpu_memory, cpu_buffer) = self.sides
        payload = self.kernels.compress_(
            memory, grads, k, momentum_buffer=buffer, state=state, **options
        )
        expected = ops.compress_(cpu_memory, grads, k, momentum_buffer=cpu_buffer, **options)
        assert_same_bytes(payload, expected, "payload")
        assert_same_bytes(memory, cpu_memory, "memory")
        if buffer is not None:
            assert_same_bytes(buffer, cpu_buffer, "momentum buffer")
        return payload


@pytest.mark.parametrize(
    ("refusal", "refused", "status"), [(0, 0, 0), (801, 1, 0), (1, 1, 0), (2, 1, 2)]
)
def test_a_device_that_refuses_early_starts(running, refusal, refused, status):
    """Where the attribute is not supported or not valid, kernels start as usual from then on; other
    errors are raised."""
    out = running.call("early_start", seed=1, refusal=refusal)
    assert out["sum"][0] == (0 if status else 3)
    assert (out["refused"][0], out["status"][0], out["left"][0] != 0) == (
        refused,
        status,
        status != 0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_tiles_take_wide_loads(running, dtype):
    numel = 3 * WORK_TILE
    rng = np.random.default_rng(4)
    bucket = Bucket(Kernels(running), gaussian(numel, rng))
    sizes = [WORK_TILE, 2 * WORK_TILE]
    params = split(gaussian(numel, rng), sizes, (dtype,))
    grads = split(gaussian(numel, rng), sizes, (dtype,))
    bucket.compress(grads, 99, weight_decay=0.1, params=params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_that_end_beside_a_tile_border(running, dtype):
    rng = np.random.default_rng(8)
    one = WORK_TILE
    for sizes in ([one - 1, one + 1], [one + 1, one - 1], [2 * one - 1, 1, one], [one, one - 1]):
        bucket = Bucket(Kernels(running), gaussian(sum(sizes), rng))
        grads = split(gaussian(sum(sizes), rng), sizes, (dtype,))
        bucket.compress(grads, 60, wire_dtype=torch.float32)


@pytest.mark.parametrize("values", ["gaussian", "heavy ties", "near overflow"])
@pytest.mark.parametrize("numel", [7, 2049, 5000])
def test_random_calls(running, values, numel):
    """What the CPU op is compared with the reference on."""
    for seed in seeds(running, 6):
        for k in (1, -(-numel // 3)):
            call = sample_call(100 * seed + k, values, numel, k)
            expected = call.copy()
            payload = call.run(Kernels(running, seed, offset=seed % 4))
            call.assert_same(expected, payload, expected.run(ops))


@pytest.mark.parametrize("values", ["gaussian", "heavy ties", "near overflow"])
@pytest.mark.parametrize("numel", [7, 2049, 2 * WORK_TILE, 5000])
def test_accumulate(running, values, numel):
    """The rule of compress_ over a dense aggregate, and the count of non-finite values."""
    for seed in seeds(running, 6):
        call = sample_call(seed, values, numel, 1)
        expected = call.copy()
        ranks = seed % 3 + 1
        total = call.accumulate(Kernels(running, seed, offset=seed % 4), seed % ranks, ranks)
        right = expected.accumulate(ops, seed % ranks, ranks)
        call.assert_same(expected, total, right)


@pytest.mark.parametrize("rule", ["global", "local", "nesterov"])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_accumulate_counts_from_many_blocks(running, rule, decay):
    """Every warp of every block has something to count, found_inf adds one."""
    numel = 5 * WORK_TILE + 3
    rng = np.random.default_rng(6)
    grad = gaussian(numel, rng)
    grad[::17] = np.nan
    memory, params = gaussian(numel, rng), [gaussian(numel, rng)]
    options = {"nesterov": rule == "nesterov", "weight_decay": decay, "params": params}
    options["memory_decay"] = 1 - 10 * decay
    for seed in seeds(running, 3):
        for found_inf in (None, torch.tensor(1.0)):
            sides = []
            for backend in (Kernels(running, seed, offset=seed % 3), ops):
                options["momentum_buffer"] = None if rule == "global" else memory.flip(0).clone()
                u = memory.clone()
                total = backend.accumulate_(
                    u, [grad], rank=1, ranks=3, momentum=0.9, found_inf=found_inf, **options
                )
                sides.append([total, u, options["momentum_buffer"]])
            for mine, theirs in zip(*sides, strict=True):
                if mine is not None:
                    assert_same_bytes(mine, theirs, "total, memory or buffer")
            counted = -(-numel // 17) if found_inf is None else 1
            assert sides[0][0][numel:].tolist() == [0, counted, 0]


def test_a_count_saturates(running):
    """The count of a dense bucket goes no further, in whatever order blocks add to it."""
    numel = LARGEST_COUNT + 2 * WORK_TILE
    grad = torch.full((numel,), float("nan"))
    for seed in seeds(running, 3):
        total = Kernels(running, seed).accumulate_(torch.zeros(numel), [grad])
        assert total[numel:].tolist() == [LARGEST_COUNT]


@pytest.mark.parametrize("skip", [None, 0, 1])
@pytest.mark.parametrize("ranks", [1, 3])
def test_apply_dense(running, ranks, skip):
    """Whole tiles of each dtype, tensors that end anywhere, unaligned ones, more than fit."""
    flag = None if skip is None else torch.tensor([skip], dtype=torch.int32)
    rng = np.random.default_rng(12)
    for seed, sizes in zip(
        seeds(running, 4),
        [
            [2 * WORK_TILE, WORK_TILE, WORK_TILE],
            [WORK_TILE + 3, 5, 2 * WORK_TILE],
            [1, 0, 7, 2 * WORK_TILE, 64, 900],
            [7],
        ],
        strict=False,
    ):
        numel = sum(sizes)
        params = split(gaussian(numel, rng), sizes, DTYPES)
        params[0][:3] = torch.tensor([-0.0, float("inf"), 1e-7])[: sizes[0]]
        total = torch.cat([gaussian(numel, rng) * 1000, torch.zeros(ranks)])
        total[0] = -0.0
        for lr in (0.1, torch.tensor(0.3)):
            outcomes = []
            for backend in (Kernels(running, seed, offset=seed % 3), ops):
                args = [p.clone() for p in params], gaussian(numel, rng), total.clone()
                args[1].fill_(3.0)
                counted = torch.zeros(1, dtype=torch.int64)
                backend.apply_dense_(*args, lr, skip=flag, skipped_steps=counted)
                outcomes.append([*args[0], *args[1:], counted])
            for mine, theirs in zip(*outcomes, strict=True):
                assert_same_bytes(mine, theirs, "params, memory or total")


@pytest.mark.parametrize("skip", [None, 0, 1, 3])
def test_skip(running, skip):
    ranks, numel, k = 2, 1500, 40
    wire = torch.float16
    skip = None if skip is None else torch.tensor([skip], dtype=torch.int32)
    payloads = payloads_of(ranks, numel, k, wire, seed=1)
    kernels = Kernels(running, seed=3)
    rng = np.random.default_rng(8)
    aggregate = kernels.merge(payloads, numel, k, wire, skip=skip)
    expected = ops.merge(payloads, numel, k, wire, skip=skip)
    assert_same_aggregate(aggregate, expected, numel)
    for name in ("restore_", "mask_"):
        mine = gaussian(numel, rng)
        theirs = mine.clone()
        getattr(kernels, name)(mine, payloads[1], k, wire, skip=skip)
        getattr(ops, name)(theirs, payloads[1], k, wire, skip=skip)
        assert_same_bytes(mine, theirs, name)
    param = gaussian(numel, rng)
    moved = param.clone()
    counts = torch.zeros(2, 1, dtype=torch.int64)
    memory = gaussian(numel, rng)
    memories = memory, memory.clone()
    aggregate = ops.merge(payloads, numel, k, wire)
    for backend, tensor, count, memory in zip((kernels, ops), (moved, param), counts, memories):
        own = {"memory": memory, "payload": payloads[1], "k": k, "wire_dtype": wire}
        backend.apply_([tensor], aggregate, 0.1, skip=skip, skipped_steps=count, **own)
    assert_same_bytes(moved, param, "params")
    assert_same_bytes(*memories, "memory")
    assert counts.flatten().tolist() == [skip is not None and skip.item() != 0] * 2


@pytest.mark.parametrize("wire", WIRES)
def test_a_skipped_step_gives_back(running, wire):
    """Over several tiles, by each wire type; without memory nothing is given back."""
    numel, k = TILE + 3000, 400
    payload = payloads_of(1, numel, k, wire, seed=2)[0]
    aggregate, skip = ops.sparsify(torch.zeros(numel)), torch.ones(1, dtype=torch.int32)
    memory = gaussian(numel, np.random.default_rng(3))
    expected, param = memory.clone(), torch.ones(numel)
    ops.restore_(expected, payload, k, wire)
    own = {"payload": payload, "k": k, "wire_dtype": wire}
    kernels = Kernels(running, seed=2)
    kernels.apply_([param], aggregate, 0.1, skip=skip, **own)
    kernels.apply_([param], aggregate, 0.1, skip=skip, memory=memory, **own)
    assert_same_bytes(memory, expected, "memory")
    assert bool((param == 1).all())


def test_damage_is_reported_and_kept(running):
    """By a damaged header, of which the verdict knows, or by what the aggregate says."""
    payloads = payloads_of(2, 900, 9, torch.bfloat16, seed=0)
    sound, flags = ops.merge(payloads, 900, 9), torch.zeros(1, dtype=torch.int32)
    kernels, param = Kernels(running), torch.zeros(900)
    verdicts = [torch.tensor([v], dtype=torch.int32) for v in (0, 1, 2)]
    for skip in (None, *verdicts[:2]):
        kernels.apply_([param], sound, 0.1, skip=skip, flags=flags)
        assert flags.item() == 0
    kernels.apply_([param], sound, 0.1, skip=verdicts[2], flags=flags)
    assert flags.item() == ops.DAMAGED
    kernels.apply_([param], sound, 0.1, skip=verdicts[0], flags=flags)
    assert flags.item() == ops.DAMAGED
    payloads[1, 100] ^= 1  # an index
    flags.zero_()
    kernels.apply_([param], kernels.merge(payloads, 900, 9), 0.1, flags=flags)
    assert flags.item() == ops.DAMAGED


def test_what_should_not_have_happened_is_kept(running):
    """Of every verdict, in what the steps of sparse and of dense buckets leave behind."""
    numel = 2 * WORK_TILE + 5
    aggregate, param = ops.sparsify(torch.ones(numel)), torch.ones(numel)
    kernels = Kernels(running, seed=2)
    moves = [
        lambda **words: kernels.apply_([param], aggregate, 0.1, **words),
        lambda **words: kernels.apply_dense_(
            [param], torch.ones(numel), torch.ones(numel + 1), 0.1, **words
        ),
    ]
    for move in moves:
        for verdict in range(16):
            flags, counted = torch.tensor([256], dtype=torch.int32), torch.zeros(1).long()
            words = {"flags": flags, "skipped_steps": counted}
            move(skip=torch.tensor([verdict], dtype=torch.int32), **words)
            move(skip=torch.zeros(1, dtype=torch.int32), **words)
            move(**words)
            assert flags.item() == 256 | verdict & (ops.DAMAGED | ops.MISMATCH | ops.OFF)
            assert counted.item() == (verdict != 0)


@pytest.mark.parametrize(
    ("ranks", "numel", "k", "crowded"),
    [
        (1, 1, 1, False),
        (1, 900, 30, False),
        (2, 900, 900, False),
        (5, 3000, 130, False),
        (67, 400, 9, False),
        (3, 66_000, 300, False),
        (2, 140_000, 1500, True),
    ],
)
def test_merge_and_apply(running, ranks, numel, k, crowded):
    for seed in seeds(running, 2):
        kernels = Kernels(running, seed, offset=seed % 3)
        for wire in WIRES:
            payloads = payloads_of(ranks, numel, k, wire, seed, crowded)
            aggregate = kernels.merge(payloads, numel, k, wire)
            expected = ops.merge(payloads, numel, k, wire)
            assert_same_aggregate(aggregate, expected, numel)
        assert_same_bytes(
            kernels.densify(aggregate, numel), ops.densify(expected, numel), "densified"
        )
        first = numel // 3
        sizes = [first, numel - first]
        params = split(gaussian(numel, np.random.default_rng(seed)), sizes, DTYPES[1:])
        if numel > 20:
            params[0][:3] = torch.tensor([float("nan"), float("inf"), -0.0])
        for lr in (0.1, torch.tensor(0.3), 1e30):
            moved, right = ([p.clone() for p in params] for _ in range(2))
            kernels.apply_(moved, aggregate, lr)
            ops.apply_(right, expected, lr)
            for mine, theirs in zip(moved, right, strict=True):
                assert_same_bytes(mine, theirs, "params")


@pytest.mark.parametrize(("ranges", "numel", "width", "k", "last_k"), RANGES)
def test_merge_ranges(running, ranges, numel, width, k, last_k):
    for seed in seeds(running, 2):
        kernels = Kernels(running, seed)
        for wire in WIRES:
            payloads = range_payloads(ranges, numel, width, k, last_k, wire, seed)
            arguments = (payloads, numel, width, k, last_k, wire)
            aggregate, expected = kernels.merge_ranges(*arguments), ops.merge_ranges(*arguments)
            assert_same_aggregate(aggregate, expected, numel)
            skip = torch.ones(1, dtype=torch.int32)
            empty = kernels.merge_ranges(*arguments, skip=skip)
            assert ops.densify(empty, numel).count_nonzero() == 0


CUTS = [(900, 304, 30, 28), (2 * WORK_TILE + 3, 8, 1, 1), (4000, 2000, 2000, 2000),
        (70_000, 35_000, 300, 300), (3 * WORK_TILE + 40, WORK_TILE, 20, 7),
        (4 * WORK_TILE + 5, 3 * WORK_TILE, 30, 12)]  # fmt: skip


@pytest.mark.parametrize(("numel", "width", "k", "last_k"), CUTS)
def test_ranges(running, numel, width, k, last_k):
    """One chain of launches for all ranges: three steps of each, with guesses good and bad."""
    count = -(-numel // width)
    if count > 99 and running is not program("plain"):
        numel, count = 9 * width, 9
    watched = running is program("thread")  # which sees a race whatever the values are
    for seed in seeds(running, 2 if count < 99 else 1):
        kernels = Kernels(running, seed)
        for n, wire in enumerate((WIRES[0], FLOAT4) if watched else WIRES):
            rng = np.random.default_rng(seed + n)
            buffer = gaussian(numel, rng) if n % 2 else None
            bucket = Bucket(kernels, gaussian(numel, rng), buffer)
            cut = {"wire_dtype": wire, "width": width, "last_k": last_k}
            state = kernels.select_state(width, k, count) if n != 2 else None
            for scale in (1.0, 1e-3, 1e3) if n < 2 and not watched else (1.0,):
                sizes = [numel // 3, numel - numel // 3]
                grads = split(scale * gaussian(numel, rng), sizes, DTYPES)
                grads[0][numel // 5] = float("nan")
                payloads = bucket.compress(grads, k, state, momentum=0.5, **cut)
            for name in ("restore_", "mask_"):
                mine = gaussian(numel, rng)
                theirs = mine.clone()
                skip = torch.tensor([int(name == "restore_")], dtype=torch.int32)
                getattr(kernels, name)(mine, payloads, k, skip=skip, **cut)
                getattr(ops, name)(theirs, payloads, k, skip=skip, **cut)
                assert_same_bytes(mine, theirs, name)
            some = torch.from_numpy(rng.integers(0, 2, count).astype(np.int32))
            for backend, memory in ((kernels, mine), (ops, theirs)):
                backend.restore_(memory, payloads, k, skip=some, **cut)
            assert_same_bytes(mine, theirs, "restore_ of some ranges")


def test_apply_to_many_tensors(running):
    """More tensors than travel in the kernel's parameters."""
    numel = 1200
    rng = np.random.default_rng(3)
    sizes = [1, 3, 0, 396, 500, 300]
    aggregate = ops.sparsify(gaussian(numel, rng))
    params = split(gaussian(numel, rng), sizes, DTYPES)
    right = [p.clone() for p in params]
    Kernels(running).apply_(params, aggregate, 0.1)
    ops.apply_(right, aggregate, 0.1)
    for mine, theirs in zip(params, right, strict=True):
        assert_same_bytes(mine, theirs, "params")


@pytest.mark.parametrize("numel", [1, 130, 2000, 65536 + 100])
def test_sparsify_densify_unpack(running, numel):
    rng = np.random.default_rng(numel)
    dense = torch.where(gaussian(numel, rng) > 0.5, gaussian(numel, rng), 0.0)
    dense[-1] = float("nan")
    kernels = Kernels(running, seed=numel)
    assert_same_aggregate(kernels.sparsify(dense), ops.sparsify(dense), numel)
    aggregate = ops.sparsify(dense)
    assert_same_bytes(kernels.densify(aggregate, numel), dense, "densified")
    k = max(1, numel // 9)
    for wire in WIRES:
        payload = payloads_of(1, numel, k, wire, seed=numel)[0]
        assert_same_entries(kernels, payload, numel, k, wire)


def assert_same_entries(kernels, payload, numel, k, wire):
    names = ("indices", "values", "nonfinite")
    mine, theirs = kernels.unpack(payload, numel, k, wire), ops.unpack(payload, numel, k, wire)
    for name, one, other in zip(names, mine, theirs, strict=True):
        assert_same_bytes(one, other.reshape(-1), name)


@pytest.mark.parametrize("name", VALUES)
def test_selection(running, name):
    rng = np.random.default_rng(7)
    for seed in seeds(running, 2):
        for numel, k in [
            (1, 1),
            (37, 37),
            (2501, 1),
            (2 * WORK_TILE - 1, 26),
            (5 * WORK_TILE, 700),
        ]:
            x = VALUES[name](numel, rng)
            bucket = Bucket(Kernels(running, seed), torch.zeros(numel))
            state = bucket.kernels.select_state(numel, k)
            for step, wire in enumerate(WIRES):  # without a guess, then with one
                bucket.compress([x * (1 + 0.05 * step)], k, state, wire_dtype=wire)


BORDERS = (0, 1, BLOCK - 1, BLOCK, 2 * BLOCK - 1, TILE - BLOCK, TILE - 1, TILE, TILE + BLOCK)


def test_borders_of_blocks_and_tiles(running, full_size):
    """Entries on both sides of every border, none at all, and every element."""
    numel = TILE + BLOCK + 45
    wires, many = WIRES, [numel, numel - 1, numel // 3]
    if running is not program("plain"):
        # The type whose values are set bit by bit, like the bitmap, is the one to watch closely.
        wires, many = (FLOAT4,), [numel // 30 if running is program("thread") else numel]
    rng = np.random.default_rng(3)
    at_borders = torch.zeros(numel)
    at_borders[[*BORDERS, numel - 1]] = 1 + gaussian(len(BORDERS) + 1, rng).abs()
    second_tile = gaussian(numel, rng)
    second_tile[:TILE] = 0
    first_block, last_block = gaussian(numel, rng), gaussian(numel, rng)
    first_block[BLOCK:] = 0
    last_block[:-45] = 0
    cases = [
        (at_borders, [len(BORDERS) + 1]),
        (second_tile, [77, BLOCK + 45]),
        (first_block, [BLOCK - 1, BLOCK]),
        (last_block, [1, 45]),
        (gaussian(numel, rng), many),
    ]
    if running is program("thread"):
        cases = [cases[0], cases[-1]]
    for seed, (x, ks) in enumerate(cases):
        kernels = Kernels(running, seed)
        for k, wire in itertools.product(ks, wires):
            bucket = Bucket(kernels, torch.zeros(numel))
            payload = bucket.compress([x], k, wire_dtype=wire)
            right = reference.compress_(torch.zeros(numel), [x], k, wire_dtype=wire)
            assert_same_bytes(payload, right, "payload")
            assert_same_entries(kernels, payload, numel, k, wire)
            payloads = torch.stack([payload, payloads_of(1, numel, k, wire, seed)[0], payload])
            expected = ops.merge(payloads, numel, k, wire)
            # Small windows would be hundreds, each of which goes through all entries.
            merging = Kernels(full_size, seed) if k > TILE // 8 else kernels
            assert_same_aggregate(merging.merge(payloads, numel, k, wire), expected, numel)


@pytest.mark.parametrize("wire", [FLOAT8, FLOAT4])
def test_saturation(running, wire):
    """As many entries as may saturate lie above the others, or one more; a little, or far."""
    numel, k = 4 * WORK_TILE, 640
    for seed, factor in itertools.product(seeds(running, 3), (16.0, 1e6)):
        rng = np.random.default_rng(seed)
        for large in (0, 1, k // 256, k // 256 + 1, k):
            x = 1 + gaussian(numel, rng).abs()
            x[torch.from_numpy(rng.permutation(numel)[:large])] *= factor
            Bucket(Kernels(running, seed), torch.zeros(numel)).compress([x], k, wire_dtype=wire)


@pytest.mark.parametrize("rule", ["global", "local", "nesterov"])
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_rules_over_several_tensors(running, rule, decay, offset):
    """Several dtypes, tables in parameters and stored, unaligned tensors, None, empty."""
    rng = np.random.default_rng([offset, len(rule)])
    for seed, sizes in zip(
        seeds(running, 3),
        [[WORK_TILE + 3, 5, 2 * WORK_TILE], [3 * WORK_TILE], [1, 0, 7, 2 * WORK_TILE, 64, 900]],
        strict=False,
    ):
        numel, k = sum(sizes), sum(sizes) // 20
        kernels = Kernels(running, seed, offset)
        buffer = None if rule == "global" else gaussian(numel, rng)
        bucket = Bucket(kernels, gaussian(numel, rng), buffer)
        params = split(gaussian(numel, rng), sizes, (torch.bfloat16, torch.float32, torch.float16))
        state = kernels.select_state(numel, k)
        aggregate = None
        for step in range(2):
            dtypes = (torch.float16, torch.bfloat16, torch.float32)[step:]
            grads = split(gaussian(numel, rng), sizes, dtypes)
            if len(grads) > 2:
                grads[1] = None
            if rule == "global":
                dense = torch.where(gaussian(numel, rng) > 1, gaussian(numel, rng), 0.0)
                dense[-1] = 0.5
                aggregate = ops.sparsify(dense)
            bucket.compress(
                grads,
                k,
                state,
                momentum=torch.tensor(0.9) if step else 0.9,
                aggregate=aggregate,
                nesterov=rule == "nesterov",
                weight_decay=decay,
                memory_decay=(1.0, 0.9)[step],
                params=params,
                maximize=step == 1,
                grad_scale=torch.tensor(1024.0) if step else 3.0,
                wire_dtype=WIRES[offset + step],
                tag=(0, 0xFEDCBA)[step],
            )


@pytest.mark.parametrize("rule", ["global", "local", "nesterov"])
def test_nonfinite_values(running, rule):
    numel, k = 2 * WORK_TILE + 9, 50
    rng = np.random.default_rng(5)
    memory, buffer = gaussian(numel, rng), None
    memory[3], memory[4], memory[5], memory[6] = np.inf, np.nan, 3e38, -0.0
    if rule != "global":
        buffer = gaussian(numel, rng)
        buffer[3], buffer[7], buffer[8] = np.nan, np.inf, 3e38
    grad = gaussian(numel, rng)
    grad[5:7] = 3e38
    grad[8] = 3e38
    grad[::97] = np.nan
    grad[50::211] = np.inf
    grad[-1] = -np.inf
    params = [gaussian(numel, rng)]
    params[0][6] = params[0][9] = np.inf
    aggregate = None
    if rule == "global":  # with entries beside and at what is not finite, some themselves not
        entries = torch.where(gaussian(numel, rng) > 1, gaussian(numel, rng), 0.0)
        entries[:100] = gaussian(100, rng)
        entries[10], entries[11] = np.nan, np.inf
        aggregate = ops.sparsify(entries)
    for seed in seeds(running, 2):
        for found_inf in (None, torch.tensor(0.0), torch.tensor(1.0)):
            bucket = Bucket(Kernels(running, seed), memory, buffer)
            payload = bucket.compress(
                [grad],
                k,
                momentum=0.9,
                aggregate=aggregate,
                nesterov=rule == "nesterov",
                weight_decay=0.1,
                memory_decay=0.5,
                params=params,
                grad_scale=0.5,
                found_inf=found_inf,
            )
            assert ops.unpack(payload, numel, k)[2] != 0
            assert bool(bucket.sides[0][0].isfinite().all())


@pytest.mark.parametrize("rule", ["global", "local", "nesterov"])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_each_value_is_counted(running, rule, decay):
    """All are infinite or no numbers, but for those past the end of the bucket, which are none."""
    numel = 2 * WORK_TILE + 9
    rng = np.random.default_rng(5)
    grad, params = gaussian(numel, rng), [gaussian(numel, rng)]
    grad[::3] = 0
    buffer = None if rule == "global" else gaussian(numel, rng)
    for seed in seeds(running, 2):
        options = {"grad_scale": 0.0, "weight_decay": decay, "params": params, "momentum": 0.5}
        options["nesterov"] = rule == "nesterov"
        bucket = Bucket(Kernels(running, seed), gaussian(numel, rng), buffer)
        payload = bucket.compress([grad], 50, **options)
        assert ops.unpack(payload, numel, 50)[2] == numel
        own = None if buffer is None else buffer.clone()
        total = Kernels(running, seed).accumulate_(
            gaussian(numel, rng), [grad], momentum_buffer=own, **options
        )
        assert total[numel:].tolist() == [numel]


def test_the_guess_settles(running):
    """A steady stream of gradients is selected without repairs."""
    numel, k = 6 * WORK_TILE, 61
    rng = np.random.default_rng(0)
    bucket = Bucket(Kernels(running), gaussian(numel, rng))
    state = bucket.kernels.select_state(numel, k)
    for _ in range(12):
        bucket.compress([0.1 * gaussian(numel, rng)], k, state)
    assert bucket.kernels.repairs <= 1


def test_the_guess_knows_of_memory_decay(running):
    """With memory far above the gradient, a sample that forgot it would be far too high."""
    numel, k = 6 * WORK_TILE, 61
    rng = np.random.default_rng(0)
    kernels = Kernels(running)
    state = kernels.select_state(numel, k)
    for _ in range(4):
        bucket = Bucket(kernels, 100 * gaussian(numel, rng))
        bucket.compress([gaussian(numel, rng)], k, state, memory_decay=0.01)
    assert kernels.repairs == 0


def flipped(payload, byte, bits):
    """A copy with one byte changed."""
    copy = payload.clone()
    copy[..., byte] ^= bits
    return copy


def damaged_on_cpu(run):
    try:
        run()
    except RuntimeError:
        return True
    return False


def test_verdict(running):
    """Every byte of a header changed in turn; more buckets than one launch takes."""
    small = payloads_of(2, 50, 5, torch.bfloat16, seed=0)
    large = payloads_of(3, 700, 31, torch.float32, seed=1)
    kernels = Kernels(running)
    assert kernels.verdict([small, large]).item() == 0
    flagged = 0
    for byte in range(24):
        for bits in (0x01, 0x80, 0x12):
            broken = large.clone()
            broken[2] = flipped(broken[2], byte, bits)
            payloads = [small, broken]
            flags = kernels.verdict(payloads).item()
            assert flags == ops.verdict(payloads).item()
            flagged += flags != 0
            if byte >= 20:  # of the tag, which calls the step off if it is one
                called_off = (byte, bits) == (20, ops.CALLED_OFF)
                assert flags == (ops.OFF if called_off else ops.MISMATCH)
    assert flagged > 60  # all but a k or numel that makes as many bytes
    overflowed = small.clone()
    overflowed[1, 4] = 7
    assert kernels.verdict([overflowed] + [small] * 140).item() == 1
    assert kernels.verdict([small] * 140 + [overflowed]).item() == 1
    for place, expected in ((None, 0), (0, 1), (139, 1)):
        counts = [torch.zeros(6) for _ in range(140)]
        if place is not None:
            counts[place][2] = 1.0
        assert kernels.verdict([], counts).item() == expected
        assert kernels.verdict([small], counts).item() == expected
    odd = torch.full((70, 37), 1, dtype=torch.uint8)  # no payload at all
    assert kernels.verdict([small, odd]).item() == ops.verdict([small, odd]).item() == 3


def tagged(*tags):
    """The gathered payloads of a bucket, a tag for each rank."""
    payload = ops.compress_(torch.zeros(50), [torch.randn(50)], 5)
    payloads = payload.repeat(len(tags), 1)
    payloads[:, 20:24] = torch.tensor(tags, dtype=torch.int32)[:, None].view(torch.uint8)
    return payloads


def numbers(*tags):
    """The same of a dense bucket."""
    return torch.tensor([*[0.0] * len(tags), *tags])


@pytest.mark.parametrize("bucket", [tagged, numbers])
def test_verdict_over_tags(running, bucket):
    """Every pair of ranks is compared, of one lane or of two; every bucket alone, of whichever warp
    and launch."""
    kernels = Kernels(running)

    def verdict(*buckets):
        args = (list(buckets), []) if bucket is tagged else ([], list(buckets))
        flags = kernels.verdict(*args).item()
        assert flags == ops.verdict(*args).item() == reference.verdict(*args).item()
        return flags

    for tags, expected in [
        ([7], 0),
        ([0, 0, 0], 0),
        ([2**24 - 1, 2**24 - 2], ops.MISMATCH),
        ([ops.CALLED_OFF], ops.OFF),
        ([ops.CALLED_OFF] * 70, ops.OFF),
        ([7, ops.CALLED_OFF, 7], ops.OFF),
        ([7, ops.CALLED_OFF, 8], ops.OFF | ops.MISMATCH),
        ([0, ops.CALLED_OFF, 8], ops.OFF | ops.MISMATCH),
    ]:
        assert verdict(bucket(*tags)) == expected, tags
    equal, off = [7] * 70, [7] * 40 + [ops.CALLED_OFF] + [7] * 29
    for other in (0, 1, 31, 32, 33, 64, 69):
        for tag in (0, 6, 8):
            tags = [tag if rank == other else 7 for rank in range(70)]
            assert verdict(bucket(*tags)) == ops.MISMATCH, (other, tag)
    same = [bucket(number, number) for number in range(2, 142)]
    assert verdict(*same) == 0
    for place in (0, 1, 127, 128, 139):
        for tags, expected in (([3, 4], ops.MISMATCH), (off, ops.OFF), (equal, 0)):
            buckets = list(same)
            buckets[place] = bucket(*tags)
            assert verdict(*buckets) == expected, (place, tags)


def test_verdict_over_damage_beside_other_tags(running):
    """A damaged header's tag is not compared and calls nothing off; those of the others do."""
    kernels = Kernels(running)
    for tag, other, expected in [
        (9, 7, ops.DAMAGED),
        (ops.CALLED_OFF, 7, ops.DAMAGED),
        (9, 8, ops.DAMAGED | ops.MISMATCH),
        (7, ops.CALLED_OFF, ops.DAMAGED | ops.OFF),
    ]:
        payloads = tagged(tag, 7, other)
        payloads[0, 3] ^= 0x80
        both = [payloads], [numbers(5, 5)]
        assert kernels.verdict(*both).item() == ops.verdict(*both).item() == expected
        mixed = [payloads], [numbers(5, 6)]
        assert kernels.verdict(*mixed).item() == expected | ops.MISMATCH


@pytest.mark.slow
def test_damaged_aggregates(running):
    """Its header and offsets are checked by every kernel that reads one."""
    if running is program("thread"):
        pytest.skip("entries that a damaged offset doubles are written twice, in any order")
    numel, k = 2000, 20
    dense = torch.zeros(numel)
    dense[5:700:7] = 1.0
    sound = ops.sparsify(dense)
    kernels = Kernels(running)
    for byte in [*range(16), 16, 18, 19, 32, 34, 35]:
        broken = flipped(sound, byte, 0xC6)
        kernels.densify(broken, numel)
        param = torch.ones(numel)
        kernels.apply_([param], broken, 0.1)
        kernels.compress_(torch.zeros(numel), [dense], k, momentum=0.9, aggregate=broken)
    flagged = flipped(sound, 4, 2)
    assert not bool(kernels.densify(flagged, numel).any())


def test_an_index_that_stands_twice_across_pieces(running):
    """Kernels read a bitmap in pieces of 1024 bits, and must know the entry before a piece."""
    numel, k, wire = 4096, 3000, torch.bfloat16
    payloads = payloads_of(1, numel, k, wire, seed=3)
    indices, _, _ = ops.unpack(payloads[0], numel, k, wire)
    bits = torch.arange(k) + indices // reference.BLOCK
    low = section_begin("low bytes", numel, k, wire)
    kernels = Kernels(running, seed=5)
    for border in (1024, 2048):
        first = int((bits < border).sum())
        for i in range(first - 1, first + 2):
            broken = payloads.clone()
            broken[0, low + i] = broken[0, low + i - 1]
            damaged = is_damaged(kernels.merge(broken, numel, k, wire))
            assert damaged == damaged_on_cpu(lambda b=broken: ops.merge(b, numel, k, wire))
            assert damaged or indices[i] // reference.BLOCK > indices[i - 1] // reference.BLOCK


@pytest.mark.parametrize("wire", [torch.bfloat16, FLOAT8, FLOAT4])
def test_damaged_payloads(running, wire):
    """Each byte of a payload changed in turn: the kernels call damaged what the CPU op calls
    damaged, and agree with it on everything else."""
    ranks, numel, k = 3, TILE + 900, 31
    payloads = payloads_of(ranks, numel, k, wire, seed=6)
    kernels = Kernels(running, seed=4)
    memory = torch.zeros(numel)
    found = 0
    bits = (0xFF, 0x01, 0x80) if running is program("plain") else (0xFF,)
    for byte in range(payloads.size(1)):
        for bit in bits:
            broken = payloads.clone()
            broken[1] = flipped(broken[1], byte, bit)
            aggregate = kernels.merge(broken, numel, k, wire)
            damaged = is_damaged(aggregate)
            assert damaged == damaged_on_cpu(lambda b=broken: ops.merge(b, numel, k, wire)), byte
            found += damaged
            if damaged:
                param = [torch.ones(numel)]
                if byte % 8 == 0:
                    kernels.apply_(param, aggregate, 0.1)
                    assert bool((param[0] == 1).all()), byte
            elif byte % 8 == 0:
                assert_same_aggregate(aggregate, ops.merge(broken, numel, k, wire), numel)
        if byte % 5 == 0:
            indices, values, _ = kernels.unpack(broken[1], numel, k, wire)
            assert int(indices.min()) >= -1
            assert int(indices.max()) < numel
            assert bool(values.isfinite().all())
            kernels.restore_(memory, broken[1], k, wire)
            kernels.mask_(memory, broken[1], k, wire)
            assert bool(memory.isfinite().all())
    assert found > 70


def is_damaged(aggregate):
    return bool(aggregate_flags(aggregate) & ops.DAMAGED)


@pytest.mark.parametrize("wire", [torch.bfloat16, FLOAT8, FLOAT4])
def test_bits_that_no_section_owns(running, wire):
    """Whichever of them is set, in whichever rank's payload."""
    numel, k = TILE + 900, 31
    payloads = payloads_of(3, numel, k, wire, seed=6)
    kernels = Kernels(running, seed=4)
    every = 1 if running is program("plain") else 7
    for bit in list(spare_bits(numel, k, wire))[::every]:
        broken = payloads.clone()
        broken[bit % 3] = flipped(broken[bit % 3], bit // 8, 1 << bit % 8)
        assert is_damaged(kernels.merge(broken, numel, k, wire)), bit
        for rank, payload in enumerate(broken):
            indices = kernels.unpack(payload, numel, k, wire)[0]
            assert bool((indices == -1).all()) == (rank == bit % 3), bit


@pytest.mark.parametrize("wire", [torch.float32, FLOAT4])
@pytest.mark.parametrize("damage", ["at the end", "twice", "swapped", "moved"])
def test_damaged_indices(running, damage, wire):
    """An index just past the bucket, one that comes twice, two in the wrong order, an entry in a
    block that does not exist."""
    numel, k = 900, 12
    x = torch.zeros(numel)
    x[[3, 4, *range(300, 309), numel - 1]] = 1.0
    payload = ops.compress_(torch.zeros(numel), [x], k, wire_dtype=wire)
    payloads = torch.stack([payload, payload])
    low, bitmap = payloads[1, 48 : 48 + k], payloads[1, 64:66]
    if damage == "at the end":
        low[-1] += 1
    elif damage == "twice":
        low[4] = low[5]
    elif damage == "swapped":
        low[4:6] = low[4:6].flip(0)
    else:  # 11 0 111111111 0 0 1 0 becomes one that ends with a 1
        assert bitmap.tolist() == [0b11111011, 0b01001111]
        bitmap[1] = 0b10001111
    kernels = Kernels(running, seed=2)
    assert damaged_on_cpu(lambda: ops.merge(payloads, numel, k, wire))
    aggregate = kernels.merge(payloads, numel, k, wire)
    assert aggregate_flags(aggregate) == ops.DAMAGED
    assert not bool(kernels.densify(aggregate, numel).any())
    memory = torch.ones(numel)
    kernels.restore_(memory, payloads[1], k, wire)
    kernels.mask_(memory, payloads[1], k, wire)
    assert bool((memory == 1).all())
    assert bool((kernels.unpack(payloads[1], numel, k, wire)[0] == -1).all())


@pytest.mark.parametrize("wire", [wire for wire in WIRES if wire != FLOAT4])
def test_values_that_are_not_finite(running, wire):
    """Codes of NaN, and of infinity where the type has one, as any of a tile's values."""
    numel, k = 900, 5
    payload = ops.compress_(torch.zeros(numel), [torch.randn(numel)], k, wire_dtype=wire)
    begin = section_begin("values", numel, k, wire)
    kernels = Kernels(running, seed=2)
    nan, infinity = float("nan"), float("inf")
    wrong = (nan, -nan) if wire == FLOAT8 else (nan, infinity, -infinity)
    for value, place in itertools.product(wrong, range(k)):
        payloads = torch.stack([payload, payload])
        codes = payloads[1, begin : begin + k * wire.itemsize].view(wire)
        codes[place] = value
        assert damaged_on_cpu(lambda p=payloads: ops.merge(p, numel, k, wire))
        assert is_damaged(kernels.merge(payloads, numel, k, wire))
        assert bool((kernels.unpack(payloads[1], numel, k, wire)[0] == -1).all())
        memory = torch.ones(numel)
        kernels.restore_(memory, payloads[1], k, wire)
        assert bool((memory == 1).all())


def two_values(n, rng):
    """Far more of one magnitude than there is room for, between a few larger and many smaller."""
    x = torch.where(torch.from_numpy(rng.random(n) < 0.6), 1.0, 1e-3)
    x[::5000] = 2.0
    return x


def mostly_zero(n, rng):
    return torch.where(torch.from_numpy(rng.random(n) < 0.002), gaussian(n, rng), 0.0)


# How: values, what they are multiplied by where the sample does not look, what comes of the guess,
# whether the selection reads memory. Useless guesses count as repairs unless the pass found enough.
GUESSES = {
    "right": (gaussian, 1.0, "useful", False),
    "values far apart": (sixty_orders, 1.0, "useless", False),
    "hardly any values": (mostly_zero, 1.0, "few values", False),
    "nothing but zeros": (VALUES["all zero"], 1.0, "few values", False),
    "far too high": (gaussian, 0.01, "useless", False),
    "far too low": (gaussian, 100.0, "useless", False),
    "zero elsewhere": (gaussian, 0.0, "useless", True),
    "many alike": (two_values, 1.0, "useless", True),
}


@pytest.mark.parametrize("name", GUESSES)
def test_whatever_comes_of_the_guess(running, name):
    """The same bytes on every way that a selection can take, in two steps in a row."""
    values, factor, outcome, from_memory = GUESSES[name]
    numel, k = 20_000, 600
    for seed, wire in zip(seeds(running, len(WIRES)), WIRES[::-1], strict=False):
        rng = np.random.default_rng(seed)
        kernels = Kernels(running, seed=seed)
        state = kernels.select_state(numel, k)
        repairs = 0
        for step in range(2):
            bucket = Bucket(kernels, torch.zeros(numel))
            x = misleading(values(numel, rng) * 4.0**step, k, factor, SMALLEST_SAMPLE)
            bucket.compress([x], k, state, wire_dtype=wire)
            assert (kernels.outcome, kernels.from_memory) == (outcome, from_memory)
            repairs += outcome == "useless" and name != "values far apart"
            assert kernels.repairs == repairs


@pytest.mark.parametrize("nonzero", [0, 1, 49, 50, 51, 3000])
def test_zeros_fill_up(running, nonzero):
    """Fewer values than k: the first zeros are sent, wherever the values are."""
    numel, k = 5 * WORK_TILE + 7, 50 if nonzero < 1000 else 4000
    for seed, wire in zip(seeds(running, len(WIRES)), WIRES[::-1], strict=False):
        rng = np.random.default_rng(seed)
        unseen = torch.ones(numel, dtype=torch.bool)
        unseen[places(numel, k, SMALLEST_SAMPLE)] = False
        (unseen,) = unseen.nonzero(as_tuple=True)
        for at in (unseen[:nonzero], unseen.flip(0)[:nonzero]):
            x = torch.zeros(numel)
            x[1] = -0.0
            x[at] = 1 + gaussian(len(at), rng).abs()
            bucket = Bucket(Kernels(running, seed=seed), torch.zeros(numel))
            bucket.compress([x], k, wire_dtype=wire)
            assert bucket.kernels.outcome == ("few values" if nonzero < k else "useless")


def test_a_change_of_k(running):
    """One state, as large as the largest k needs, and no repair."""
    numel = 20_000
    rng = np.random.default_rng(3)
    bucket = Bucket(Kernels(running, seed=2), torch.zeros(numel))
    state = bucket.kernels.select_state(numel, 5000)
    for k in [5000, 1250, 312, 78, 20, 21, 200, 2000] if running is program("plain") else [900, 90]:
        bucket.compress([gaussian(numel, rng)], k, state)
    assert bucket.kernels.repairs == 0


def test_another_scale_than_last_time(running):
    """What the pass left in memory for last step's scale is set right."""
    numel, k = 3 * WORK_TILE, 60
    rng = np.random.default_rng(3)
    for wire in (FLOAT8, FLOAT4):
        bucket = Bucket(Kernels(running, seed=2), torch.zeros(numel))
        state = bucket.kernels.select_state(numel, k)
        for scale in (1.0, 1.0, 64.0, 1e-3):
            bucket.compress([scale * gaussian(numel, rng)], k, state, wire_dtype=wire)
        bucket.compress([gaussian(numel, rng)], k, state, wire_dtype=torch.bfloat16)


def test_several_wire_tiles(running):
    numel, k = 2 * 65536 + 777, 900
    rng = np.random.default_rng(9)
    x = gaussian(numel, rng)
    x[60000:70000] = 0  # no entries on both sides of a border
    x[65535], x[65536], x[131072] = 9.0, -9.0, 9.0
    bucket = Bucket(Kernels(running, seed=2), torch.zeros(numel))
    state = bucket.kernels.select_state(numel, k)
    aggregate = ops.sparsify(torch.where(gaussian(numel, rng) > 2, 1.5, 0.0))
    for _ in range(2 if running is program("plain") else 1):
        bucket.compress([x], k, state, momentum=0.5, aggregate=aggregate)
    bucket.compress([torch.zeros(numel)], k, state)


def test_more_tiles_than_a_warp_has_lanes(running):
    """Where a warp looks up its tiles more than once, and reads memory itself."""
    numel, k = 3 * 2 * 40 * WORK_TILE + 5, 2000  # three blocks of two warps
    rng = np.random.default_rng(9)
    kernels = Kernels(running, seed=2)
    for values in (gaussian, two_values) if running is program("plain") else (gaussian,):
        Bucket(kernels, torch.zeros(numel)).compress([values(numel, rng)], k)
        assert kernels.from_memory == (values is two_values)


@pytest.fixture(scope="module")
def full_size():
    started = program("plain", small=False)
    yield started
    started.close()


def test_scales_that_jump_and_a_k_that_changes(full_size):
    """The policy of the guess, with the kernels' own sample: hardly a repair."""
    numel, steps = 100_000, 40
    rng = np.random.default_rng(5)
    kernels = Kernels(full_size, seed=2)
    state, memory, scale = kernels.select_state(numel, 4000), torch.zeros(numel), 1.0
    for step in range(steps):
        factor = float(np.exp(rng.uniform(np.log(2), np.log(10))))
        if step % 4 == 3:
            scale *= factor if scale < 1 else 1 / factor
        grad = scale * gaussian(numel, rng)
        kernels.compress_(memory, [grad], 4000 if step % 20 < 10 else 1000, state=state)
    assert kernels.repairs <= 1


@pytest.mark.parametrize("values", ["gaussian", "all equal", "heavy ties"])
def test_sizes_that_users_get(full_size, values):
    """Blocks, tiles and groups as on a GPU, with and without a guess, and a dense merge."""
    numel, k = 140_001, 9000
    rng = np.random.default_rng(11)
    kernels = Kernels(full_size, seed=6)
    bucket = Bucket(kernels, gaussian(numel, rng))
    state = kernels.select_state(numel, k)
    aggregate = ops.sparsify(torch.where(gaussian(numel, rng) > 1.4, 1.5, 0.0))
    sizes = [70_000, 1, 70_000]
    for step in range(3):
        wire = WIRES[step + 2]
        x = VALUES[values](numel, rng) * (1 if step < 2 else 2)
        grads = split(x, sizes, DTYPES)
        payload = bucket.compress(
            grads, k, state, momentum=0.9, aggregate=aggregate, wire_dtype=wire
        )
        payloads = torch.stack([payload, *payloads_of(2, numel, k, wire, seed=step)])
        merged = kernels.merge(payloads, numel, k, wire)
        aggregate = ops.merge(payloads, numel, k, wire)
        assert_same_aggregate(merged, aggregate, numel)


@pytest.mark.parametrize("ranks", [1, 2, 9])
def test_a_tile_that_is_sent_whole(full_size, ranks):
    """Its number of entries does not fit in 16 bits."""
    numel = TILE + 300
    payloads = payloads_of(ranks, numel, numel, torch.bfloat16, seed=1)
    merged = Kernels(full_size, seed=4).merge(payloads, numel, numel, torch.bfloat16)
    assert_same_aggregate(merged, ops.merge(payloads, numel, numel, torch.bfloat16), numel)


def test_every_entry_of_a_block_is_checked(running, full_size):
    """Those that a thread keeps, which its neighbour has the predecessors of, and the rest."""
    numel, k, wire = 900, 12, torch.bfloat16
    x = torch.zeros(numel)
    x[[3, 4, *range(300, 309), numel - 1]] = 1.0
    payload = ops.compress_(torch.zeros(numel), [x], k, wire_dtype=wire)
    for place in range(2, 10):  # of the nine in one block and the one before each
        for swapped in (True, False):
            payloads = torch.stack([payload, payload])
            low = payloads[1, 48 : 48 + k]
            low[place : place + 2] = low[place : place + 2].flip(0) if swapped else low[place]
            for kernels in (Kernels(running), Kernels(full_size)):
                merged = kernels.merge(payloads, numel, k, wire)
                assert is_damaged(merged), (place, swapped)


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16, torch.float16])
def test_a_code_of_ones_at_a_tiles_last_element(full_size, wire):
    """As a thread keeps it, that would be the word for no entry."""
    numel = TILE
    x = torch.zeros(numel)
    x[-1] = 1.0
    payloads = ops.compress_(torch.zeros(numel), [x], 1, wire_dtype=wire).unsqueeze(0)
    kernels = Kernels(full_size)
    assert not is_damaged(kernels.merge(payloads, numel, 1, wire))
    begin = section_begin("values", numel, 1, wire)
    payloads[0, begin : begin + wire.itemsize] = 255
    assert is_damaged(kernels.merge(payloads, numel, 1, wire))


def test_a_whole_tile_in_its_last_block(full_size):
    """As many entries as a tile has elements: modulo 2**16, a block of none."""
    numel, wire = TILE, torch.bfloat16
    payloads = payloads_of(1, numel, numel, wire, seed=1)
    begin = section_begin("bitmap", numel, numel, wire)
    bits = np.ones(numel + TILE // BLOCK, np.uint8)
    bits[: TILE // BLOCK - 1] = bits[-1] = 0
    bitmap = torch.from_numpy(np.packbits(bits, bitorder="little"))
    payloads[0, begin : begin + bitmap.numel()] = bitmap
    assert damaged_on_cpu(lambda: ops.merge(payloads, numel, numel, wire))
    kernels = Kernels(full_size, seed=4)
    assert is_damaged(kernels.merge(payloads, numel, numel, wire))
    assert bool((kernels.unpack(payloads[0], numel, numel, wire)[0] == -1).all())
