"""One worker: resumes, trains, checks every step, and dies where the plan says so."""

from __future__ import annotations

import os
import signal
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import gmc_cuda
from gmc_cuda._engine.exchange import Exchange, GroupLost
from gmc_cuda._engine.fingerprint import fingerprints
from soak.equation import TOLERANCE, Broken, MassEquation, aggregate_of, mean
from soak.plan import SHAPES, Life, Plan
from support.problems import memory_of

CHECK_REPLICAS_EVERY = 10
_AVERAGE = "average.pt"


@dataclass
class Report:
    """What a life was like, as one of its workers saw it.

    Attributes:
        ended: "done" or "lost".
        resumed: the step that it went on from.
        weights: fingerprint of the parameters after each step, which tells whether a step that is
            made again is the same step.
        faults: how often each kind was met, summed over all workers.
    """

    ended: str = ""
    resumed: int = 0
    weights: dict[int, int] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    largest_error: float = 0.0
    replica_checks: int = 0
    scales: set[float] = field(default_factory=set)
    unsent: float = 0.0


def live(say: Any, plan: Plan, life: Life, folder: Path) -> Report:
    """The whole work of one of support.workers.Workers."""
    return _Worker(plan, life, folder).run()


class _Worker:
    def __init__(self, plan: Plan, life: Life, folder: Path) -> None:
        self.plan, self.life, self.folder = plan, life, folder
        torch.manual_seed(plan.seed)
        groups = [[torch.nn.Parameter(torch.randn(s)) for s in shapes] for shapes in SHAPES]
        self.params = [p for group in groups for p in group]
        self.model = torch.nn.ParameterList(self.params)
        forms = ("iterate", "buffer", "buffer")
        self.optimizer = gmc_cuda.GMC(
            [{"params": g, "momentum_form": f} for g, f in zip(groups, forms, strict=True)],
            lr=0.01, weight_decay=1e-3, bucket_cap_mb=3500 * 4 / 2**20,
            check_replicas_every=CHECK_REPLICAS_EVERY,
        )  # fmt: skip
        self.scaler = gmc_cuda.GradScaler("cpu", init_scale=2.0**10, growth_interval=7)
        self.exchange = Exchange(None)
        self.saving: Future[None] | None = None
        self.report = Report()
        self.equation: MassEquation | None = None

    def run(self) -> Report:
        report = self.report
        try:
            report.resumed = self.resume()
            for step in range(report.resumed + 1, self.life.last + 1):
                if (step, self.exchange.rank) == (self.life.last, self.life.killed):
                    self.arrange_death()
                self.step(step)
            if self.life.killed is not None:
                mean(self.exchange, torch.zeros(1))  # the dead do not answer
                raise Broken(f"rank {self.life.killed} was not killed")
            self.stop()
            report.ended = "done"
        except GroupLost as error:
            if self.life.killed is None:
                raise
            report.ended = "lost"
            if "nothing was applied" in str(error):
                assert self.equation is not None
                self.note(self.equation.check_lost())
        report.replica_checks = self.optimizer.stats()["steps"] // CHECK_REPLICAS_EVERY
        report.unsent = float(memory_of(self.optimizer, self.params).norm())
        return report

    def step(self, step: int) -> None:
        plan, optimizer, scaler = self.plan, self.optimizer, self.scaler
        for group, options in zip(optimizer.param_groups, plan.options(step), strict=True):
            group.update(options)
        grads, faults = plan.gradients(step, self.exchange.rank, self.params)
        scaled = plan.scaled(step)
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad if grad is None or not scaled else scaler.scale(grad)
        if plan.clipped(step):
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(self.params, 40.0)
            grads = [p.grad for p in self.params]
        self.equation = equation = MassEquation(optimizer, self.params, grads, scaled)
        if scaled:
            faults["overflows under a scaler"] = int(equation.not_finite > 0)
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        self.note(equation.check())
        if bool(optimizer.last_step_skipped()) != equation.skips:
            raise Broken(f"step {step}: skipped or not, against the gradients")
        self.count(faults, equation.skips)
        self.report.weights[step] = hash(tuple(fingerprints(self.params).tolist()))
        if step % plan.save_every == 0 and step != self.life.last:
            self.save(step)
        elif step == self.life.last and self.life.moment == "while saving":
            self.save(step)
            if self.exchange.rank == self.life.killed:
                _die()

    def note(self, error: float) -> None:
        self.report.largest_error = max(self.report.largest_error, error)

    def count(self, faults: dict[str, int], skipped: bool) -> None:
        kinds = ("values that are not finite", "missing gradients", "overflows under a scaler")
        own = torch.tensor(
            [float(faults.get(kind, 0)) for kind in kinds] + [self.scaler.get_scale()]
        )
        *counts, scale = (mean(self.exchange, own) * self.exchange.size).tolist()
        self.report.faults.update(dict(zip(kinds, map(round, counts), strict=True)))
        self.report.faults["skipped steps"] += skipped
        if scale != self.scaler.get_scale() * self.exchange.size:
            raise Broken("the workers' scales differ")
        self.report.scales.add(self.scaler.get_scale())

    # --------------------------------------------------------------------- leaving and resuming

    def save(self, step: int) -> None:
        """Beside the training; what it held is checked when it is loaded."""
        folder, extra = self.folder / "checkpoint", self.extra(step)
        self.saving = gmc_cuda.checkpoint.save(
            folder, self.model, self.optimizer, extra, wait=False
        )

    def extra(self, step: int) -> dict[str, Any]:
        unsent, aggregate = self.unsent_of_all()
        scaler = self.scaler.state_dict()
        return {"step": step, "scaler": scaler, "unsent": unsent, "aggregate": aggregate}

    def stop(self) -> None:
        last = self.life.last
        if not self.life.saves_average:
            self.save(last)
            assert self.saving is not None
            self.saving.result()
            return
        extra = self.extra(last)
        self.optimizer.average_memory_()
        if self.exchange.rank == 0:
            states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            torch.save(extra | states, self.folder / "part")
            os.replace(self.folder / "part", self.folder / _AVERAGE)

    def resume(self) -> int:
        if self.life.start == "fresh":
            return 0
        if self.life.start == "average":
            state = torch.load(self.folder / _AVERAGE, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            folder = self.folder / "checkpoint"
            state = gmc_cuda.checkpoint.load(folder, self.model, self.optimizer)
        self.scaler.load_state_dict(state["scaler"])
        self.scaler.scale(torch.zeros(()))
        unsent, aggregate = self.unsent_of_all()
        error = float(((unsent - state["unsent"]).abs() / (1 + unsent.abs())).max())
        if error > TOLERANCE or not torch.equal(aggregate, state["aggregate"]):
            raise Broken(f"what is unsent in all was not kept: off by {error:.1e}")
        if not unsent.any():
            raise Broken("nothing was unsent, so that a resume could not lose it")
        return state["step"]

    def unsent_of_all(self) -> tuple[torch.Tensor, torch.Tensor]:
        unsent = mean(self.exchange, memory_of(self.optimizer, self.params))
        return unsent, aggregate_of(self.optimizer, self.params)

    # ----------------------------------------------------------------------------------- dying

    def arrange_death(self) -> None:
        if self.life.moment == "after applying":
            self.optimizer.register_step_post_hook(lambda *_: _die())
        elif self.life.moment == "between two collectives":
            of_step = self.optimizer.engine.round
            send, calls = of_step.send, []

            def send_two(grads: Any) -> Any:
                bucket = send(grads)
                calls.append(bucket)
                if len(calls) == 2:
                    _die()
                return bucket

            of_step.send = send_two


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
