"""The benchmarks, end to end on tiny sizes: what they write, say and leave out. No times."""

import contextlib
import importlib
import io
import itertools
import json
import math
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from benchmarks.ops import (
    budget,
    cases,
    cub_topk,
    data,
    goals,
    options,
    sanitizers,
    step,
    timing,
)
from benchmarks.ops.cases import Case
from benchmarks.ops.problem import Problem
from benchmarks.ops.two_sided import TwoSided, make_problem
from benchmarks.training import ladder, logical_methods, overlap_trace
from gmc_cuda import ops

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TINY = Case(70_001, 0.01, "fp32", "bf16", 4, "gmc", "gaussian")


def run(module, *arguments):
    """What `python -m benchmarks.MODULE` would print and return, without another Python's start."""
    program = importlib.import_module(f"benchmarks.{module}")
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [module, *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            status = program.main()
        except SystemExit as ended:
            status = ended.code
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
    return SimpleNamespace(returncode=status or 0, stdout=out.getvalue(), stderr=err.getvalue())


def read_result(folder, what):
    (path,) = folder.glob(f"{what}-*.json")
    text = path.read_text()
    assert str(folder) not in text
    assert str(Path.home()) not in text
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


PROGRAMS = [".".join(path.relative_to(ROOT / "benchmarks").with_suffix("").parts)
            for path in sorted((ROOT / "benchmarks").rglob("*.py"))
            if "def main() ->" in path.read_text()
            and not path.stem.endswith(("_worker", "_switch"))]  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_help(program):
    done = run(program, "--help")
    assert done.returncode == 0, done.stderr
    assert "--output" in done.stdout or "--results" in done.stdout


def benchmark(module, folder, *arguments):
    quick = ["--quick", "--device", "cpu", "--seconds", "0.05", "--output", str(folder)]
    done = run(module, *quick, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_common(content, what):
    assert content["benchmark"] == what
    assert {"date", "hardware", "versions", "load", "threads", "options", "units", "goals",
            "left_out", "results"} <= content.keys()  # fmt: skip
    assert len(content["load"]["before"]) == 3
    for record in content["results"]:
        assert record["bytes"] > 0
        assert record["gb_per_s"] > 0
        assert record["time"]["rounds"] >= timing.MIN_ROUNDS
        assert record["fraction_of_copy"] * record["times_of_copy"] == pytest.approx(1)
        assert 0 < record["time"]["min_seconds"] <= record["time"]["median_seconds"]


def test_kernels(tmp_path):
    factors = ["--density", "0.01", "--grad-dtype", "fp32", "--wire", "bf16", "--ranks", "8",
               "--method", "gmc"]  # fmt: skip
    printed = benchmark("ops.kernels", tmp_path, "--numel", "20000", *factors,
                        "--data", "gaussian", "zero")  # fmt: skip
    content = read_result(tmp_path, "kernels")
    check_common(content, "kernels")
    assert len(list(tmp_path.glob("kernels-*.png"))) == 1
    assert [r["op"] for r in content["results"]] == [
        *["compress", "merge", "apply"],
        *["compress", "own", "merge", "apply"],  # two-sided
        *["compress", "merge", "apply"],
    ]
    compress, merge, apply = content["results"][:3]
    assert (compress["numel"], compress["k"], compress["ranks"]) == (20_000, 200, 8)
    assert compress["bytes"] == 12 * 20_000
    assert compress["launches"] is None
    assert 0 <= compress["repair_rate"] <= 1
    assert compress["reference"]["name"] == "memory.add_(grad)"
    assert compress["reference"]["ratio"]["median"] > 0
    names = {"eager topk", "compiled topk", "sampled threshold (DGC)"}
    assert {peer["name"] for peer in compress["peers"]} == names
    for peer in compress["peers"]:
        assert peer.get("skipped") or peer["times_slower"]["median"] > 0
    assert merge["peers"][0]["name"] == "eager index_add_"
    assert apply["peers"] == []
    assert content["left_out"]["cub::DeviceTopK"] == "needs a GPU"
    for part in ("left out: all of the GPU's cases", "numbers to reach", "not measured", "eager"):
        assert part in printed
    outcomes = [row["outcome"] for row in content["goals"] if row["what"].startswith("wire")]
    assert outcomes == 6 * ["met"]


@pytest.mark.parametrize("method", ["gmc", "dgc"])
def test_step(tmp_path, method):
    factors = ["--density", "0.01", "--wire", "fp4", "--ranks", "2", "--method", method]
    factors += ["--data", "gaussian"]
    benchmark("ops.step", tmp_path, "--numel", "30001", "--tensors", "3", *factors)
    content = read_result(tmp_path, "step")
    check_common(content, "step")
    fp32, bf16, two_sided = content["results"]
    assert (fp32["op"], fp32["grad_dtype"], bf16["grad_dtype"]) == ("step", "fp32", "bf16")
    expected = ["compress", "merge", "apply"] + (["mask"] if method == "dgc" else [])
    assert list(fp32["stages"]) == expected
    assert list(two_sided["stages"]) == ["compress", "own", *expected[1:]]
    assert two_sided["exchange"] == "reduce_scatter"
    assert fp32["reference"]["name"] == "fused SGD"
    assert (fp32["reference"]["bytes"], bf16["reference"]["bytes"]) == (600_020, 300_010)


def convergence(folder, *arguments):
    done = run("training.convergence", "--task", "digits", "--workers", "2", "--steps", "4",
               "--search-seeds", "1", "--output", str(folder), *arguments)  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = read_result(folder, "convergence-digits-2-workers")
    assert content["complete"]
    assert len(list(folder.glob("convergence-*.png"))) == 1
    return content, done.stdout


@pytest.mark.parametrize("momentum", [0, 0.8])
def test_convergence_at_density_1(tmp_path, momentum):
    """There, and in float32, every sparse method is dense momentum SGD, or plain SGD."""
    methods = ["dense", "gmc:float32", "memsgd:float32", "dgc:float32", "plain:float32"]
    content, printed = convergence(
        tmp_path, "--fixed", "--seeds", "1", "--density", "1", "--lr", "0.1",
        "--momentum", str(momentum), "--methods", *methods,
    )  # fmt: skip
    assert "+0.000" in printed
    loss = {(run["method"], run["seed"]): run["loss"] for run in content["results"]}
    assert len(loss) == len(content["results"]) == 10
    for seed in (0, 1):
        for method in ("gmc:float32", "memsgd:float32"):
            assert loss[method, seed] == pytest.approx(loss["dense", seed], rel=1e-3)
        # Masking takes all momentum away where everything is sent.
        others = {loss["dgc:float32", seed], loss["plain:float32", seed]}
        assert max(others) == pytest.approx(min(others), rel=1e-3)
        assert (max(others) == pytest.approx(loss["dense", seed], rel=1e-2)) == (momentum == 0)


def test_convergence_at_equal_bytes(tmp_path):
    methods = ["gmc:bfloat16", "gmc:float4:reduce_scatter", "dgc:float8"]
    content, _ = convergence(
        tmp_path, "--momentum", "0.3", "0.5", "--seeds", "2", "--finalists", "2",
        "--methods", *methods,
    )  # fmt: skip
    assert list(content["best"]) == methods
    for method, point in content["best"].items():
        runs = [run for run in content["results"] if run["method"] == method]
        tried = {(run["momentum"], run["lr"]): run["loss"] for run in runs if run["seed"] == 0}
        finalists = sorted(tried, key=tried.get)[:2]
        compared = {
            (place, seed): next(
                r["loss"] for r in runs if (r["momentum"], r["lr"], r["seed"]) == (*place, seed)
            )
            for place in finalists
            for seed in (1, 2)
        }
        assert len([run for run in runs if run["seed"] > 0]) == len(compared) == 4
        means = {place: compared[place, 1] + compared[place, 2] for place in finalists}
        assert tuple(point.values()) == min(means, key=means.get)
    for r in content["results"]:
        assert 100 <= r["bytes_ratio"] < 101
        assert r["density"] < 0.03
    some = {run["method"]: run for run in content["results"]}
    float4 = some["gmc:float4:reduce_scatter"]
    seconds = {run["seconds"] for run in content["results"]}
    (path,) = tmp_path.glob("*.json")
    again, _ = convergence(
        tmp_path / "again", "--momentum", "0.3", "0.5", "--seeds", "3", "--finalists", "2",
        "--reuse", str(path), "--methods", *methods,
    )  # fmt: skip
    made = [run for run in again["results"] if run["seconds"] not in seconds]
    assert {(run["method"], run["seed"]) for run in made} == {(method, 3) for method in methods}
    assert len(made) == 2 * len(methods)
    done = run("training.convergence", "--task", "digits", "--reuse", str(path))
    assert "steps is 4 there, 100 here" in done.stderr
    assert float4["k"] > 1.7 * some["gmc:bfloat16"]["k"]
    # Two ranges towards their owners, and what this worker's own one sends to all.
    one = ops.payload_nbytes(float4["parameters"] // 2, float4["k"] // 2, torch.float4_e2m1fn_x2)
    assert float4["bytes"] == pytest.approx(3 * one, rel=0.01)


def test_convergence_at_given_points(tmp_path):
    points = {"dense": (0.5, 0.25), "gmc:float4": (0.3, 0.5)}
    given = [f"{name}={momentum}:{lr}" for name, (momentum, lr) in points.items()]
    done = run("training.convergence", "--task", "digits", "--workers", "2", "--steps", "3",
               "--seeds", "2", "--points", *given, "--output", str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = read_result(tmp_path, "convergence-digits-2-workers-3-steps")
    made = {(r["method"], r["momentum"], r["lr"], r["seed"]) for r in content["results"]}
    assert made == {(name, *point, seed) for name, point in points.items() for seed in (0, 1)}
    for wrong in ("sgd=0.5:0.1", "dense=0.5", "dense=1:0.1"):
        assert "--points" in run("training.convergence", "--points", wrong).stderr


def test_convergence_of_another_width(tmp_path):
    small = ["--workers", "2", "--fixed", "--seeds", "1", "--methods", "dense", "--steps", "2"]
    done = run("training.convergence", "--task", "text", "--width", "16", *small,
               "--output", str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = read_result(tmp_path, "convergence-text-2-workers-16-wide-2-steps")
    assert {run["parameters"] for run in content["results"]} == {15_808}
    for arguments, said in (
        (["--task", "digits", "--width", "16"], "--width needs --task text"),
        (["--task", "text", "--width", "15"], "--width 15 is not a multiple of 4"),
    ):
        assert said in run("training.convergence", *arguments).stderr


@pytest.mark.parametrize(("numel", "ratio", "times"), [(40_000, 100, 1), (470_000, 100, 8)])
def test_a_warm_up_of_density_sends_as_many_bytes(numel, ratio, times):
    options = Namespace(steps=600, bytes_ratio=ratio, density=None)
    ks = [
        logical_methods.entries_by_step(options, numel, torch.float4_e2m1fn_x2, warmup, times)
        for warmup in (False, True)
    ]
    assert ks[1][0] == numel // 4
    assert ks[1] == sorted(ks[1], reverse=True)
    assert len(set(ks[1][60:])) == 1
    sent = [sum(ops.payload_nbytes(numel, k, torch.float4_e2m1fn_x2) for k in each) for each in ks]
    assert 0.98 * sent[0] < sent[1] <= sent[0]


def test_a_warm_up_of_density_that_takes_more_than_all_bytes_is_refused():
    options = Namespace(steps=100, bytes_ratio=100.0, density=None)
    with pytest.raises(ValueError, match="too few for a warm-up"):
        logical_methods.entries_by_step(options, 100_000, torch.float4_e2m1fn_x2, True, 8)


def test_power_sgd_against_closed_forms():
    """Exact where the mean gradient has no higher rank; what is not applied is in the errors."""
    workers, lr, steps = 2, 0.1, 6
    generator = torch.Generator().manual_seed(0)
    options = Namespace(workers=workers, steps=steps)
    for rank, exact in ((2, True), (30, False)):
        params = [torch.nn.Parameter(torch.zeros(30, 40)), torch.nn.Parameter(torch.zeros(7))]
        method = logical_methods.make("powersgd", params, 0.0, options)
        assert method.low == [0]
        assert method.k == 1207 - (1200 - 4 * 70) * 4 / 6
        total = torch.zeros(30, 40)
        for _ in range(steps):
            for worker in range(workers):
                left, right = (torch.randn(n, rank, generator=generator) for n in (30, 40))
                params[0].grad, params[1].grad = left @ right.T, torch.ones(7)
                total += params[0].grad / workers
                method.take(worker)
            method.finish(lr)
        errors = sum(error[0] for error in method.errors) / workers
        torch.testing.assert_close(params[1].data, torch.full((7,), -lr * steps))
        torch.testing.assert_close(params[0].data, -lr * (total - errors), rtol=1e-4, atol=1e-4)
        assert (errors.norm() < 1e-3 * total.norm()) == exact


@pytest.mark.parametrize("valley", [(0.0, 0.01), (0.5, 0.64), (0.9, 5.0), (0.98, 0.1)])
def test_ladder(valley):
    """Wherever the lowest point lies, the search comes to it, and has tried what is beside it."""
    tried = {}

    def loss(momentum, lr):
        scaled = lr / (1 - momentum)
        place = ladder.MOMENTA.index(momentum) - ladder.MOMENTA.index(valley[0])
        tried[momentum, lr] = place**2 + math.log2(scaled / valley[1]) ** 2
        return tried[momentum, lr]

    best, second = ladder.search(loss, 0.7, 1.0, ladder.MOMENTA, fixed=False, finalists=2)
    assert best[0] == valley[0]
    assert 2**-0.25 <= best[1] / (1 - best[0]) / valley[1] <= 2**0.25
    assert [tried[best], tried[second]] == sorted(tried.values())[:2]
    for momentum, lr in (best, second):  # what lies beside them has been tried too
        place = ladder.MOMENTA.index(momentum)
        beside = [(momentum, factor * lr) for factor in (0.5, 2**-0.5, 2**0.5, 2)]
        beside += [
            (other, lr * (1 - other) / (1 - momentum))
            for other in ladder.MOMENTA[max(place - 1, 0) : place + 2]
        ]
        for m, expected in beside:
            assert any(m == n and lr == pytest.approx(expected, 1e-4) for n, lr in tried)
    (start,) = ladder.search(loss, 0.7, 1.0, ladder.MOMENTA, fixed=True)
    assert start == pytest.approx((0.7, 0.3))


def test_ladder_that_only_diverges():
    with pytest.raises(RuntimeError, match=r"diverged at the start, momentum and lr \(0.7, 0.3\)"):
        ladder.search(lambda momentum, lr: math.inf, 0.7, 1.0, ladder.MOMENTA, fixed=False)


def test_limit_leaves_out_what_it_must(tmp_path):
    printed = benchmark("ops.step", tmp_path, "--numel", "1000", "--limit", "0.000001",
                        "--data", "gaussian")  # fmt: skip
    assert "left out: 9 of 10 cases: --limit 1e-06 s was reached" in printed
    assert len(read_result(tmp_path, "step")["results"]) == 1


def test_a_case_that_fails_costs_no_other(tmp_path, monkeypatch):
    real, failing = make_problem, []

    def make(case, *arguments):
        if case.density == 0.003:
            failing.append(case)
            raise torch.OutOfMemoryError("out of memory")
        return real(case, *arguments)

    monkeypatch.setattr(step, "make_problem", make)
    cases = ["--density", "0.01", "0.003", "0.001", "--grad-dtype", "fp32", "--wire", "bf16",
             "--ranks", "8", "--method", "gmc", "--exchange", "all_gather",
             "--data", "gaussian"]  # fmt: skip
    options = ["--device", "cpu", "--seconds", "0.05", "--output", str(tmp_path)]
    done = run("ops.step", *options, "--numel", "1000", *cases)
    assert done.returncode == 1
    assert len(failing) == 1
    content = read_result(tmp_path, "step")
    assert [record["density"] for record in content["results"]] == [0.01, 0.001]
    assert content["left_out"][str(failing[0])] == "OutOfMemoryError: out of memory"


def test_torch_is_all_they_need(tmp_path):
    """On a machine without the demo's packages there is no picture, and the tables are plain."""
    others = ["matplotlib", "numpy", "rich", "sklearn", "tqdm"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({others}))\n"
        "from benchmarks.ops import host, kernels, step\n"
        "sys.exit(kernels.main())"
    )
    options = ["--device", "cpu", "--seconds", "0.05", "--output", str(tmp_path), "--no-peers"]
    options += ["--limit", "0.000001", "--numel", "1000"]
    done = subprocess.run(
        [sys.executable, "-c", code, *options],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "left out: the picture: matplotlib is not installed" in done.stdout
    assert "numbers to reach" in done.stdout
    assert len(read_result(tmp_path, "kernels")["results"]) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--numel", "0"], "must be a number from 1 to 2**31 - 1, got '0'"),
        (["--density", "2"], "must be a number above 0, at most 1, got '2'"),
        (["--ranks", "0"], "must be a whole number above 0, got '0'"),
    ],
)
def test_mistakes_are_named(arguments, words):
    done = run("ops.kernels", *arguments)
    assert done.returncode == 2
    assert words in done.stderr


def test_without_a_gpu_the_gpu_is_refused(tmp_path):
    """One line, at once, and nothing built or written."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ops.kernels", "--device", "cuda"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "kernels: --device cuda: no GPU on this machine that torch can use\n"

    settings = [f"RESULTS={tmp_path}", "VENV=no-such-venv", f"PYTHON={sys.executable}"]
    done = subprocess.run(
        ["make", "--no-print-directory", "gpu", *settings],
        cwd=ROOT, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if "***" not in line]
    assert len(said) == 1
    assert "there is no GPU on this machine" in said[0]
    assert not (ROOT / "no-such-venv").exists()
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------- parts


def test_one_factor_at_a_time():
    chosen = options.parse("x", "x", ["--numel", "100", "1e3", "1e4"])
    assert [case.numel for case in cases.choose(chosen, chosen.numel)][:3] == [100, 1000, 10000]
    # 2 densities, 1 dtype, 2 wire types, 2 ranks, a method, an exchange and 4 data besides it
    assert len(cases.choose(chosen, chosen.numel)) == 3 * 14
    chosen.quick = True
    quick = cases.choose(chosen, chosen.numel)
    assert len(quick) == 3 + 13
    assert {case.numel for case in quick[3:]} == {1000}
    chosen.cross = True
    assert len(cases.choose(chosen, chosen.numel)) == 3 * 3 * 2 * 3 * 3 * 2 * 2 * 5


@pytest.mark.parametrize("kind", options.DATA)
@pytest.mark.parametrize("method", options.METHODS)
def test_problem_keeps_what_is_not_sent(kind, method):
    """Rounds of the benchmark are rounds of the algorithm: memory + sent = what came in."""
    problem = Problem(Case(3000, 0.01, "fp32", "bf16", 3, method, kind), CPU)
    problem.compress(0)
    indices, values, _ = ops.unpack(problem.payload, 3000, 30)
    total = problem.memory.clone()
    total[indices] += values
    expected = problem.gradient.clone()
    if method == "gmc":
        expected += 0.9 * problem.dense_aggregate()
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("method", options.METHODS)
def test_two_sided_problem_keeps_what_is_not_sent(method):
    """Of a worker and, within its range, of the owner."""
    case = replace(TINY, numel=3001, method=method, exchange="reduce_scatter")
    problem = make_problem(case, CPU)
    assert isinstance(problem, TwoSided)
    for turn in range(3):
        before, owned = problem.memory.clone(), problem.owned.clone()
        previous = torch.zeros_like(owned)  # the workers have DGC's momentum
        if method == "gmc":
            previous = 0.9 * ops.densify(problem.own_aggregate, problem.width)
        for stage in problem.stages():
            stage.call(turn)
            if stage.name == "compress":
                sent = problem.memory.clone()
    if method == "gmc":
        assert int((before + problem.gradient - sent).count_nonzero()) <= sum(problem.ks)
    received = sum(
        torch.zeros(problem.width).index_put((i,), v)
        for i, v, _ in (ops.unpack(row, problem.width, problem.k) for row in problem.received)
    )
    answer = problem.dense_aggregate()[: problem.width]
    came_in = owned + previous + received / case.ranks
    torch.testing.assert_close(problem.owned + answer, came_in, rtol=1e-5, atol=1e-5)
    assert int(problem.touched().sum()) == sum(problem.ks)
    assert problem.touched()[problem.dense_aggregate() != 0].all()
    assert budget.merge(problem) < budget.merge(Problem(replace(case, exchange="all_gather"), CPU))


def test_supports_are_independent_with_a_small_pool(monkeypatch):
    monkeypatch.setattr(data, "CPU_CACHE_BYTES", 0)
    problem = Problem(Case(70_001, 0.01, "fp32", "bf16", 8, "gmc", "gaussian"), CPU)
    assert problem.gradients.parts == 4
    assert len(problem.payloads) == 4
    entries = int(problem.touched().sum())
    assert 7.6 * problem.case.k < entries <= 8 * problem.case.k  # they overlap by 3.4 %
    assert not torch.equal(problem.payloads[0], problem.payloads[1])


@pytest.mark.parametrize(("numel", "dtype"), [(1, torch.float32), (1001, torch.bfloat16)])
def test_gradients_are_fresh(monkeypatch, numel, dtype):
    monkeypatch.setattr(data, "CPU_CACHE_BYTES", 0)
    gradients = data.Gradients(numel, dtype, "gaussian", CPU, torch.Generator().manual_seed(0))
    given = [gradients.fresh() for _ in range(20)]
    for one, another in itertools.pairwise(given):
        assert one.numel() == numel
        assert one.data_ptr() % 16 == 0
        first, second = sorted([one.storage_offset(), another.storage_offset()])
        assert second - first > numel - data.ALIGNED
    assert numel == 1 or len({one.storage_offset() for one in given}) > 15


def test_bytes_are_counted():
    assert budget.compress(TINY) == 12 * TINY.numel
    assert budget.compress(Case(10, 0.1, "bf16", "bf16", 8, "gmc", "gaussian")) == 100
    assert budget.compress(Case(10, 0.1, "fp32", "bf16", 8, "dgc", "gaussian")) == 200
    assert budget.sgd(TINY) == 20 * TINY.numel
    one_entry = Case(64, 1 / 64, "fp32", "bf16", 1, "gmc", "zero")  # at index 0
    problem = Problem(one_entry, CPU)
    assert budget.apply(problem) == budget.ENTRY + 2 * budget.CPU_LINE
    assert budget.merge(problem) == ops.payload_nbytes(64, 1) + budget.ENTRY


def test_ratios_are_taken_within_rounds():
    ratio = timing.ratio({0: 2.0, 1: 40.0, 2: 3.0}, {0: 1.0, 1: 10.0, 2: 2.0, 3: 0.5})
    assert ratio["median"] == 2.0
    assert ratio["rounds"] == 3
    assert ratio["of_shortest"] == 4.0


def test_a_peer_that_fails_or_is_slow_is_skipped_and_ours_is_not():
    def fail(_):
        raise RuntimeError("no compiler\nand more")

    peer = timing.Participant("peer", [timing.Stage("x", fail)], cap=1.0)
    slow = timing.Participant("slow", [timing.Stage("x", lambda _: sum(range(10**6)))], cap=1e-9)
    fine = timing.Participant("fine", [timing.Stage("x", lambda _: None)])
    timing.run_rounds([peer, slow, fine], CPU, 0.01)
    assert peer.skipped == "RuntimeError: no compiler"
    assert not peer.total()
    assert "over the cap" in slow.skipped
    assert len(fine.total()) >= timing.MIN_ROUNDS
    ours = timing.Participant("ours", [timing.Stage("x", fail)])
    with pytest.raises(RuntimeError, match="no compiler"):
        timing.run_rounds([ours], CPU, 0.01)


def test_a_miss_is_said():
    record = {"op": "compress", "numel": 25_000_000, **goals.CENTRE, "peers": [],
              "reference": {"ratio": {"median": 1.51}}}  # fmt: skip
    rows = goals.for_kernels([record], "cpu")
    (row,) = (row for row in rows if row["what"].startswith("compress, CPU"))
    assert (row["measured"], row["outcome"]) == ("1.51x", "missed")
    record["reference"]["ratio"]["median"] = 1.5
    rows = goals.for_kernels([record], "cpu")
    assert [row["outcome"] for row in rows if row["what"] == rows[-3]["what"]] == ["met"]
    gpu = {**record, "numel": 10**9, "times_of_copy": 1.2,
           "peers": [{"name": goals.CUB, "times_slower": {"median": 2.0}}]}  # fmt: skip
    outcomes = {row["what"]: row["outcome"] for row in goals.for_kernels([gpu], "cuda")}
    assert outcomes["compress, GPU, 1e9: time over a copy of 12 B per element"] == "missed"
    assert outcomes["compress, GPU, 1e9: cub::DeviceTopK takes this many times longer"] == "missed"


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (0, "9 passed\n========= ERROR SUMMARY: 0 errors", "passed"),
        (86, "9 passed\n========= ERROR SUMMARY: 3 errors", "3 errors (see the log)"),
        (86, "RACECHECK SUMMARY: 2 hazards displayed (2 errors)", "2 errors (see the log)"),
        (0, "9 passed\n RACECHECK SUMMARY: 0 hazards displayed (0 errors)", "passed"),
        (0, "9 skipped\n========= ERROR SUMMARY: 0 errors", "failed with exit status 0"),
        (255, "========= Error: Device not supported", "not run: compute-sanitizer does not"),
        (None, "", "not finished in 90 s"),
    ],
)
def test_sanitizers_verdict(status, said, expected):
    assert sanitizers.verdict(status, said, 90).startswith(expected)


def test_cub_peer_compiles(tmp_path):
    if cub_topk.headers() is None or not cub_topk.find_toolkits({}):
        pytest.skip("no CCCL 3.2 headers, or no CUDA toolkit")
    cub_topk.build(tmp_path / "libcub_topk.so", ["90"])
    assert (tmp_path / "libcub_topk.so").stat().st_size > 0


def test_cub_peer_is_left_out_with_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(cub_topk, "headers", lambda: None)
    monkeypatch.setattr(cub_topk, "find_toolkits", lambda _: [object()])
    with pytest.raises(OSError, match="pip install nvidia-cuda-cccl"):
        cub_topk.build(tmp_path / "x", ["90"])


def test_host(tmp_path):
    done = run("ops.host", "--tensors", "5", "--steps", "12", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    content = read_result(tmp_path, "host")
    assert content["options"]["tensors"] == 5
    assert content["ratio"] > 0
    assert set(content["seconds"]) == {"gmc_cuda.GMC", "fused SGD"}
    assert f"ratio {content['ratio']:.2f}, goal 1.3 or less" in done.stdout


# ---------------------------------------------------------------------- what several workers do


def test_overlap_trace(tmp_path):
    tiny = ["--steps", "2", "--layers", "3", "--width", "64", "--batch", "8"]
    done = run("training.overlap_trace", *tiny, "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    content = read_result(tmp_path, "overlap")
    assert len(list(tmp_path.glob("overlap-*.png"))) == 1
    lanes = content["lanes"]
    per_step = {"forward": 1, "backward": 1, "step()": 1, "compress": 3, "communicate": 3,
                "merge, apply": 6}  # fmt: skip
    assert {lane: len(spans) for lane, spans in lanes.items()} == {
        lane: 2 * count for lane, count in per_step.items()
    }
    # All is compressed during the backward pass; how soon gloo's threads take it up, the load says.
    assert overlap_trace.share_under(lanes["compress"], lanes["backward"]) == pytest.approx(1)
    for compressed, (start, _) in zip(lanes["compress"], lanes["communicate"], strict=True):
        assert compressed[1] <= start
    assert f"{100 * content['share_of_communication_under_backward']:.0f} %" in done.stdout


def test_share_of_time_under_other_spans():
    assert overlap_trace.share_under([[0, 4], [10, 12]], [[3, 5], [9, 11]]) == pytest.approx(2 / 6)


def test_local_updates(tmp_path):
    settings = [
        {"name": "dense", "lr": 0.7, "momentum": 0.9, "density": 1.0, "nesterov": True},
        {"name": "sparse", "lr": 1.0, "momentum": 0.0, "density": 0.02, "overlap": True},
    ]
    small = ["--workers", "2", "--rounds", "2", "--every", "2", "--batch", "1"]
    done = run("training.local_updates", *small, "--settings", json.dumps(settings),
               "--output", str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    content = read_result(tmp_path, "local-updates-2-rounds-of-2")
    assert content["not_tried"] == []
    assert content["options"]["every"] == 2
    dense, sparse = content["results"]
    assert settings[0].items() <= dense.items()
    assert settings[1].items() <= sparse.items()
    assert dense["rounds"] == sparse["rounds"] == 2
    assert dense["bytes_per_round"] >= dense["dense_bytes_per_round"]
    assert 60 < dense["bytes_sent"] / sparse["bytes_sent"] < 66  # 3.1 bytes for an entry
    assert 4 < sparse["loss"] < 7
    assert dense["link_ratio"] == pytest.approx(1, rel=0.01)
    again = [settings[0], {"name": "more", "outer": "DGC", "lr": 1.0, "density": 0.05,
                           "wire_dtype": "float4", "exchange": "reduce_scatter"}]  # fmt: skip
    done = run("training.local_updates", *small, "--settings", json.dumps(again),
               "--output", str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = read_result(tmp_path, "local-updates-2-rounds-of-2")["results"]
    assert results[:2] == [dense, sparse]
    assert [r["name"] for r in results[2:]] == ["more"]
    assert 45 < results[2]["link_ratio"] < 50
