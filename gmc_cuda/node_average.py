"""Dense averaging inside a node, GMC across nodes, with the whole model on each worker."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gmc_cuda._engine import checks, comparison, ddp_guard, engine
from gmc_cuda._engine import state as states
from gmc_cuda._engine.bucket import DTYPES
from gmc_cuda._engine.engine import Engine
from gmc_cuda._engine.exchange import Exchange
from gmc_cuda._engine.meeting import meet
from gmc_cuda._engine.optimizer import CompressedSGD
from gmc_cuda._engine.shards import Parts
from gmc_cuda._engine.wrapper import Wrapper, raised_by_constructor

# torch 2.15 renamed both. They are None if torch is built without torch.distributed, because this
# module must import without it.
_reduce_scatter: Any
_all_gather: Any
_reduce_scatter, _all_gather = (
    getattr(dist, newer, None) or getattr(dist, older, None)
    for newer, older in (
        ("reduce_scatter_single", "reduce_scatter_tensor"),
        ("all_gather_single", "all_gather_into_tensor"),
    )
)

_KEY = "node_average"  # key in each param group of a state_dict that says which parts these are

_kind = attrgetter("requires_grad", "dtype", "device", "shape")


class _Part(NamedTuple):
    """This worker's part of a parameter: its elements begin to begin + own.numel() - 1."""

    own: nn.Parameter
    begin: int


class _Share(NamedTuple):
    """This worker's share of a group's trained parameters of one dtype.

    The parameters, one after the other, are cut into equal shares, one for each worker of the node.

    Attributes:
        params: the user's parameters.
        own: this worker's share, 1-D, padded at the end; the parts are views of it.
        pieces: the parts that are not empty, with their parameters.
    """

    params: list[Tensor]
    own: Tensor
    pieces: list[tuple[Tensor, _Part]]


class _LayersDiffer(ValueError):
    """Layers or param groups are not the same on the workers of a node."""

    def __init__(self, found: str) -> None:
        super().__init__(
            "the workers of a node must change param groups and layers in the same step, but they "
            f"differ in:{found}"
        )


class NodeAverage(Wrapper):
    """Averages gradients inside a node, and trains a share of the parameters on each worker.

    Each of a node's n workers owns an equal share of all parameters. A step has three parts. Inside
    the node, where the network is fast, gradients are averaged, and each worker gets its share of
    the average. A GMC over the share exchanges with the workers that own the same share in other
    nodes. Then the node gathers the new values of all shares, and all workers' parameters are equal
    bit for bit. Each worker sends 1/n of a flat GMC's bytes across nodes, and keeps 1/n of the
    memory::

        mesh = init_device_mesh("cuda", (nodes, workers_in_a_node))
        optimizer = gmc_cuda.NodeAverage(
            model.parameters(), functools.partial(gmc_cuda.GMC, lr=0.1, density=0.01), mesh
        )

    ``param_groups`` hold the parameters given here, with the options of GMC. ``state[p]`` is the
    state of this worker's part of p: float32 "memory" and momentum, one-dimensional, if the part is
    not empty. Between steps, layers may be frozen and unfrozen, and parameters be replaced, added,
    removed and converted, on all workers alike; what was not sent of them waits. FSDP2 does not
    need this class, because it shards parameters itself: see ``process_group`` of GMC.

    Args:
        params: parameters, named parameters or param groups, as for GMC. All workers begin with
            rank 0's values.
        make: makes the GMC or DGC over the worker's parts, from a list of param groups and
            ``process_group``.
        mesh: a 2-D device mesh: across nodes, then inside a node.

    Raises:
        ValueError, TypeError: an argument cannot be used, or the workers differ. If only one worker
            met the error, the others raise RuntimeError with its rank and reason.

    Attributes:
        inner: the GMC or DGC over this worker's parts.
    """

    inner: CompressedSGD
    state: Any
    _COPIED = ("inner", "defaults", "param_groups", "_across", "_inside", "_place", "_parts")

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, params: Any, make: Callable[..., CompressedSGD], mesh: Any) -> None:
        if getattr(mesh, "ndim", 0) != 2:
            raise ValueError(f"mesh: got {mesh!r}, must be a 2-D device mesh: across, inside")
        self._across, self._inside = Exchange(mesh.get_group(0)), Exchange(mesh.get_group(1))
        self._place = self._inside.rank, self._inside.size
        self._parts: dict[Tensor, _Part] = {}
        self._shown: list[Any] = []  # the inner optimizer's entries that state shows
        self._entries: list[Any] = []
        try:
            super().__init__(params, {})
            self._check_params()
            facts: dict[str, Any] | Exception = comparison.describe(self)
        except Exception as error:
            facts = error
        constructor = "the constructor of NodeAverage"
        self._require_equal(facts, constructor)
        self._broadcast(self.param_groups)
        groups = self._cut(set())
        try:
            inner = make(groups, process_group=Parts(mesh))
            if not isinstance(inner, CompressedSGD):
                raise TypeError(
                    f"make: it made a {type(inner).__name__}, must make a gmc_cuda.GMC or DGC"
                )
            self.inner = inner
            facts = {}
        except Exception as error:
            facts = error
            if not raised_by_constructor(error):
                with suppress(Exception):  # the other nodes' workers wait in their constructors
                    cpu = torch.device("cpu")
                    comparison.require_equal(self._across, error, cpu, call=constructor)
        self._require_equal(facts, constructor)
        self.defaults = self.inner.defaults
        self._take_options()
        self._show()

    # ------------------------------------------------------------------- what workers agree on

    @property
    def workers_in_node(self) -> int:
        """The number of workers in a node, each of which has a part of the state."""
        return self._place[1]

    def _require_equal(self, facts: dict[str, Any] | Exception, call: str) -> None:
        comparison.require_equal(
            self._across, facts, engine.device_of(self), call=call, inside=self._inside
        )

    def _check_params(self) -> None:
        seen: dict[Tensor, str] = {}
        for g, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                name = f"params: {comparison.parameter_name(group, i)} of group {g}"
                if param in seen:
                    raise ValueError(f"{name} appears twice")
                seen[param] = name
                if param.requires_grad:
                    if hasattr(param, "to_local"):
                        raise TypeError(
                            f"{name}: got a DTensor, must be a whole parameter: for sharded ones "
                            "gmc_cuda.GMC(model.parameters(), lr, process_group=mesh)"
                        )
                    checks.check_param(param, name)
        devices = sorted({str(p.device) for p in seen if p.requires_grad})
        if len(devices) > 1:
            raise ValueError(f"params: got devices {', '.join(devices)}, must be one device")

    def _broadcast(self, groups: list[dict[str, Any]]) -> None:
        """Gives all workers rank 0's parameters: first one worker of each node, then the node."""
        device = engine.device_of(self)
        if self._inside.rank == 0:
            engine.broadcast(self._across, groups, device)
        engine.broadcast(self._inside, groups, device)

    # ------------------------------------------------------------------------ parts and shares

    def _cut(self, had: set[Tensor]) -> list[dict[str, Any]]:
        """Cuts each group's parameters into shares.

        Args:
            had: parameters of which some worker of the node has state.

        Returns:
            The inner optimizer's param groups, which have the parts in the place of parameters.
        """
        ranges = self._ranges(had)
        self._parts = {
            p: _Part(_empty_part(p, end - begin), begin) for p, (begin, end) in ranges.items()
        }
        self._share_storage()
        return [
            {**group, "params": [self._parts[p].own for p in group["params"]]}
            for group in self.param_groups
        ]

    def _ranges(self, had: set[Tensor]) -> dict[Tensor, tuple[int, int]]:
        ranges, rank = {}, self._place[0]
        for params in self._flats():
            size = self._share_of(params)
            offset = 0
            for p in params:
                first = min(max(rank * size - offset, 0), p.numel())
                ranges[p] = first, min(max((rank + 1) * size - offset, 0), p.numel())
                offset += p.numel()
        for p in engine.params_of(self):
            if p not in ranges:  # a frozen parameter needs a part only for its state
                size = -(-p.numel() // self.workers_in_node) if p in had else 0
                ranges[p] = min(rank * size, p.numel()), min((rank + 1) * size, p.numel())
        return ranges

    def _flats(self) -> list[list[Tensor]]:
        """The trained parameters, by group and dtype."""
        flats = []
        for group in self.param_groups:
            by_dtype: dict[torch.dtype, list[Tensor]] = {}
            for p in group["params"]:
                if p.requires_grad and p.numel():
                    by_dtype.setdefault(p.dtype, []).append(p)
            flats += list(by_dtype.values())
        return flats

    def _share_of(self, params: list[Tensor]) -> int:
        return -(-sum(p.numel() for p in params) // self.workers_in_node)

    def _share_storage(self) -> None:
        """Makes the parts of each share views of one tensor, in the order of gathering."""
        self._shares = []
        for params in self._flats():
            own = params[0].new_zeros(self._share_of(params))
            pieces = [(p, self._parts[p]) for p in params if self._parts[p].own.numel()]
            self._shares.append(_Share(params, own, pieces))
            offset = 0
            for _, (part, _) in pieces:
                part.data = own[offset : offset + part.numel()]
                offset += part.numel()
        self._params = engine.params_of(self)
        self._kinds = list(map(_kind, self._params))
        self._groups = list(self.param_groups)

    def _holds(self) -> bool:
        """Whether param_groups are still those for which the parts were cut."""
        groups = self.param_groups
        params = engine.params_of(self)
        same = len(groups) == len(self._groups) and all(map(is_, groups, self._groups))
        same = same and len(params) == len(self._params) and all(map(is_, params, self._params))
        return same and list(map(_kind, params)) == self._kinds

    def _follow(self) -> None:
        """Updates the parts if users have changed param_groups or state."""
        entries = list(map(self.state.get, self._parts))
        if len(entries) != len(self._entries) or not all(map(is_, entries, self._entries)):
            self._take_state()
        if not self._holds():
            self._lay_out_anew()

    def _take_state(self) -> None:
        """Passes entries that users have put into state to the inner optimizer."""
        for p, (own, _) in self._parts.items():
            entry = self.state.get(p)
            if entry is not self.inner.state.get(own):
                self.inner.state.pop(own, None)
                if entry:
                    self.inner.state[own] = entry

    def _show(self) -> None:
        """Makes state show the inner optimizer's entries, which may have been replaced."""
        entries = [self.inner.state.get(own) for own, _ in self._parts.values()]
        if len(entries) == len(self._shown) and all(map(is_, entries, self._shown)):
            return
        # Each trained parameter gets an entry, because torch.distributed.checkpoint makes a step of
        # an optimizer whose state is empty.
        self.state = defaultdict(dict)
        for p, entry in zip(self._parts, entries, strict=True):
            if entry is not None or p.requires_grad:
                self.state[p] = {} if entry is None else entry
        self._shown, self._entries = entries, list(map(self.state.get, self._parts))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _lay_out_anew(self) -> None:
        """Cuts the parameters again. What was not sent goes to the workers that own it now."""
        self._check_params()
        inner, parts, params = self.inner, self._parts, engine.params_of(self)
        # The state of a parameter that was removed from its group waits for its return.
        known = set(engine.params_of(inner))
        waiting = [own for own, _ in parts.values() if own not in known]
        groups = [*inner.param_groups, {**inner.defaults, "params": waiting}]
        held = states.held(groups, inner.state, inner.engine.rule)
        others = {
            p: {k: v for k, v in inner.state.get(own, {}).items() if k not in states.SHOWN}
            for p, (own, _) in parts.items()
        }
        names = [sorted(held.get(parts[p].own, {})) if p in parts else [] for p in params]
        meet(self._inside, "step() or state_dict() after layers or param groups were changed")
        answers = self._inside.gather_objects(
            (comparison.describe(self), names), engine.device_of(self)
        )
        found = comparison.differences([facts for facts, _ in answers])
        if found:
            raise _LayersDiffer(found)
        had = [sorted(set().union(*(theirs[i] for _, theirs in answers)))
               for i in range(len(params))]  # fmt: skip
        whole = [
            {name: self._gather_state(p, parts.get(p), held, name) for name in names}
            for p, names in zip(params, had, strict=True)
        ]
        inner.param_groups[:] = self._cut({p for p, names in zip(params, had) if names})
        inner.state.clear()
        for p, vectors in zip(params, whole, strict=True):
            own, begin = self._parts[p]
            end = begin + own.numel()
            entry = dict(others.get(p, {}))
            if own.numel():
                entry |= {name: vector[begin:end].clone() for name, vector in vectors.items()}
            if entry:
                inner.state[own] = entry
        for p in parts.keys() - set(params):
            own = parts[p].own
            if own in held:
                self._parts[p] = parts[p]
                inner.state[own] = {**others[p], **{k: v.clone() for k, v in held[own].items()}}
        inner.engine.refresh()
        self._show()

    def _gather_state(self, p: Tensor, part: _Part | None, held: Any, name: str) -> Tensor:
        """One vector of a parameter's state, gathered from the parts of the node's workers.

        It is a sum in which all but one term is zero, taken as integers so that every bit stays.
        """
        whole = torch.zeros(p.numel(), dtype=torch.float32, device=p.device)
        if part is not None and name in held.get(part.own, {}):
            value = held[part.own][name]
            if part.begin + value.numel() <= p.numel():  # else the parameter has got another shape
                whole[part.begin : part.begin + value.numel()].copy_(value)
        self._inside.all_reduce(whole.view(torch.int32)).wait()
        return whole

    def _take_options(self) -> None:
        """Copies the inner optimizer's options to param_groups, with those that it has written."""
        for group, own in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update((k, v) for k, v in own.items() if k != "params")
        states.make_place(self.param_groups, _KEY)

    def _give_options(self) -> None:
        """Copies the options in param_groups to the inner optimizer."""
        for group, own in zip(self.param_groups, self.inner.param_groups, strict=True):
            own.update((k, v) for k, v in group.items() if k != "params")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, with rank 0's values. All workers must call it.

        Raises:
            ValueError, TypeError, RuntimeError: as the constructor, on every worker; nothing was
                changed.
        """
        if "inner" not in self.__dict__:  # torch's constructor calls it too
            super().add_param_group(param_group)
            return
        known = len(self.param_groups)
        try:
            try:
                super().add_param_group(checks.one_budget(param_group))
                self._check_params()
                rule = self.inner.engine.rule
                engine.check_group(self.param_groups[known], known, rule)
                facts: dict[str, Any] | Exception = comparison.describe(self)
            except Exception as error:
                facts = error
            self._require_equal(facts, "add_param_group()")
        except Exception:
            del self.param_groups[known:]
            raise
        self._broadcast(self.param_groups[known:])
        self._follow()

    # -------------------------------------------------------------------------------- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Averages inside, exchanges across, gathers inside. All workers must call it.

        A parameter without a gradient on this worker counts as zero. With a GradScaler all workers
        skip a step in which any gradient overflowed, and that worker's gradients count as zero.

        Args:
            closure: reevaluates the model and returns the loss, as in torch.optim.

        Returns:
            What the closure returned.

        Raises:
            ValueError, TypeError, FloatingPointError, RuntimeError: as :meth:`gmc_cuda.GMC.step`.
                After an error the gradients that had been compressed are in memory, and ``.grad``
                is None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._scaling_ends():
            self._step()
        return loss

    def _step(self) -> None:
        self._inside.check()
        workers = self._across.size * self.workers_in_node
        checks.check_scaler(hasattr(self, "found_inf"), self.engine.scaled_together, workers, False)
        if ddp_guard.is_due(self.engine.round.steps):
            ddp_guard.refuse_communicating(self._params, self._across.group, self._inside.group)
        for g, group in enumerate(self.param_groups):
            engine.check_group(group, g, self.engine.rule)
        try:
            self._compare_changes()
            self._follow()
        except _LayersDiffer as error:
            self.engine.refuse({"layers inside a node": str(error)})
            raise
        self._give_options()
        for flat, share in zip(self._flat_gradients(), self._shares, strict=True):
            self._set_gradients(share, flat)
        made = self.engine.round.made
        try:
            self._inner_step()
        except BaseException:
            pieces = chain.from_iterable(share.pieces for share in self._shares)
            if any(own.grad is None for _, (own, _) in pieces):  # GMC has them in memory
                for p in self._params:
                    p.grad = None
            raise
        finally:
            for own, _ in self._parts.values():
                own.grad = None
            if self.engine.round.made > made:  # also if an error came late: the others wait for it
                self._gather()
                self._take_options()
                self._show()

    def _compare_changes(self) -> None:
        """Notices layers or param groups that were changed on some workers of the node only.

        Workers whose parts differ would send messages of different sizes. So each step begins with
        a sum of one number from each worker, which the host reads. On a GPU it has a stream of its
        own, so that the host does not wait for the backward pass.

        Raises:
            _LayersDiffer: on every worker of the node.
        """
        device = engine.device_of(self)
        cuda = device.type == "cuda"
        if self.workers_in_node == 1 or (cuda and torch.cuda.is_current_stream_capturing()):
            return
        with torch.cuda.stream(torch.cuda.Stream(device) if cuda else None):
            changed = torch.tensor([not self._holds()], dtype=torch.int32, device=device)
            self._inside.all_reduce(changed).wait()
            count = int(changed)
        if count in (0, self.workers_in_node):  # if all have changed, _lay_out_anew compares what
            return
        everyone = self._inside.gather_objects(comparison.describe(self), device)
        found = comparison.differences(everyone)
        raise _LayersDiffer(
            found or "\n  parameters or param groups that were replaced by others of their kind"
        )

    def _inner_step(self) -> None:
        inner: Any = self.inner
        scaling = {k: self.__dict__[k] for k in ("grad_scale", "found_inf") if k in self.__dict__}
        inner.__dict__.update(scaling)
        try:
            inner.step()
        finally:
            for name in scaling:
                inner.__dict__.pop(name, None)

    def _flat_gradients(self) -> list[Tensor]:
        """The gradients of each share's parameters, one after the other, padded with zeros."""
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                grad = p.grad if p.requires_grad else None
                if grad is not None and (grad.layout != torch.strided or grad.dtype not in DTYPES):
                    name = f"{comparison.parameter_name(group, i)} of group {g}"
                    checks.refuse_gradient(grad, name)
        flats = []
        for share in self._shares:
            flat = share.own.new_empty(self.workers_in_node * share.own.numel())
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in share.params]
            numel = sum(p.numel() for p in share.params)
            torch.cat([grad.reshape(-1) for grad in parts], out=flat[:numel])
            flat[numel:] = 0.0
            found_inf = self.__dict__.get("found_inf")
            if isinstance(found_inf, Tensor):  # an overflow must not reach other workers
                flat.masked_fill_(found_inf.to(flat.device) != 0, 0.0)
            flats.append(flat)
        return flats

    def _set_gradients(self, share: _Share, flat: Tensor) -> None:
        """Averages over the node, and sets the parts' gradients and present values."""
        own = flat
        if self.workers_in_node > 1:
            own = torch.empty_like(share.own)
            _reduce_scatter(own, flat.div_(self.workers_in_node), group=self._inside.group)
        offset, values = 0, []
        for p, (part, begin) in share.pieces:
            part.grad = own[offset : offset + part.numel()]
            values.append(p.detach().reshape(-1)[begin : begin + part.numel()])
            offset += part.numel()
        if values:
            torch.cat(values, out=share.own[:offset])

    def _gather(self) -> None:
        for share in self._shares:
            flat = share.own
            if self.workers_in_node > 1:
                flat = flat.new_empty(self.workers_in_node * flat.numel())
                _all_gather(flat, share.own, group=self._inside.group)
            sizes = [p.numel() for p in share.params]
            parts = flat[: sum(sizes)].split(sizes)
            targets = [p.detach() for p in share.params]
            torch._foreach_copy_(targets, [v.view(p.shape) for v, p in zip(parts, targets)])

    @property
    def engine(self) -> Engine:
        """The inner optimizer's engine, for other modules of gmc_cuda."""
        return self.inner.engine

    def last_step_skipped(self) -> Tensor | None:
        """Whether all workers skipped the last step; see :meth:`gmc_cuda.GMC.last_step_skipped`."""
        return self.inner.last_step_skipped()

    def stats(self) -> dict[str, Any]:
        """Statistics of this worker's share; see :meth:`gmc_cuda.GMC.stats`."""
        return self.inner.stats()

    @property
    def process_group(self) -> Any:
        """The group across nodes. Set it to the mesh on a copy that came from another process."""
        return self._across.group

    @process_group.setter
    def process_group(self, mesh: Any) -> None:
        if getattr(mesh, "ndim", 0) != 2:
            raise ValueError(f"process_group: got {mesh!r}, must be a 2-D device mesh")
        inside, across = Exchange(mesh.get_group(1)), Exchange(mesh.get_group(0))
        if (inside.rank, inside.size) != self._place:
            raise ValueError(
                f"process_group: this is worker {inside.rank} of {inside.size} of its node, must "
                f"be worker {self._place[0]} of {self._place[1]}, whose parts the copy has"
            )
        self.inner.process_group = Parts(mesh)
        self._across, self._inside = across, inside

    def __repr__(self) -> str:
        return f"NodeAverage(workers={self.workers_in_node}, inner={self.inner!r})"

    # ------------------------------------------------------------------------ saving and loading

    def average_memory_(self) -> None:
        """Calls :meth:`gmc_cuda.GMC.average_memory_` of the share. All workers must call it.

        Afterwards all nodes have the same state, but each worker of a node still has its own part.

        Raises:
            RuntimeError: another worker did not call it within the time-out of the process group.
        """
        meet(self._inside, "average_memory_()")
        self._follow()
        self.inner.average_memory_()

    def state_dict(self) -> dict[str, Any]:
        """The state of this worker's parts. Each worker must save its own.

        It is collective if layers were frozen or unfrozen, or groups changed, since the last step.

        Returns:
            A state_dict like GMC's, with one-dimensional tensors, which are empty for parameters of
            which this worker has no part. Each param group has "node_average", which says whose
            part it is.
        """
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads this worker's state. No collective. Load the model separately.

        Raises:
            ValueError, TypeError: the state does not fit, or is of another worker of the node;
                nothing was changed.
        """
        super().load_state_dict(state_dict)

    def _saved(self) -> dict[str, Any]:
        self._follow()
        self._give_options()
        rule, state = self.inner.engine.rule, self.inner.state
        # torch's state_dict knows no state of a parameter that is in no group.
        present = set(engine.params_of(self.inner))
        gone = {own: state.pop(own) for own in list(state) if own not in present}
        saved = self.inner.state_dict()
        state.update(gone)
        for group, own in zip(saved["param_groups"], self.param_groups, strict=True):
            parts = [self._parts[p] for p in own["params"]]
            group[_KEY] = {
                "worker": self._place[0],
                "workers": self._place[1],
                "begins": [part.begin for part in parts],
                "sizes": [part.own.numel() for part in parts],
            }
            for i, p in zip(group["params"], own["params"], strict=True):
                if p.requires_grad and not saved["state"].get(i):
                    names = ("memory", rule.momentum_name(group))
                    empty = torch.empty(0, dtype=torch.float32, device=p.device)
                    saved["state"][i] = {name: empty.clone() for name in names}
        return saved

    @torch.inference_mode(False)
    @torch.no_grad()
    def _load(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict["param_groups"]
        for group in groups:
            whose = group.get(_KEY)
            if whose is None:
                other = group.get("saved_by", {}).get("optimizer", "another optimizer")
                raise ValueError(f"state_dict: got the state of {other}, must be of NodeAverage")
            saved, own = (whose["worker"], whose["workers"]), self._place
            if saved != own:
                raise ValueError(
                    f"state_dict: got that of worker {saved[0]} of {saved[1]} in its node, must be "
                    f"of worker {own[0]} of {own[1]}: let each worker save and load its own"
                )
        self._follow()
        before, parts, kinds = self.inner.param_groups[:], self._parts, self._kinds
        fitted = self._fit(groups)
        stripped = [{k: v for k, v in group.items() if k != _KEY} for group in groups]
        try:
            if fitted is not None:
                self._parts = {**parts, **fitted}
                self.inner.param_groups[:] = [
                    {**own, "params": [self._parts[p].own for p in group["params"]]}
                    for own, group in zip(before, self.param_groups, strict=True)
                ]
            # torch reads a flattened state by what state holds, which is nothing of an empty part.
            empty = {
                i
                for group, own in zip(groups, self.param_groups)
                for i, p in zip(group["params"], own["params"])
                if not self._parts[p].own.numel()
            }
            state = {k: v for k, v in state_dict["state"].items() if v or k not in empty}
            self.inner.load_state_dict({"state": state, "param_groups": stripped})
        except BaseException:
            self.inner.param_groups[:] = before
            self._parts, self._kinds = parts, kinds
            raise
        self._take_options()
        self._show()

    def _fit(self, groups: list[dict[str, Any]]) -> dict[Tensor, _Part] | None:
        """The parts for which the state was saved, if other layers were frozen then; else None.

        The next step cuts them again.
        """
        fitted = {}
        for saved, group in zip(groups, self.param_groups):
            whose = saved[_KEY]
            for p, begin, size in zip(group["params"], whose["begins"], whose["sizes"]):
                part = self._parts[p]
                if (begin, size) != (part.begin, part.own.numel()) and begin + size <= p.numel():
                    fitted[p] = _Part(_empty_part(p, size), begin)
        if fitted:
            self._kinds = []  # differs from any, so that the next step cuts again
        return fitted or None

    def __getstate__(self) -> dict[str, Any]:
        self._follow()
        return super().__getstate__()

    @torch.inference_mode(False)
    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.state, self._entries, self._shown = defaultdict(dict), [], []
        self._share_storage()
        self.inner.engine.refresh()
        self._show()


def _empty_part(param: Tensor, numel: int) -> nn.Parameter:
    part = torch.empty(numel, dtype=param.dtype, device=param.device)
    return nn.Parameter(part, requires_grad=param.requires_grad)
