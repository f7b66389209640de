"""Local-update training (DiLoCo): inner steps by any optimizer, and an exchange every H steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import suppress
from itertools import chain
from numbers import Real
from operator import attrgetter, is_
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from gmc_cuda._engine import comparison, ddp_guard, engine
from gmc_cuda._engine import state as states
from gmc_cuda._engine.bucket import DTYPES, in_storage_order
from gmc_cuda._engine.exchange import Exchange, GroupLost
from gmc_cuda._engine.meeting import meet
from gmc_cuda._engine.optimizer import CompressedSGD
from gmc_cuda._engine.steps import raise_first
from gmc_cuda._engine.wrapper import Failed, Wrapper, raised_by_constructor
from gmc_cuda.optim import GMC

_KEY = "local_updates"  # key in each param group of a state_dict, of what no parameter has
_OUTER = "outer."  # prefix of the outer optimizer's keys in a parameter's state
_START = _OUTER + "start"
_AHEAD = _OUTER + "ahead"
_ROUND_SKIPPED = (
    "It was a round of LocalUpdates: a worker's inner optimizer that has met a NaN keeps it in its "
    "state, and then every round is skipped. "
)

_kind = attrgetter("requires_grad", "dtype", "layout", "shape")


class LocalUpdates(Wrapper):
    """Trains each worker alone for H steps of an inner optimizer, then exchanges what they moved.

    In a round each worker moves to its own w_k. The outer optimizer takes what it has moved as the
    gradient, and its result is w on all workers. What a worker has not sent stays in its outer
    memory u_k for later rounds, and the worker starts the next round from w - step_ahead * u_k::

        inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
        optimizer = gmc_cuda.LocalUpdates(inner, every=20)
        scheduler = CosineAnnealingLR(optimizer, steps)    # of the inner learning rate

    It is used like the inner optimizer: ``step()``, ``zero_grad()``, ``param_groups``, ``state``.
    ``optimizer.outer`` is the outer one, a :class:`gmc_cuda.GMC` over float32 copies of the
    parameters, whose options may be changed between rounds. All workers must make the same number
    of steps. The workers' parameters differ: call :meth:`synchronize` on all of them before the
    model is evaluated or saved.

    Layers may be frozen and unfrozen, and parameters be replaced, added, removed, converted and
    moved at any time, on all workers alike; a round exchanges what was trained in any of its steps.
    A frozen one rests at the common w. One that is trained from some step on begins with rank 0's
    values. Weights may be loaded until the first step; what is written to a trained parameter later
    counts as what it has moved.

    Args:
        inner_optimizer: any ``torch.optim.Optimizer``; nothing of it is communicated. What it
            trains is float32, bfloat16 or float16; frozen parameters may be anything.
        outer: makes the outer optimizer from a list of parameters, for example
            ``functools.partial(gmc_cuda.GMC, lr=0.7, density=0.02)``. Default: GMC with
            ``DEFAULTS``.
        every: H, inner steps in a round.
        overlap: exchange during the next round, and apply the result at its end, one round late.
            Until then each worker continues from its own parameters.
        step_ahead: the share of what it has not sent that a worker keeps in its parameters, 0 to 1.
            With 0 the worker starts each round from w. It then repeats the movement that is still
            in its memory and adds it to the memory again, which learns clearly worse.

    Raises:
        TypeError, ValueError: an argument cannot be used, or the workers differ. If only one worker
            met the error, the others raise RuntimeError with its rank and reason.

    Sources: Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models";
    for step_ahead, Xu, Huo, Huang, "Step-Ahead Error Feedback for Distributed Training with
    Compressed Gradient".
    """

    # What waits in memory acts late, like momentum. So in trials momentum added nothing, but larger
    # steps and a decay of old entries did (docs/results.md).
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "lr": 2.0,
        "momentum": 0.0,
        "density": 0.02,
        "memory_decay": 0.95,
    }
    _COPIED = (
        "inner", "outer", "_every", "overlap", "_step_ahead", "_copies", "_new", "_seen", "_kinds",
        "_unread", "_written", "_since", "_on_the_way", "_ahead",
    )  # fmt: skip

    # Without this, tensors made inside torch.inference_mode() could not be changed later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        inner_optimizer: torch.optim.Optimizer,
        outer: Callable[[list[Tensor]], CompressedSGD] | None = None,
        every: int = 20,
        *,
        overlap: bool = False,
        step_ahead: float = 1.0,
    ) -> None:
        # Not super().__init__(): param_groups and state are the inner optimizer's.
        self.inner, self._every, self.overlap = inner_optimizer, every, overlap
        self._step_ahead = step_ahead
        # The outer optimizer's parameters, by inner parameter.
        self._copies: dict[Tensor, nn.Parameter] = {}
        self._new: list[Tensor] = []  # parameters whose copy still has each worker's own values
        self._seen: list[Tensor] = []
        self._kinds: list[Any] = []
        self._unread: list[Tensor] = []  # parameters whose copy was made before any step
        # Those of them that were written to since then; None once the workers have compared these.
        self._written: list[Tensor] | None = []
        self._since = 0  # inner steps since the last exchange
        # What this worker has sent, and not applied.
        self._on_the_way: dict[Tensor, Tensor] | None = None
        # By parameter: the share of its memory by which it began the round ahead of the copy.
        self._ahead: dict[Tensor, float] = {}
        try:
            _check_arguments(inner_optimizer, outer, every, step_ahead)
            self._make_hooks()
            states.make_place(self.inner.param_groups, _KEY)
            self._check_kinds()
            trained = [p for p in self._params() if p.requires_grad]
            self._copies = {p: nn.Parameter(_float32(p)) for p in trained}
        except Exception as error:
            _raise_everywhere(error, outer)
        # If all parameters are frozen, the outer optimizer gets an empty one.
        copies: list[Tensor] = list(self._copies.values())
        nothing = torch.empty(0, dtype=torch.float32, device="cpu")
        copies = copies or [nn.Parameter(nothing, requires_grad=False)]
        self.outer = _make_outer(functools.partial(GMC, **self.DEFAULTS), outer, copies)
        exchange = self.outer.engine.exchange
        facts = {
            "every": every, "overlap": overlap, "step_ahead": step_ahead,
            "inner optimizer": type(self.inner).__name__,
        }  # fmt: skip
        comparison.require_equal(
            exchange,
            facts | self._model(),
            engine.device_of(self.inner),
            call="the constructor of LocalUpdates",
        )
        frozen = [p for p in self._params() if not p.requires_grad]
        engine.broadcast(exchange, [{"params": frozen}], engine.device_of(self.inner))
        self._follow()
        self._new = []  # the outer optimizer has broadcast rank 0's values
        self._set_to_begun(self._copies)
        self._unread = trained

    # ------------------------------------------------------------- what the inner optimizer has

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> Any:
        """The inner optimizer's state, for reading and writing."""
        return _State(self.inner)

    @state.setter
    def state(self, state: Any) -> None:
        self.inner.state = state.inner.state if isinstance(state, _State) else state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.inner.defaults

    @property
    def every(self) -> int:
        """H. It may be changed at any step, on all workers alike."""
        return self._every

    @every.setter
    def every(self, every: int) -> None:
        _check_every(every)
        self._every = every

    @property
    def step_ahead(self) -> float:
        """It may be changed at any step, and counts from the next round on."""
        return self._step_ahead

    @step_ahead.setter
    def step_ahead(self, step_ahead: float) -> None:
        _check_step_ahead(step_ahead)
        self._step_ahead = step_ahead

    def __getattr__(self, name: str) -> Any:
        # Some optimizers have further methods, such as train() and eval().
        if name == "inner" or name.startswith("_"):
            raise AttributeError(f"'LocalUpdates' object has no attribute '{name}'")
        return getattr(self.inner, name)

    def __repr__(self) -> str:
        return f"LocalUpdates(every={self.every},\ninner={self.inner!r},\nouter={self.outer!r})"

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    @property
    def process_group(self) -> Any:
        """The outer optimizer's process group. Set it on a copy that came from another process."""
        return self.outer.process_group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self.outer.process_group = group

    # ------------------------------------------------------------- parameters and their copies

    def _params(self) -> list[Tensor]:
        return engine.params_of(self.inner)

    def _model(self) -> dict[str, Any]:
        """The facts about the inner optimizer's parameters, which must be equal on all workers."""
        model = ("number of ", "shape of ", "dtype of ", "requires_grad of ")
        facts = comparison.describe(self.inner)
        return {name: fact for name, fact in facts.items() if name.startswith(model)}

    def _check_kinds(self) -> None:
        for g, group in enumerate(self.inner.param_groups):
            for i, param in enumerate(group["params"]):
                dense = param.layout == torch.strided
                if param.requires_grad and not (dense and param.dtype in DTYPES):
                    raise TypeError(
                        f"params: {comparison.parameter_name(group, i)} of group {g}: got "
                        f"{param.dtype if dense else param.layout}, must be dense torch.float32, "
                        "torch.bfloat16 or torch.float16 to be trained, since what it moved is "
                        "exchanged in float32: convert it (model.float(), where it is float64), or "
                        "freeze it (parameter.requires_grad_(False))"
                    )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _follow(self) -> None:
        """Makes a copy of each newly trained parameter, before it moves."""
        params = self._params()
        kinds = list(map(_kind, params))
        same = len(params) == len(self._seen) and all(map(is_, params, self._seen))
        if same and kinds == self._kinds:
            return
        self._check_kinds()
        between_rounds = self._since == 0
        for param in params:
            copy = self._copies.get(param)
            if not param.requires_grad:
                # Else it may have moved in this round, or will with the gradient that it has.
                if copy is not None and between_rounds and param.grad is None:
                    copy.requires_grad_(False)
                    self._back_to_common(param)
            elif copy is None or copy.shape != param.shape:
                self._put(param, _float32(param))
                self._new.append(param)
            elif not copy.requires_grad:
                if copy.device != param.device:
                    self._put(param, copy.detach().to(param.device))
                    copy = self._copies[param]
                copy.requires_grad_(True)
                if self._on_the_way is None or param not in self._on_the_way:
                    _take_over(copy, param)  # what was written while it was frozen
                    self._new.append(param)
        self._seen, self._kinds = params, kinds

    @torch.inference_mode(False)
    @torch.no_grad()
    def _read_written(self) -> None:
        """Takes over what was written to parameters after their copies were made."""
        for param in self._unread:
            copy = self._copies.get(param)
            if copy is None or not copy.requires_grad or param.is_meta:
                continue
            kept = _take_over(copy, param)
            if self._written is not None and not kept.all():
                self._written.append(param)
        self._unread = []

    def _agree_on(self, written_to: list[Tensor]) -> None:
        """Gives all workers rank 0's values of what any of them has written to. Collective."""
        exchange, params = self.outer.engine.exchange, self._params()
        places = {param: i for i, param in enumerate(params)}
        written = [places[param] for param in written_to if param in places]
        everyones = exchange.gather_objects(written, engine.device_of(self.inner))
        known = set(self._new)
        found = (params[i] for i in sorted(set(chain.from_iterable(everyones))))
        self._new += [param for param in found if param in self._copies and param not in known]
        self._written = None

    def _put(self, param: Tensor, value: Tensor) -> None:
        """Makes this value the parameter's copy, which takes over the old copy's state."""
        copy, old = nn.Parameter(value), self._copies.get(param)
        groups, state = self.outer.param_groups, self.outer.state
        if old is not None and old.shape == copy.shape:
            for group in groups:
                group["params"] = [copy if p is old else p for p in group["params"]]
            if old in state:
                state[copy] = state.pop(old)
        else:
            self._drop(param)
            groups[0]["params"] = [*groups[0]["params"], copy]
        self._copies[param] = copy

    def _drop(self, param: Tensor) -> None:
        copy = self._copies.pop(param, None)
        self._ahead.pop(param, None)
        if copy is not None:
            for group in self.outer.param_groups:
                group["params"] = [p for p in group["params"] if p is not copy]
            self.outer.state.pop(copy, None)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _tidy(self) -> None:
        """Drops the copies of removed parameters, and moves copies to their parameters' device.

        Must not be called while an exchange is on its way, whose result goes to the old copies.
        """
        present = set(self._params())
        for param in self._copies.keys() - present:
            self._drop(param)
        self._new = [p for p in self._new if p in present]
        for param, copy in list(self._copies.items()):
            if copy.device != param.device:
                self._put(param, copy.detach().to(param.device))
                self._copies[param].requires_grad_(copy.requires_grad)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the inner optimizer, with rank 0's values. All workers must call it.

        Raises:
            TypeError, ValueError, RuntimeError: as the constructor, on every worker; nothing was
                changed.
        """
        self._refuse_open_exchange("add_param_group()")
        known = len(self.inner.param_groups)
        exchange = self.outer.engine.exchange
        try:
            try:
                self.inner.add_param_group(param_group)
                states.make_place(self.inner.param_groups, _KEY)
                self._check_kinds()
                facts: dict[str, Any] | Exception = self._model()
            except Exception as error:
                facts = error
            comparison.require_equal(exchange, facts, engine.device_of(self.inner))
        except Exception:
            del self.inner.param_groups[known:]
            raise
        engine.broadcast(exchange, self.inner.param_groups[known:], engine.device_of(self.inner))
        self._follow()

    # -------------------------------------------------------------------------------- the steps

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes an inner step, and every H-th time the exchange. All workers must call it.

        With a GradScaler, a worker whose gradients overflowed skips its inner step alone.

        Returns:
            What the inner optimizer's step() returned.

        Raises:
            TypeError: a newly trained parameter cannot be trained; nothing was changed.
            ValueError, RuntimeError: the exchange failed, see :meth:`gmc_cuda.GMC.step`. The inner
                step was made, and no movement is lost: the next step ends the round.
        """
        with self._scaling_ends():
            self._take_notice()
            if self._since == 0:
                self._go_ahead()
            loss = self._inner_step(closure)
            self._since += 1
            if self._since >= self.every:
                self._end_round()
        return loss

    def _take_notice(self) -> None:
        """Follows what users have changed since the last step."""
        self._follow()
        self._read_written()
        if self._written is not None:
            self._agree_on(self._written)

    def _inner_step(self, closure: Callable[[], Any] | None) -> Any:
        found_inf = self.__dict__.get("found_inf")
        scale = self.__dict__.get("grad_scale")
        if not isinstance(found_inf, Tensor):
            return self.inner.step(closure)
        if found_inf.item():
            return None
        if scale is not None:
            for param in self._params():
                if param.grad is not None:
                    param.grad.div_(scale)
        return self.inner.step(closure)

    @torch.no_grad()
    def _end_round(self) -> None:
        if ddp_guard.is_due(self.outer.engine.round.steps):
            ddp_guard.refuse_communicating(self._params(), self.outer.process_group)
        present = set(self._params())
        moved = {
            param: self._begun(param).float() - param.float()
            for param, copy in self._copies.items()
            if copy.requires_grad and param in present
        }
        errors: list[BaseException] = []
        try:
            self._receive(moved)
        except GroupLost:
            raise
        except BaseException as error:  # the others may know of no error, and send now
            errors.append(error)
        self._tidy()
        self._send(moved)
        if not self.overlap:
            self._receive({})
        for param in moved:
            if not param.requires_grad:  # it was frozen during the round, and has been exchanged
                self._copies[param].requires_grad_(False)
                self._back_to_common(param)
        self._since = 0
        raise_first(errors)

    def _receive(self, moved: dict[Tensor, Tensor]) -> None:
        """Completes the exchange that is on its way, if there is one, and applies its result.

        Args:
            moved: what this worker has moved since the exchange began, which remains as movement.
                If the exchange fails, what was sent is in memory.
        """
        on_the_way = self._on_the_way
        if on_the_way is None:
            return
        try:
            self.outer.step()
        finally:
            self._on_the_way = None
            for param in on_the_way:
                if param in self._copies:
                    begun = self._begun(param)
                    param.copy_(begun - moved[param].to(begun) if param in moved else begun)

    def _send(self, moved: dict[Tensor, Tensor]) -> None:
        outer = self.outer.engine
        copies = {param: self._copies[param] for param in moved}
        for param, copy in copies.items():
            copy.grad = moved[param]
        outer.compares_bits = not self._new  # new copies get rank 0's values below
        outer.round.skips.in_a_row, outer.round.skips.hint = 1, _ROUND_SKIPPED
        before = {param: self._lead(param) for param in moved} if self.overlap else {}
        called_off = outer.round.called_off
        try:
            outer.begin()
        except BaseException:
            outer.cancel()
            # What GMC has added to its memory must not count as movement again.
            self._set_to_begun([param for param, copy in copies.items() if copy.grad is None])
            if self.overlap and outer.round.called_off > called_off:
                self._since = 0  # the others learn of it at the end of their next round
            raise
        finally:
            for copy in copies.values():
                copy.grad = None
        self._ahead.update(dict.fromkeys(moved, self.step_ahead))
        self._on_the_way = moved
        if self.overlap:  # this worker goes on from where it is, whatever was sent of that
            self._on_the_way = {
                param: move + before[param] - self._lead(param) for param, move in moved.items()
            }
        new, self._new = self._new, []
        outer.exchange.broadcast([in_storage_order(self._copies[p].detach()) for p in new])
        self._set_to_begun(moved)

    @torch.no_grad()
    def synchronize(self) -> None:
        """Ends the round now, so that all workers have the same parameters. All must call it.

        Raises:
            RuntimeError: another worker did not call it within the time-out of the process group;
                this worker's round continues. The other errors are those of :meth:`step`.
        """
        exchange = self.outer.engine.exchange
        meet(exchange, "synchronize()")
        self._take_notice()
        moved = self._since > 0 or bool(self._new) or self._has_moved()
        if any(exchange.gather_objects(moved, engine.device_of(self.inner))):
            self._end_round()
        self._receive({})
        for param in list(self._ahead):
            self._back_to_common(param)

    def _begun(self, param: Tensor) -> Tensor:
        """The value at which this worker began the round, in the parameter's dtype."""
        start = self._copies[param].detach()
        if self._on_the_way is not None and param in self._on_the_way:
            start = start - self._on_the_way[param].to(start.device)
        if self._ahead.get(param):
            start = start - self._lead(param)
        return start.to(device=param.device, dtype=param.dtype)

    def _lead(self, param: Tensor) -> Tensor:
        """How far this worker began the round ahead of the copy, by what it has not sent."""
        copy, share = self._copies[param], self._ahead.get(param, 0.0)
        memory = self.outer.state.get(copy, {}).get("memory")
        return torch.zeros_like(copy) if memory is None else share * memory.to(copy.device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _go_ahead(self) -> None:
        """Puts the parameters ahead that begin a round at the copies' values, as after a save."""
        if not self.step_ahead:
            return
        for param in self._params():
            copy = self._copies.get(param)
            if copy is not None and copy.requires_grad and param not in self._ahead:
                begun = self._begun(param)
                self._ahead[param] = self.step_ahead
                self._begin_elsewhere(param, begun)

    def _begin_elsewhere(self, param: Tensor, before: Tensor) -> None:
        """Keeps what was moved when the round's beginning has changed from `before`."""
        now = self._begun(param)
        param.copy_(torch.where(param == before, now, param + (now - before)))

    def _back_to_common(self, param: Tensor) -> None:
        """Lets the round begin at the copy's value, which is the same on all workers."""
        begun = self._begun(param)
        if self._ahead.pop(param, 0.0):
            # What was written to the parameter since stays as it is.
            param.copy_(torch.where(param == begun, self._begun(param), param))

    def _set_to_begun(self, params: Iterable[Tensor]) -> None:
        """Sets parameters to the value at which this worker begins the round."""
        known = [param for param in params if param in self._copies]
        if known:  # all at once, so that an interrupt does not come in between
            torch._foreach_copy_(known, list(map(self._begun, known)))

    def _has_moved(self) -> bool:
        """Whether a trained parameter is not where this worker began the round."""
        return any(
            param.requires_grad and param in self._copies and not param.is_meta
            and not torch.equal(param, self._begun(param))
            for param in self._params()
        )  # fmt: skip

    def stats(self) -> dict[str, Any]:
        """The outer optimizer's :meth:`gmc_cuda.GMC.stats`, with rounds for steps."""
        return self.outer.stats()

    # ------------------------------------------------------------------------ saving and loading

    def _refuse_open_exchange(self, what: str) -> None:
        if self._on_the_way is not None:
            raise RuntimeError(
                f"LocalUpdates: {what} while an exchange is on its way; call "
                "optimizer.synchronize() on all workers before"
            )

    @torch.no_grad()
    def average_memory_(self) -> None:
        """Calls :meth:`gmc_cuda.GMC.average_memory_` of the outer one. All workers must call it."""
        self._refuse_open_exchange("average_memory_()")
        before = {param: self._begun(param) for param in self._ahead}
        self.outer.average_memory_()
        for param, begun in before.items():
            self._begin_elsewhere(param, begun)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state_dict, with the outer one's state and the round's beginning.

        Each worker must save its own, and its own model. After :meth:`synchronize` and
        :meth:`average_memory_`, all workers may load rank 0's.

        Returns:
            In ``state``, by parameter, besides the inner optimizer's: "outer.start", "outer.memory"
            and the like, float32 and shaped like it, and "outer.ahead", the step_ahead with which
            the round began. In each param group, "local_updates".

        Raises:
            RuntimeError: with ``overlap``, while an exchange is on its way.
        """
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned. No collective. Load the model separately.

        Raises:
            ValueError: it is not a LocalUpdates' state, or not of this model, or torch's
                ``flatten_optimizer_state_dict`` has left the outer optimizer's part out; nothing
                was changed.
            RuntimeError: with ``overlap``, while an exchange is on its way.

        Warns:
            UserWarning: the outer memory is another rank's and not the average of all.
        """
        super().load_state_dict(state_dict)

    def _saved(self) -> dict[str, Any]:
        self._follow()
        self._read_written()
        self._tidy()
        saved, outer = self.inner.state_dict(), self.outer.state_dict()
        entries = {
            copy: outer["state"].get(j, {}) for j, copy in enumerate(engine.params_of(self.outer))
        }
        for i, param in enumerate(self._params()):
            if param in self._copies:
                copy = self._copies[param]
                own = {_OUTER + name: value for name, value in entries[copy].items()}
                if self._ahead.get(param):
                    own[_AHEAD] = torch.tensor(
                        self._ahead[param], dtype=torch.float32, device=copy.device
                    )
                saved["state"][i] = {
                    **saved["state"].get(i, {}), **own, _START: copy.detach()
                }  # fmt: skip
        groups = [{k: v for k, v in g.items() if k != "params"} for g in outer["param_groups"]]
        for group in saved["param_groups"]:
            group[_KEY] = {"outer": groups, "since": self._since}
        return saved

    @torch.inference_mode(False)
    @torch.no_grad()
    def _load(self, state_dict: dict[str, Any]) -> None:
        self._follow()
        self._tidy()
        params = self._params()
        state, groups = _read(state_dict, params)
        own = groups[0][_KEY]
        outer_state, begun, ahead = self._outer_parts(state, groups, params)
        copies = dict(self._copies)
        for param in begun:
            if param not in copies:  # trained when it was saved, and frozen here
                copies[param] = nn.Parameter(_float32(param), requires_grad=param.requires_grad)
        added = [copies[param] for param in begun if param not in self._copies]
        groups_now = self.outer.param_groups
        outer_groups = [{**group, "params": list(group["params"])} for group in groups_now]
        outer_groups[0]["params"] += added
        of_copy = {copy: param for param, copy in copies.items()}
        outer_dict: dict[str, Any] = {"state": {}, "param_groups": []}
        numbers = iter(range(sum(len(group["params"]) for group in outer_groups)))
        for g, saved in enumerate(own["outer"]):
            ids = []
            for copy in outer_groups[g]["params"] if g < len(outer_groups) else []:
                ids.append(next(numbers))
                tensors = outer_state.get(of_copy.get(copy))  # type: ignore[arg-type]
                if tensors:
                    outer_dict["state"][ids[-1]] = tensors
            outer_dict["param_groups"].append({**saved, "params": ids})
        # The checks of load_state_dict(), before anything is changed.
        outer = self.outer.engine
        states.read(
            outer_dict, outer_groups, outer.rule, type(self.outer).__name__, outer.shard_place()
        )
        self.inner.load_state_dict(_inner_part(state_dict, state, groups))
        states.make_place(self.inner.param_groups, _KEY)
        for param in begun:
            if param not in self._copies:
                self._put(param, copies[param].detach())
                self._copies[param].requires_grad_(param.requires_grad)
        self.outer.load_state_dict(outer_dict)
        for param, start in begun.items():
            self._copies[param].copy_(start)
        # The copy of a parameter without a saved one is made of its value at the next step.
        self._unread = [p for p in params if p.requires_grad and p not in begun]
        self._new, self._ahead = list(self._unread), ahead
        self._written = None if self._written is None else []
        # Earlier versions saved the steps of the whole run.
        self._since = own["since"] if "since" in own else own["steps"] % self.every

    @staticmethod
    def _outer_parts(
        state: dict[Any, Any], groups: list[dict[str, Any]], params: list[Tensor]
    ) -> tuple[dict[Tensor, dict[str, Any]], dict[Tensor, Tensor], dict[Tensor, float]]:
        """By parameter: its outer state, its copy, and how far ahead of that the round began."""
        ids = list(chain.from_iterable(group["params"] for group in groups))
        if len(ids) != len(params):
            raise ValueError(f"state_dict: got {len(ids)} parameters, must be {len(params)}")
        outer_state, begun, ahead = {}, {}, {}
        for i, param in zip(ids, params, strict=True):
            entry = state.get(i, {})
            own = {k[len(_OUTER) :]: v for k, v in entry.items()
                   if _is_outer(k) and k not in (_START, _AHEAD)}  # fmt: skip
            if own:
                outer_state[param] = own
            if _AHEAD in entry:
                ahead[param] = float(entry[_AHEAD])
            if _START in entry:
                begun[param] = entry[_START]
                if begun[param].shape != param.shape:
                    raise ValueError(
                        f"state_dict: parameter {i} had shape {tuple(begun[param].shape)}, must "
                        f"be {tuple(param.shape)}: got parameters of other shapes than this model's"
                    )
        if not begun and any(param.requires_grad for param in params):
            raise ValueError(
                "state_dict: it has no 'outer.start' of any parameter. torch reads a flattened "
                "state by what optimizer.state holds, which is the inner optimizer's: use "
                "StateDictOptions(flatten_optimizer_state_dict=False), or optimizer.state_dict() "
                "and load_state_dict()"
            )
        return outer_state, begun, ahead


class _State(MutableMapping[Any, Any]):
    """A view of an optimizer's state, which stays valid when the state is replaced.

    It is always true, because torch.distributed.checkpoint makes a step with lr 0 if a state is
    false, which would shift this worker's rounds.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    def __getitem__(self, param: Any) -> Any:
        return self.inner.state[param]

    def __setitem__(self, param: Any, entry: Any) -> None:
        self.inner.state[param] = entry

    def __delitem__(self, param: Any) -> None:
        del self.inner.state[param]

    def __contains__(self, param: Any) -> bool:
        return param in self.inner.state  # to look into a defaultdict must not add to it

    def get(self, param: Any, default: Any = None) -> Any:
        return self.inner.state.get(param, default)

    def pop(self, param: Any, *default: Any) -> Any:
        return self.inner.state.pop(param, *default)

    def setdefault(self, param: Any, default: Any = None) -> Any:
        return self.inner.state.setdefault(param, default)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.inner.state)

    def __len__(self) -> int:
        return len(self.inner.state)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return repr(self.inner.state)


def _float32(param: Tensor) -> Tensor:
    return param.detach().float().clone()


def _take_over(copy: Tensor, param: Tensor) -> Tensor:
    """Writes a parameter's values to its copy, which keeps the bits that the other dtype lacks.

    Returns:
        where the copy was kept: bool, shaped like the parameter.
    """
    now = copy.to(param.device)
    kept = now.to(param.dtype) == param
    copy.copy_(torch.where(kept, now, param.float()))
    return kept


def _is_outer(name: Any) -> bool:
    return isinstance(name, str) and name.startswith(_OUTER)


# -------------------------------------------------------------- what the constructor may refuse


def _check_arguments(inner: Any, outer: Any, every: Any, step_ahead: Any) -> None:
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(
            f"inner_optimizer: got {type(inner).__name__}, must be a torch.optim.Optimizer: "
            "torch.optim.AdamW(model.parameters(), lr=1e-3)"
        )
    if isinstance(outer, torch.optim.Optimizer) or not (outer is None or callable(outer)):
        raise TypeError(
            f"outer: got a {type(outer).__name__}, must be what makes one over other "
            "parameters than the model's: functools.partial(gmc_cuda.GMC, lr=0.7)"
        )
    _check_every(every)
    _check_step_ahead(step_ahead)


def _check_every(every: Any) -> None:
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every: got {every!r}, must be a number of steps, at least 1")


def _check_step_ahead(step_ahead: Any) -> None:
    if isinstance(step_ahead, bool) or not isinstance(step_ahead, Real):
        raise TypeError(f"step_ahead: got {type(step_ahead).__name__}, must be a number")
    if not 0 <= float(step_ahead) <= 1:
        raise ValueError(f"step_ahead: got {step_ahead}, must be between 0 and 1")


def _make_outer(default: Any, outer: Any, copies: list[Tensor]) -> CompressedSGD:
    try:
        made = (outer or default)(copies)
        if not isinstance(made, CompressedSGD):
            raise TypeError(
                f"outer: it made a {type(made).__name__}, must make a gmc_cuda.GMC or DGC"
            )
    except Exception as error:
        if raised_by_constructor(error):
            raise
        _raise_everywhere(error, outer)
    return made


def _raise_everywhere(error: Exception, outer: Any) -> NoReturn:
    """Raises the error here, and reports it to the workers that wait in their constructors."""
    if callable(outer) and not isinstance(outer, functools.partial):
        with suppress(Exception):  # only this callable knows the process group
            outer(Failed(error))
        raise error
    group = outer.process_group if isinstance(outer, CompressedSGD) else None
    if isinstance(outer, functools.partial):
        group = outer.keywords.get("process_group")
    comparison.require_equal(
        Exchange(group), error, torch.device("cpu"), call="the constructor of LocalUpdates"
    )
    raise error


# ---------------------------------------------------------------------- what may be in a state_dict


def _read(
    state_dict: dict[str, Any], params: list[Tensor]
) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    """The state and param groups of a state_dict, as :meth:`LocalUpdates.state_dict` makes them.

    Raises:
        ValueError: the state_dict is another optimizer's.
    """
    state, groups = state_dict["state"], state_dict["param_groups"]
    if _KEY in state_dict:  # the form of earlier versions, with lists over the trained parameters
        old = state_dict[_KEY]
        ids = chain.from_iterable(group["params"] for group in groups)
        trained = [i for i, param in zip(ids, params) if param.requires_grad]
        if len(trained) != len(old["start"]):
            raise ValueError(
                f"state_dict: got {len(old['start'])} trained parameters, must be {len(trained)}"
            )
        state = {i: dict(entry) for i, entry in state.items()}
        for j, (i, start) in enumerate(zip(trained, old["start"], strict=True)):
            own = {_OUTER + k: v for k, v in old["outer"]["state"].get(j, {}).items()}
            state[i] = {**state.get(i, {}), **own, _START: start}
        value = {"outer": old["outer"]["param_groups"], "steps": old["steps"]}
        groups = [{**group, _KEY: value} for group in groups]
    if not groups or not all(group.get(_KEY) for group in groups):
        other = next((g["saved_by"]["optimizer"] for g in groups if "saved_by" in g), None)
        if other is not None:
            raise ValueError(f"state_dict: got the state of {other}, must be of LocalUpdates")
        raise ValueError(
            "state_dict: got the state of an inner optimizer alone; load it into that before "
            "you construct LocalUpdates"
        )
    return state, groups


def _inner_part(
    state_dict: dict[str, Any], state: dict[Any, Any], groups: list[dict[str, Any]]
) -> dict[str, Any]:
    inner = {i: {k: v for k, v in entry.items() if not _is_outer(k)} for i, entry in state.items()}
    return {
        **{key: value for key, value in state_dict.items() if key != _KEY},
        "state": {i: entry for i, entry in inner.items() if entry},
        "param_groups": [{k: v for k, v in g.items() if k != _KEY} for g in groups],
    }
