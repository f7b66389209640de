"""One run of a benchmark, from the command line to the files."""

import argparse
import gc
import logging
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.ops import budget, cases, peers, report
from benchmarks.ops.cases import Case
from benchmarks.ops.launches import count
from benchmarks.ops.options import NUMELS, parse
from benchmarks.ops.problem import Problem
from benchmarks.ops.timing import Participant, ratio, summary
from benchmarks.report import file_stem, load, write_json
from examples.demo.provenance import provenance
from gmc_cuda import ops

WARM_UP = {"cpu": 20, "cuda": 60}  # rounds until the guess has settled
PEER_CAP = {"cpu": 4.0, "cuda": 2.0}  # seconds for one call of a peer

Measure = Callable[["Session", Case], list[dict]]


def main(
    what: str, description: str, measure: Measure, find_goals: Callable[[list[dict], str], list]
) -> int:
    options = parse(f"python -m benchmarks.ops.{what}", description.split("\n")[0], sys.argv[1:])
    return Session(what, options).run(measure, find_goals)


class Session:
    def __init__(self, what: str, options: argparse.Namespace) -> None:
        self.what, self.options = what, options
        self.left_out: dict[str, str] = {}
        # torch.compile imports it, and it warns of there being no GPU, which is no news.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        self.device = self._pick_device()
        self.facts = provenance(self.device)
        self.load_before = load()

    def run(self, measure: Measure, find_goals: Callable[[list[dict], str], list[dict]]) -> int:
        started = time.monotonic()
        chosen = cases.choose(self.options, self.options.numel or NUMELS[self.device.type])
        Path(self.options.output).mkdir(parents=True, exist_ok=True)  # fail now, not at the end
        hardware = self.facts["hardware"]
        print(
            f"{self.what}: {hardware['gpu'] or hardware['processor']}, torch {torch.__version__}, "
            f"Python {platform.python_version()}, {torch.get_num_threads()} threads, "
            f"load {self.load_before[0]:g}; {len(chosen)} cases",
            flush=True,
        )
        records: list[dict] = []
        failed = 0
        for case in chosen:
            if records and self.options.limit and time.monotonic() - started > self.options.limit:
                cases_left = len(chosen) - chosen.index(case)
                self.left_out[f"{cases_left} of {len(chosen)} cases"] = (
                    f"--limit {self.options.limit:g} s was reached"
                )
                break
            need, free = budget.device_memory(case, self.with_peers(case)), self._free()
            if need > 0.95 * free:
                self.left_out[f"numel {case.numel:,}"] = (
                    f"needs about {need / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
                )
                continue
            try:
                made = measure(self, case)
            except Exception as error:  # such as too little memory: the other cases count as much
                failed += 1
                traceback.print_exc()
                words = str(error).strip().splitlines() or [""]
                self.left_out[str(case)] = f"{type(error).__name__}: {words[0]}"
                continue
            for record in made:
                print(report.case_line(record), flush=True)
            records += made
            rows = find_goals(records, self.device.type)
            self._write(records, rows, time.monotonic() - started)  # should the next be its last
        if not records:
            report.print_left_out(self.left_out)
            print(f"{self.what}: no case could be measured", file=sys.stderr)
            return 1
        path = self._write(records, rows, time.monotonic() - started)
        print(f"\nnumbers: {path}")
        self._draw(path, records)
        report.print_left_out(self.left_out)
        report.print_goals(rows)
        cores = hardware["cores"]
        if self.device.type == "cpu" and self.load_before[0] > 0.5 * cores:
            print(
                f"This machine was not quiet (load {self.load_before[0]:g} on {cores} cores): "
                "threads that wait for\neach other then lose whole time slices of several ms. "
                "Repeat it when it is quiet; if it never is,\nOMP_WAIT_POLICY=PASSIVE makes the "
                "waiting cheaper."
            )
        return 1 if failed else 0

    def with_peers(self, case: Case) -> bool:
        return case.peers and not self.options.no_peers and case.exchange == "all_gather"

    def ours(self, problem: Problem) -> Participant:
        def settled() -> None:
            problem.repairs_before = problem.repairs()

        warm_up = WARM_UP[self.device.type]
        return Participant(
            "gmc_cuda", problem.stages(), warm_up=warm_up, settled=settled, every_round=True
        )

    def record(
        self, op: str, case: Case, times: dict[int, float], nbytes: int, copy: float
    ) -> dict:
        """What all ops have in common; `copy` is the bandwidth of a copy, in bytes per second."""
        mine = summary(list(times.values()))
        rate = nbytes / mine.median
        return {
            "op": op,
            **case.to_json(),
            "time": mine.to_json(),
            "bytes": nbytes,
            "gb_per_s": rate / 1e9,
            "copy_gb_per_s": copy / 1e9,
            "fraction_of_copy": rate / copy,
            "times_of_copy": copy / rate,
            "launches": None,
            "reference": None,
            "peers": [],
        }

    def compare(self, one: Participant, times: dict[int, float]) -> dict:
        """A peer's entry; times_slower are within rounds."""
        if one.skipped:
            self.left_out[one.name] = one.skipped
            return {"name": one.name, "skipped": one.skipped}
        theirs = one.total()
        return {
            "name": one.name,
            "time": summary(list(theirs.values())).to_json(),
            "times_slower": ratio(theirs, times),
        }

    def refer(self, one: Participant, times: dict[int, float]) -> dict:
        """The reference's entry; the ratio is our time over its time, within rounds."""
        theirs = one.total()
        return {
            "name": one.name,
            "time": summary(list(theirs.values())).to_json(),
            "ratio": ratio(times, theirs),
        }

    def repairs(self, problem: Problem, rounds: int) -> dict:
        """Over the timed rounds."""
        repairs = problem.repairs() - problem.repairs_before
        return {"repairs": repairs, "repair_rate": repairs / rounds}

    def launches(self, problem: Problem) -> dict[str, dict[str, int]]:
        try:
            return count(problem.stages(), self.device) or {}
        except Exception as error:  # where counters are refused, times are had all the same
            self.left_out["launches"] = f"the profiler: {type(error).__name__}: {error}"
            return {}

    def _pick_device(self) -> torch.device:
        wanted = self.options.device
        reason = "" if torch.cuda.is_available() else "no GPU on this machine that torch can use"
        if not reason:
            try:
                ops.sparsify(torch.zeros(1, device="cuda"))
            except NotImplementedError:
                reason = "gmc_cuda was built without CUDA (build it with FORCE_CUDA=1)"
        if wanted == "cuda" and reason:
            sys.exit(f"{self.what}: --device cuda: {reason}")
        if wanted == "cpu" or reason:
            self.left_out["all of the GPU's cases"] = reason or "--device cpu"
            return torch.device("cpu")
        self.left_out["all of the CPU's cases"] = "a run of its own: --device cpu"
        return torch.device("cuda", torch.cuda.current_device())

    def _free(self) -> int:
        gc.collect()  # the case before, with its closures
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return budget.free_memory(self.device)

    def _write(self, records: list[dict], rows: list[dict], took: float) -> Path:
        options = {n: v for n, v in vars(self.options).items() if n != "output"}
        content = {
            "benchmark": self.what,
            **self.facts,
            "load": {"before": self.load_before, "after": load()},
            "threads": torch.get_num_threads(),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
            "took_seconds": round(took, 1),
            "options": {**options, "device": self.device.type},
            "units": {
                "time": "seconds, over rounds",
                "bytes": "that must move: each input read once, each output written once",
                "gb_per_s": "1e9 bytes per second, bytes over the median time",
                "ratio, times_slower": "of times within a round: ours over the reference's, the "
                "peer's over ours",
            },
            "goals": rows,
            "left_out": self.left_out,
            "results": records,
        }
        stem = Path(self.options.output, file_stem(self.what, self.facts))
        path = stem.with_name(stem.name + ".json")
        write_json(path, content)
        return path

    def _draw(self, path: Path, records: list[dict]) -> None:
        try:
            from benchmarks.ops import roofline
        except ModuleNotFoundError as error:
            self.left_out["the picture"] = f"{error.name} is not installed"
            return
        picture = path.with_suffix(".png")
        hardware = self.facts["hardware"]
        roofline.save(picture, f"{self.what}: {hardware['gpu'] or hardware['processor']}", records)
        print(f"picture: {picture}")


def bandwidth(copy: Participant, nbytes: int) -> float:
    """Bytes per second of the copies of this case's rounds."""
    return nbytes / summary(list(copy.total().values())).median


def peers_of(session: Session, problem: Problem) -> tuple[list[Participant], list[Participant]]:
    """Those of compress, those of merge."""
    cap = PEER_CAP[session.device.type]
    return (
        peers.for_compress(problem, cap, session.left_out),
        [peers.for_merge(problem, cap)],
    )
