"""The executor: correct samples pass under every seed and flavour, each planted bug is seen."""

import numpy as np
import pytest

from emulator.compilation import FLAVOURS, HERE, CompileError, build
from emulator.program import At, KernelFault, Program

SAMPLES = HERE / "samples"
KERNELS = sorted(SAMPLES.glob("*.cu"))


def program(flavour, broken=None, bug=None):
    """All samples, with one source broken by -DBUG_<bug>."""
    sources = [(path, [f"BUG_{bug}"] if path.stem == broken else []) for path in KERNELS]
    return Program(build([*sources, SAMPLES / "cases.cpp"], flavour, include=[SAMPLES]))


@pytest.fixture(scope="module", params=FLAVOURS)
def samples(request):
    with program(request.param) as running:
        yield running


def check_sum(samples, seed):
    x = np.random.default_rng(seed).integers(-50, 50, 700).astype(np.int32)
    total = samples.call("sum", seed=seed, x=x, blocks=3)["total"]
    assert total.tolist() == [x.sum() % 2**32, (x < 0).sum()]


def check_scan(samples, seed):
    x = np.random.default_rng(seed).integers(0, 2**32, 150, dtype=np.uint32)
    out = samples.call("scan", seed=seed, x=x)["out"]
    np.testing.assert_array_equal(out, np.cumsum(x, dtype=np.uint32))


def check_compact(samples, seed):
    x = np.random.default_rng(seed).standard_normal(300 + seed).astype(np.float32)
    out = samples.call("compact", seed=seed, x=At(x, 4 * (seed % 64)))
    np.testing.assert_array_equal(out["out"][: out["count"][0]], x[x > 0])


def check_last_block(samples, seed):
    x = np.random.default_rng(seed).integers(-(2**31), 2**31, 700).astype(np.int32)
    ticket = np.zeros(1, np.uint32)
    out = samples.call("last_block", seed=seed, watchdog=0.3, x=x, ticket=ticket, blocks=4)
    assert (out["out"][0], out["ticket"][0]) == (x.max(), 0)


def check_early(samples, seed):
    x, y = np.random.default_rng(seed).integers(1, 1000, (2, 200)).astype(np.int32)
    out = samples.call("early", seed=seed, x=x, y=y)
    np.testing.assert_array_equal(out["out"], 6 * x + y[::-1])
    assert not out["x"].any()


def check_streams(samples, seed):
    x = np.random.default_rng(seed).integers(1, 1000, 200).astype(np.int32)
    out = samples.call("streams", seed=seed, x=x)
    np.testing.assert_array_equal(out["out"], 3 * x[::-1])
    assert out["sum"][0] == 3 * x.sum()


CHECKS = [check_sum, check_scan, check_compact, check_last_block, check_early, check_streams]


@pytest.mark.parametrize("check", CHECKS)
def test_correct_kernels_pass_under_every_schedule(samples, check):
    for seed in range(20):
        check(samples, seed)


def check_warp(samples, seed):
    x = np.random.default_rng(seed).integers(0, 2**32, 32, dtype=np.uint32)
    out = samples.call("warp", seed=seed, x=x)["out"].reshape(32, 16).T
    lanes = np.arange(32)
    ballot = sum(1 << int(lane) for lane in lanes[x % 2 == 1])
    halves = [np.bitwise_or.reduce(x[:16])] * 16 + [np.bitwise_and.reduce(x[16:])] * 16
    expected = [
        x[[5] * 32],
        x[lanes // 8 * 8 + (lanes + 1) % 8],
        x[np.where(lanes < 3, lanes, lanes - 3)],
        x[np.where(lanes % 16 > 12, lanes, lanes + 3) % 32],
        x[lanes ^ 9],
        [ballot] * 32,
        [1] * 32,
        [0] * 32,
        [x.sum(dtype=np.uint32)] * 32,
        [x.view(np.int32).min().view(np.uint32)] * 32,
        [x.max()] * 32,
        [np.bitwise_xor.reduce(x)] * 32,
        [sum(1 << int(lane) for lane in lanes[x % 4 == value % 4]) for value in x],
        halves,
        x[lanes ^ 1],
        [(x % 2).sum()] * 32,
    ]
    for result, wanted in zip(out, expected, strict=True):
        np.testing.assert_array_equal(result, np.asarray(wanted, np.uint32))


def check_atomics(samples, seed):
    x = np.random.default_rng(seed).integers(0, 2**32, 192, dtype=np.uint32)
    start = np.array([2**32 - 1, 0, 2**31 - 1, 2**32 - 1, 0, 0, 3, 4, 0, 1], np.uint32)
    expected = [
        x.min(),
        x.max(),
        x.view(np.int32).min().view(np.uint32),
        np.bitwise_and.reduce(x | 0xFFFF),
        np.bitwise_or.reduce(x & 0xFFFF),
        np.bitwise_xor.reduce(x),
        (3 + 192) % 10,
        (4 - 192) % 10,
        -int(x.sum(dtype=np.int64)) % 2**32,
        pow(3, 192, 65521),
    ]
    out = samples.call("atomics", seed=seed, x=x, out=start)["out"]
    assert out.tolist() == [int(value) for value in expected]


@pytest.mark.parametrize("check", [check_warp, check_atomics])
def test_warp_functions_and_atomics(samples, check):
    for seed in range(5):
        check(samples, seed)


def test_bit_functions(samples):
    x = np.random.default_rng(0).integers(0, 2**32, 64, dtype=np.uint32)
    x[:3] = 0, 1, 2**31
    out = samples.call("bits", x=x)["out"].reshape(64, 8)
    for row, value, following in zip(out, x.tolist(), np.roll(x, -1).tolist(), strict=True):
        wide, text = following << 32 | value, f"{value:032b}"
        permuted = [value & 255, following & 255, value >> 8 & 255, following >> 8 & 255]
        assert row.tolist() == [
            text.count("1"),
            text[::-1].find("1") + 1,
            (text + "1").find("1"),
            int(text[::-1], 2),
            value * following >> 32,
            (wide << 9) % 2**64 >> 32,
            (wide >> 9) % 2**32,
            int.from_bytes(bytes(permuted), "little"),
        ]


def test_atomics_let_other_threads_run():
    with program("plain") as samples:
        for seed in range(1, 9):
            out = samples.call("turns", seed=seed, turn=np.zeros(1, np.uint32))["out"]
            assert out.tolist() == list(range(63, -1, -1))


@pytest.mark.parametrize("broken", ["sum", "scan"])  # static and dynamic shared memory
def test_unwritten_shared_memory_is_junk(broken):
    x = np.arange(64, dtype=np.int32)
    for seed in range(4):
        with program("plain", broken, "UNINITIALISED") as samples:  # a new process: zeros elsewhere
            if broken == "sum":
                assert samples.call("sum", seed=seed, x=x, blocks=1)["total"][1] != 0
            else:
                assert samples.call("scan", seed=seed, x=x.view(np.uint32))["out"][0] != 0


# Each bug: the check that must fail, the flavour that sees it under any seed, and its report.
# No report: the result is wrong.
BUGS = {
    "MISSING_BARRIER": (check_scan, "thread", "data race"),
    "MISSING_LAST_BARRIER": (check_scan, "thread", "data race"),
    "MISSING_SYNCWARP": (check_compact, "thread", "data race"),
    "MISSING_FENCE": (check_last_block, "thread", "data race"),
    "PLAIN_INCREMENT": (check_sum, "thread", "data race"),
    "PLAIN_TOTAL": (check_sum, "thread", "data race"),
    "OUT_OF_BOUNDS_SHARED": (check_scan, "address", "use-after-poison"),
    "OUT_OF_BOUNDS_STATIC": (check_sum, "address", "global-buffer-overflow"),
    "OUT_OF_BOUNDS_GLOBAL": (check_scan, "address", "heap-buffer-overflow"),
    "MISALIGNED": (check_compact, "address", "misaligned address"),
    "SPIN": (check_last_block, "plain", "watchdog: one block"),
    "SILENT_SPIN": (check_last_block, "plain", "watchdog: one block"),
    "EARLY_EXIT": (check_scan, "plain", "has left the kernel"),
    "DIVERGENT_BARRIER": (check_scan, "plain", "divergent barrier: thread"),
    "MISSING_LANE": (check_compact, "plain", "divergent warp: thread"),
    "MISSING_WAIT": (check_last_block, "plain", "never called cudaGridDependencySynchronize"),
    "FLOAT_ATOMIC": (check_sum, "plain", "float atomic: atomicAdd"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_seen(bug):
    check, flavour, report = BUGS[bug]
    with program(flavour, check.__name__.removeprefix("check_"), bug) as samples:
        # The thread sanitizer starts anew after each fault, which takes it a while.
        for seed in range(1, 2 if flavour == "thread" else 4):
            with pytest.raises(KernelFault if report else AssertionError, match=report):
                check(samples, seed)


# Each bug: the check that fails under some orders, in which a launch starts early or another stream
# comes first. The thread sanitizer sees it in any order.
BUGS_BETWEEN_LAUNCHES = {
    "READ_TOO_EARLY": check_early,
    "WRITE_TOO_EARLY": check_early,
    "MISSING_WAIT_ON_ONE_PATH": check_early,
    "TRIGGER_TOO_EARLY": check_early,
    "MISSING_EVENT": check_streams,
    "MEMSET_ON_THE_OTHER_STREAM": check_streams,
}


@pytest.mark.parametrize("flavour", ["plain", "address"])
@pytest.mark.parametrize("bug", BUGS_BETWEEN_LAUNCHES)
def test_some_orders_show_a_bug_between_launches(bug, flavour):
    check = BUGS_BETWEEN_LAUNCHES[bug]
    wrong = []
    with program(flavour, check.__name__.removeprefix("check_"), bug) as samples:
        for seed in range(41):
            try:
                check(samples, seed)
            except AssertionError:
                wrong.append(seed)
    assert 0 not in wrong  # the order of the calls
    assert 6 <= len(wrong) <= 34, wrong


@pytest.mark.parametrize("bug", [*BUGS_BETWEEN_LAUNCHES, "HOST_WAITS_FOR_THE_OTHER_STREAM"])
def test_the_thread_sanitizer_sees_a_bug_between_launches(bug):
    check = BUGS_BETWEEN_LAUNCHES.get(bug, check_streams)
    with program("thread", check.__name__.removeprefix("check_"), bug) as samples:
        for seed in range(4):
            with pytest.raises(KernelFault, match="data race"):
                check(samples, seed)


def test_the_host_must_wait_for_the_stream_that_it_reads_from():
    with program("plain", "streams", "HOST_WAITS_FOR_THE_OTHER_STREAM") as samples:
        for seed in range(10):
            with pytest.raises(AssertionError):
                check_streams(samples, seed)


def test_a_launch_without_a_trigger_ends_before_the_next_one_starts():
    bug = "READ_TOO_EARLY_WITHOUT_A_TRIGGER"
    with program("plain", "early", bug) as samples:
        for seed in range(20):
            check_early(samples, seed)
    # Its end alone makes nothing visible.
    with program("thread", "early", bug) as samples, pytest.raises(KernelFault, match="data race"):
        check_early(samples, 1)


def test_watchdog_of_the_thread_sanitizer():
    for bug in ("SPIN", "SILENT_SPIN"):
        with (
            program("thread", "last_block", bug) as samples,
            pytest.raises(KernelFault, match=r"watchdog: one block|data race"),
        ):
            check_last_block(samples, 1)


def test_most_schedules_show_a_missing_barrier():
    for broken, bug, check in (
        ("scan", "MISSING_BARRIER", check_scan),
        ("scan", "MISSING_LAST_BARRIER", check_scan),
        ("compact", "MISSING_SYNCWARP", check_compact),
        ("sum", "MISSING_BARRIER", check_sum),
    ):
        wrong = 0
        with program("plain", broken, bug) as samples:
            for seed in range(1, 21):
                try:
                    check(samples, seed)
                except AssertionError:
                    wrong += 1
        assert wrong >= 10, (bug, wrong)


def test_report_names_kernel_block_and_thread():
    with program("plain", "scan", "EARLY_EXIT") as samples, pytest.raises(KernelFault) as caught:
        samples.call("scan", seed=0, x=np.ones(70, np.uint32))
    text = str(caught.value)
    assert "scan_kernel<64>" in text
    assert "block (0, 0, 0)" in text
    assert "thread (0, 0, 0) waits in __syncthreads at " in text
    assert "scan.cu:" in text
    assert "thread (6, 0, 0) has left the kernel" in text


def test_report_of_the_address_sanitizer_names_them_too():
    for bug in ("OUT_OF_BOUNDS_SHARED", "OUT_OF_BOUNDS_GLOBAL"):
        with program("address", "scan", bug) as samples, pytest.raises(KernelFault) as caught:
            samples.call("scan", seed=0, x=np.ones(64 + 6, np.uint32))
        text = str(caught.value)
        thread = 63 if bug == "OUT_OF_BOUNDS_SHARED" else 6
        assert "scan_kernel<64>" in text
        assert f"block (0, 0, 0), thread ({thread}, 0, 0)" in text


def test_a_seed_repeats_its_schedule():
    with program("plain", "sum", "MISSING_BARRIER") as samples:
        x = np.arange(700, dtype=np.int32)
        runs = [samples.call("sum", seed=7, x=x, blocks=3)["total"].tolist() for _ in range(3)]
        other = [samples.call("sum", seed=8, x=x, blocks=3)["total"].tolist()]
    assert runs[0] == runs[1] == runs[2] != other


def test_a_program_goes_on_after_a_fault(samples):
    with pytest.raises(KernelFault, match="needs an array x"):
        samples.call("sum", blocks=3)
    with pytest.raises(KernelFault, match=r"no CUDA_CASE\(unknown\)"):
        samples.call("unknown")
    with pytest.raises(KernelFault, match="items of 8 bytes, but the case reads 4"):
        samples.call("sum", x=np.ones(3), blocks=3)
    with pytest.raises(KernelFault, match="cudaErrorInvalidConfiguration"):
        samples.call("sum", x=np.ones(3, np.int32), blocks=0)
    with pytest.raises(TypeError, match="x has dtype bool"):
        samples.call("sum", x=np.ones(3, bool), blocks=3)
    check_sum(samples, 1)


@pytest.mark.parametrize(
    "body, message",
    [
        ("__shared__ int row[n];", "local variables"),
        ("static __shared__ int row[n];", r"row: put the function .* anonymous namespace"),
        ("static int row[n];", r"row is not __shared__"),
    ],
)
def test_refused_variables(tmp_path, body, message):
    source = tmp_path / "kernel.cu"
    source.write_text(
        "#include <cuda_runtime.h>\n"
        f"template <int n> __global__ void kernel(int* out) {{ {body} row[threadIdx.x] = n;"
        "__syncthreads(); *out = row[0]; }\n"
        "template __global__ void kernel<3>(int*);\n"
    )
    with pytest.raises(CompileError, match=message):
        build([source], "plain")


def test_more_threads_than_the_thread_sanitizer_keeps():
    x = np.arange(5000, dtype=np.int32)
    with program("thread") as samples:
        for seed in (1, 2):
            total = samples.call("sum", seed=seed, x=x, blocks=40)["total"]
            assert total.tolist() == [x.sum(), 0]
    with program("thread", "sum", "PLAIN_TOTAL") as samples, pytest.raises(KernelFault):
        samples.call("sum", x=x, blocks=40)
