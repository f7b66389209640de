"""The torch.optim.Optimizer around an engine, which GMC and DGC share."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gmc_cuda._engine import checks, comparison, engine, steps
from gmc_cuda._engine import state as states
from gmc_cuda._engine.bucket import figures
from gmc_cuda._engine.engine import Engine, Settings
from gmc_cuda._engine.exchange import Exchange
from gmc_cuda._engine.round import numbers
from gmc_cuda._engine.rules import Rule
from gmc_cuda._engine.watch import DamageWatch


class CompressedSGD(torch.optim.Optimizer):
    """A torch.optim.Optimizer whose steps an engine makes: the base class of GMC and DGC.

    Attributes:
        engine: the engine, for other modules of gmc_cuda.
    """

    engine: Engine

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        rule: Rule,
        settings: Settings,
        process_group: Any,
        broadcast_parameters: bool,
    ) -> None:
        exchange = Exchange(process_group)
        try:
            settings.check()
            rule.check_facts(settings.overlap)
            super().__init__(params, {**rule.options, **checks.one_budget(defaults)})
            engine.check_params(self, rule, settings, exchange)
            facts: dict[str, Any] | Exception = engine.describe(self, rule, settings)
        except Exception as error:
            facts = error
        device = engine.device_of(self)
        call = f"the constructor of {type(self).__name__}"
        number = comparison.require_equal(exchange, facts, device, next(numbers), call)
        if broadcast_parameters:
            engine.broadcast(exchange, self.param_groups, device)
        self._attach(Engine(self, rule, settings, exchange, number))
        self.engine.warn_of_growth(self.param_groups, stacklevel=4)

    def _attach(self, engine: Engine) -> None:
        self.engine = engine
        self.register_state_dict_post_hook(_complete)

    @property
    def wire_dtype(self) -> torch.dtype:
        """The dtype of the values sent."""
        return self.engine.settings.wire_dtype

    @property
    def overlap(self) -> bool:
        """Whether buckets are sent during the backward pass."""
        return self.engine.settings.overlap

    @property
    def exchange(self) -> str:
        """The way payloads travel, "all_gather" or "reduce_scatter"."""
        return self.engine.settings.exchange

    @property
    def nonfinite(self) -> str:
        """What a non-finite gradient makes of a step, "skip" or "raise"."""
        return self.engine.settings.nonfinite

    @property
    def process_group(self) -> Any:
        """The process group to train with. Set it on a copy that came from another process."""
        return self.engine.exchange.group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self.engine.refuse_open_round("a new process_group")
        exchange = Exchange(group)
        engine.check_params(self, self.engine.rule, self.engine.settings, exchange)
        self.engine.set_exchange(exchange)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, with rank 0's parameters. All workers must call it.

        Raises:
            ValueError, TypeError: the group cannot be used, or the workers differ; nothing was
                changed.
        """
        param_group = checks.one_budget(param_group)
        own = self.__dict__.get("engine")
        if own is None:  # torch's constructor calls it too
            super().add_param_group(param_group)
            return
        own.refuse_open_round("add_param_group")
        known = len(self.param_groups)
        try:
            try:
                super().add_param_group(param_group)
                engine.check_params(self, own.rule, own.settings, own.exchange)
                facts: dict[str, Any] | Exception = comparison.describe(self, own.rule.compared)
            except Exception as error:
                facts = error
            comparison.require_equal(own.exchange, facts, engine.device_of(self))
        except Exception:
            del self.param_groups[known:]
            raise
        engine.broadcast(own.exchange, self.param_groups[known:], engine.device_of(self))
        own.round.forget_sizes()
        own.pack()
        own.warn_of_growth(self.param_groups[known:], stacklevel=3)

    # ------------------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Compresses, exchanges and applies. All workers must call it.

        Args:
            closure: reevaluates the model and returns the loss, as in torch.optim.

        Returns:
            What the closure returned.

        Raises:
            ValueError, TypeError: a parameter, option, state or gradient cannot be used, and
                nothing was sent; or, on every worker, the workers' options differ.
            FloatingPointError: on every worker, with ``nonfinite="raise"``, if one of them met a
                non-finite gradient. The finite gradients of the step stay in memory.
            RuntimeError: another worker left the step by an exception, a damaged payload arrived,
                or the process group was lost. The step was not made on this worker.

        After an error the gradients that had been compressed are in memory, and their ``.grad`` is
        None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        made = self.engine.round.made
        try:
            self.engine.begin()
            steps.raise_first(self.engine.finish())
        except BaseException:
            self.engine.cancel(made)
            # A scaler deletes these only after a step without an error, and the next scaler.step()
            # would multiply its scale by what it finds.
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients as torch.optim does.

        With ``overlap=True`` it also ends a backward pass that no step() has followed: what was
        sent of it returns to memory, for the next step. All workers must end such a pass alike: one
        that gives up a whole pass alone, where the others make the step, stays a step behind, and
        every later step raises ValueError on every worker: restart them from a checkpoint.
        """
        self.engine.cancel()
        super().zero_grad(set_to_none)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulates gradients without sending them, as in DistributedDataParallel.

        Needed only with ``overlap=True``, around every backward pass but the last before step().
        """
        with self.engine.paused():
            yield

    def release(self) -> None:
        """Removes this optimizer's hooks from the parameters (``overlap=True``).

        Call it before another optimizer trains the same parameters, if this one stays alive.
        """
        self.engine.release()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # It is True only for torch's scaler, which must call step() on every worker, even if only
        # one met an overflow. Lightning would refuse gradient clipping because of it.
        return sys._getframe(1).f_globals.get("__name__") == torch.amp.grad_scaler.__name__

    def last_step_skipped(self) -> Tensor | None:
        """Whether the last step was skipped: bool [1] on the device.

        None before the first step, and after a step that failed before there was a verdict.
        """
        verdict = self.engine.round.verdict
        return None if verdict is None else verdict != 0

    # ------------------------------------------------------------- saving, loading and copying

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a ``state_dict()`` of the same optimizer class, or of torch.optim.SGD.

        No collective. Memory stays float32 whatever the parameters' dtype. Options that an old
        state lacks keep their present values.

        Raises:
            ValueError, TypeError: the state does not fit, or is of another shard of the parameters;
                nothing was changed.

        Warns:
            UserWarning: another rank saved the memory, and it is not the mean of all.
        """
        own, exchange = self.engine, self.engine.exchange
        own.refuse_open_round("load_state_dict")
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            if changed is not None:
                state_dict = changed
        loaded = states.read(
            state_dict, self.param_groups, own.rule, type(self).__name__, own.shard_place()
        )
        for g, group in enumerate(loaded.groups):
            engine.check_group(group, g, own.rule)
        _ = own.buckets  # raises for parameters that cannot be trained
        states.warn_of_another_ranks(loaded.held, loaded.stamp, exchange.rank, exchange.size)
        for group, new in zip(self.param_groups, loaded.groups, strict=True):
            group.update(new)
        own.install(loaded.held, None if loaded.stamp is None else loaded.stamp.world_size)
        for param, entries in loaded.others.items():
            if entries:
                self.state[param].update(entries)
        own.round.damage = DamageWatch()
        own.averaged = loaded.stamp is not None and loaded.stamp.averaged
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    @torch.no_grad()
    def average_memory_(self) -> None:
        """Replaces each worker's memory (and local momentum) by the mean over all workers.

        All workers must call it. The sum of what is unsent stays, and with it the run: afterwards
        all workers have the same state, for checkpoints that keep rank 0's only. It needs a second
        copy of the memory while it runs.

        Raises:
            RuntimeError: another worker did not call it within the time-out of the process group,
                or the group was lost; this worker's memory is what it was.
        """
        self.engine.refuse_open_round("average_memory_")
        self.engine.average_memory()

    def __getstate__(self) -> dict[str, Any]:
        own = self.engine
        own.refuse_open_round("a copy")
        held = own.held()
        state = {
            param: {**entry, **{k: v.clone() for k, v in held.get(param, {}).items()}}
            for param, entry in self.state.items()
        }
        return {
            "defaults": self.defaults,
            "param_groups": self.param_groups,
            "state": state,
            "engine": (own.rule, own.settings, own.exchange, own.round.number),
            "progress": own.progress(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "progress" not in state:  # a state of torch.optim, without an engine
            super().__setstate__(state)
            return
        state = dict(state)
        arguments, progress = state.pop("engine"), state.pop("progress")
        rule, settings, exchange, number = arguments
        owner = settings.owner(exchange)
        entries = states.for_owner(state["state"], progress["size"], owner)
        super().__setstate__({**state, "state": defaultdict(dict, entries)})
        self._attach(Engine(self, rule, settings, exchange, number))
        self.engine.set_progress(progress)
        stamp = states.Stamp(
            type(self).__name__, progress.get("rank", exchange.rank), progress["size"],
            progress["averaged"],
        )  # fmt: skip
        states.warn_of_another_ranks(entries, stamp, exchange.rank, exchange.size)

    # --------------------------------------------------------------------------------- figures

    def stats(self) -> dict[str, Any]:
        """Statistics of the run so far. Reads the device.

        Returns:
            A dict with
            steps, skipped_steps: their numbers so far;
            bytes_per_step: bytes that this worker passed to the collectives of the last step;
            link_bytes_sent, link_bytes_received: bytes of the last step on its link, by direction;
            dense_bytes_per_step: bytes of a float32 gradient;
            bytes_ratio: how many times fewer bytes the link carried than a ring all-reduce of that
            gradient needs; 0 before the first step;
            density: the share of entries sent; 0 before the first step;
            repairs: selections that had to read all of memory again.
        """
        own = self.engine
        return figures(own.buckets, own.round.steps, own.round.skipped, own.exchange.size)


def _complete(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    assert isinstance(optimizer, CompressedSGD)
    own = optimizer.engine
    own.refuse_open_round("state_dict")
    shard, shards = own.shard_place() or (None, None)
    stamp = states.Stamp(
        type(optimizer).__name__, own.exchange.rank, own.exchange.size, own.averaged,
        shard=shard, shards=shards,
    )  # fmt: skip
    states.add(state_dict, engine.params_of(optimizer), own.held(), stamp)
