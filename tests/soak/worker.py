"""One worker: resumes, trains, checks every step, and suffers what the plan says."""

from __future__ import annotations

import os
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import gmc_cuda
from gmc_cuda._engine.exchange import Exchange, GroupLost
from gmc_cuda._engine.fingerprint import fingerprints
from soak.disturbances import BACK, TOWARDS, before_collective, damage, die, pause
from soak.equation import TOLERANCE, Broken, Lost, MassEquation, aggregate_of, check_lost, mean
from soak.plan import (
    AFTER_APPLYING,
    BEFORE_ANSWER,
    BETWEEN,
    DAMAGED,
    SHAPES,
    TIME_OUT,
    TOO_LONG,
    WHILE_SAVING,
    Life,
    Plan,
)
from support.problems import memory_of

CHECK_REPLICAS_EVERY = 10
A_MOMENT = 0.3  # seconds of a pause that only delays
_AVERAGE = "average.pt"


@dataclass
class Report:
    """What a life was like, as one of its workers saw it.

    Attributes:
        ended: "done", "lost", "damaged", or "killed" for a worker's last words.
        resumed: the step that it went on from.
        weights: fingerprint of the parameters after each step, which tells whether a step that is
            made again is the same step.
        faults: how often each kind was met, summed over all workers.
        lost: what a step that was lost between its two halves has left here.
    """

    ended: str = ""
    resumed: int = 0
    weights: dict[int, int] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    largest_error: float = 0.0
    replica_checks: int = 0
    scales: set[float] = field(default_factory=set)
    unsent: float = 0.0
    lost: Lost | None = None


def live(say: Any, plan: Plan, life: Life, folder: Path) -> Report:
    """The whole work of one of support.workers.Workers."""
    return _Worker(say, plan, life, folder).run()


class _Worker:
    def __init__(self, say: Any, plan: Plan, life: Life, folder: Path) -> None:
        self.say, self.plan, self.life, self.folder = say, plan, life, folder
        torch.manual_seed(plan.seed)
        groups = [[torch.nn.Parameter(torch.randn(s)) for s in shapes] for shapes in SHAPES]
        self.params = [p for group in groups for p in group]
        self.model = torch.nn.ParameterList(self.params)
        forms = ("iterate", "buffer", "buffer")
        self.optimizer = gmc_cuda.GMC(
            [{"params": g, "momentum_form": f} for g, f in zip(groups, forms, strict=True)],
            lr=0.01, weight_decay=1e-3, bucket_cap_mb=3500 * 4 / 2**20,
            check_replicas_every=CHECK_REPLICAS_EVERY, exchange=plan.exchange,
        )  # fmt: skip
        self.scaler = gmc_cuda.GradScaler("cpu", init_scale=2.0**10, growth_interval=7)
        self.exchange = Exchange(None)
        self.saving: Future[None] | None = None
        self.report = Report()
        self.equation: MassEquation | None = None

    @property
    def is_victim(self) -> bool:
        return self.exchange.rank == self.life.victim

    def run(self) -> Report:
        report = self.report
        try:
            report.resumed = self.resume()
            for step in range(report.resumed + 1, self.life.last + 1):
                if step == self.life.last and self.is_victim:
                    self.arrange_end(step)
                self.step(step)
            if self.life.victim is not None:
                mean(self.exchange, torch.zeros(1))  # the dead do not answer
                raise Broken(f"rank {self.life.victim} should have {self.life.event[4:]}")
            self.stop()
            report.ended = "done"
        except RuntimeError as error:
            self.end(error)
        report.replica_checks = self.optimizer.stats()["steps"] // CHECK_REPLICAS_EVERY
        report.unsent = float(memory_of(self.optimizer, self.params).norm())
        return report

    def end(self, error: RuntimeError) -> None:
        """What an error leaves that ends this life; raises it again if it should not have come."""
        assert self.equation is not None
        event = self.life.event
        if event == DAMAGED and self.is_victim and "damaged" in str(error):
            self.report.ended = "damaged"
            if not self.plan.two_sided:  # where owners have taken in what was sent, and gone on
                self.note(check_lost([self.equation.lost()]))
            return
        if self.life.victim is None or not isinstance(error, GroupLost):
            raise error
        self.report.ended = "lost"
        if "nothing was applied" in str(error):
            self.report.lost = self.equation.lost()
            if event != BEFORE_ANSWER:
                self.note(check_lost([self.report.lost]))

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
        faults |= self.disturb(step)
        self.equation = equation = MassEquation(optimizer, self.params, grads, scaled)
        called_off = False
        if scaled:
            faults["overflows under a scaler"] = int(equation.not_finite > 0)
            scaler.step(optimizer)
            scaler.update()
        elif plan.damaged(step):
            called_off = True
            self.check_calls_off(step)
        else:
            optimizer.step()
        self.report.weights[step] = hash(tuple(fingerprints(self.params).tolist()))
        self.note(equation.check(called_off))
        if bool(optimizer.last_step_skipped()) != (equation.skips or called_off):
            raise Broken(f"step {step}: skipped or not, against the gradients")
        self.count(faults, equation.skips)
        if step % plan.save_every == 0 and step != self.life.last:
            self.save(step)
        elif step == self.life.last and self.life.event == WHILE_SAVING:
            self.save(step)
            if self.is_victim:
                die()

    def disturb(self, step: int) -> dict[str, int]:
        """Arranges what this step must cope with, and returns the faults that this worker has."""
        plan, rank, exchange = self.plan, self.exchange.rank, self.optimizer.engine.exchange
        faults = {"pauses": 0, "payloads damaged on the way to an owner": 0}
        if plan.paused(step) == rank:
            before_collective(exchange, 2, lambda: pause(A_MOMENT))
            faults["pauses"] = 1
        damaged = plan.damaged(step)
        if damaged and damaged[0] == rank:
            _, sender, byte = damaged
            damage(exchange, sender, byte, TOWARDS)
            faults["payloads damaged on the way to an owner"] = 1
        return faults

    def check_calls_off(self, step: int) -> None:
        """The owner that got the damage says whose it was; no worker makes the step."""
        damaged = self.plan.damaged(step)
        assert damaged is not None
        owner, sender, _ = damaged
        expected = "another worker left it by an exception"
        if self.exchange.rank == owner:
            expected = f"payload of rank {sender} is damaged"
        try:
            self.optimizer.step()
        except RuntimeError as error:
            if expected not in str(error):
                raise
            return
        raise Broken(f"step {step}: a damaged payload was not noticed")

    def note(self, error: float) -> None:
        self.report.largest_error = max(self.report.largest_error, error)

    def count(self, faults: dict[str, int], skipped: bool) -> None:
        kinds = (
            "values that are not finite", "missing gradients", "overflows under a scaler", "pauses",
            "payloads damaged on the way to an owner",
        )  # fmt: skip
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
        first = self.saving is None and self.life.start == "fresh"
        self.saving = gmc_cuda.checkpoint.save(
            folder, self.model, self.optimizer, extra, wait=False
        )
        if first:  # the next life resumes from it, whenever this one is killed
            self.saving.result()

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

    # -------------------------------------------------------------------------------- the end

    def arrange_end(self, step: int) -> None:
        """Arranges what happens to this worker in the last step of its life."""
        event, exchange = self.life.event, self.optimizer.engine.exchange
        if event == AFTER_APPLYING:
            self.optimizer.register_step_post_hook(lambda *_: die())
        elif event == BETWEEN:
            before_collective(exchange, 3, die)
        elif event == BEFORE_ANSWER:
            before_collective(exchange, 1, self.say_and_die, BACK)
        elif event == TOO_LONG:
            before_collective(exchange, 2, lambda: pause(1.5 * TIME_OUT))
        elif event == DAMAGED:
            sender = (self.exchange.rank + 1) % self.exchange.size
            damage(exchange, sender, self.plan.byte(step), BACK)

    def say_and_die(self) -> None:
        """Dies when all that the workers have sent to the owners has arrived."""
        time.sleep(1.0)
        assert self.equation is not None
        self.say(Report(ended="killed", lost=self.equation.in_hand()))
        die()
