"""An optimizer's state parameter by parameter: for state_dict, for copies, and for new buckets.

GMC and DGC load state by themselves, because torch.optim casts it to the parameter's dtype, which
would round the float32 memory of a bfloat16 parameter, and does not know buckets or ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from gmc_cuda._engine.bucket import Bucket
from gmc_cuda._engine.checks import one_budget
from gmc_cuda._engine.comparison import parameter_name
from gmc_cuda._engine.entry import Entry
from gmc_cuda._engine.lazy_views import LazyView, MomentumView, OwnerView
from gmc_cuda._engine.rules import Group, Rule
from gmc_cuda._engine.shards import shard_of

ParamState = dict[str, Tensor]
Held = dict[Tensor, ParamState]

MEMORY, OWNER = "memory", "owner_memory"
MOMENTUM_NAMES = ("momentum_buffer", "aggregate")  # "aggregate" for momentum_form="iterate"

SHOWN = (MEMORY, OWNER, *MOMENTUM_NAMES)

FORMAT = 1
_STAMP = "saved_by"  # key in each param group of a state_dict, which every framework keeps


@dataclass(frozen=True)
class Stamp:
    """Says whose state a state_dict holds.

    Attributes:
        optimizer: the name of its class.
        rank, world_size: those of the worker that saved it.
        averaged: whether memory is the mean over all workers, and so the same on all of them.
        format: the state's format, raised when the meaning of a key changes.
        frozen: the frozen parameters with non-zero memory or momentum, as "group.index", separated
            by blanks. torch's set_optimizer_state_dict leaves their state out.
        shard, shards: which shard of the parameters it is of, and of how many; None if the worker
            holds them whole.
    """

    optimizer: str
    rank: int
    world_size: int
    averaged: bool
    format: int = FORMAT
    frozen: str = ""
    shard: int | None = None
    shards: int | None = None

    def entry(self) -> dict[str, Any]:
        """What a state_dict holds of it, without what does not apply.

        torch.distributed.checkpoint finds no older state whose stamp lacks a key that is asked for.
        """
        return {key: value for key, value in asdict(self).items() if value is not None}


# ------------------------------------------------------------------------- buckets and parameters


def held(groups: Iterable[Group], state: Mapping[Any, Any], rule: Rule) -> Held:
    """Each parameter's memory and momentum as optimizer.state has them, a_{t-1} as a dense tensor.

    Raises:
        ValueError, TypeError: an entry does not fit its parameter.
    """
    found: Held = {}
    dense: dict[tuple[type, Bucket], list[Tensor]] = {}
    for g, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            for name, value in (state.get(param) or {}).items():
                if not isinstance(value, Tensor) or name not in SHOWN:
                    continue
                if value.is_meta and not param.is_meta:  # the model was on "meta" when it was made
                    continue
                if isinstance(value, LazyView):
                    bucket, index = value.place()
                    key = type(value), bucket
                    if key not in dense:
                        dense[key] = bucket.views(value.read(bucket))
                    value = dense[key][index]
                if name not in (MEMORY, OWNER):
                    name = rule.momentum_name(group)
                _check_fits(
                    value, f"state: {name} of {parameter_name(group, i)} of group {g}", param
                )
                found.setdefault(param, {})[name] = value
    return found


def export(buckets: Iterable[Bucket], rule: Rule) -> Held:
    """Each parameter's memory and momentum in these buckets; a_{t-1} is zero at the beginning."""
    found: Held = {}
    for bucket in buckets:
        vectors = bucket.vectors()
        if not rule.local_momentum:
            vectors[rule.momentum_name(bucket.group)] = bucket.momentum()
        if bucket.owner is not None:
            vectors[OWNER] = bucket.owner.spread(bucket.memory)
        for name, flat in vectors.items():
            for param, view in zip(bucket.params, bucket.views(flat), strict=True):
                found.setdefault(param, {})[name] = view
    return found


def install(buckets: Iterable[Bucket], rule: Rule, saved: Held) -> None:
    """Copies saved state into buckets, zero where there is none.

    Buckets must have owners where owner memory was saved; see :func:`for_owner`.
    """
    for bucket in buckets:
        for name, flat in bucket.vectors().items():
            flat.copy_(_packed(bucket, name, saved))
        if bucket.owner is not None:
            bucket.owner.take_over(_packed(bucket, OWNER, saved), bucket.memory)
        bucket.aggregate = None
        name = rule.momentum_name(bucket.group)
        if not rule.local_momentum and any(name in saved.get(p, {}) for p in bucket.params):
            bucket.aggregate = _packed(bucket, name, saved)


def for_owner(saved: Held, size: int, owner: tuple[int, int] | None) -> Held:
    """Saved state for a worker that may own another range.

    If ranges are now cut for another world size, or not at all, owner memory moves to the worker's
    memory.

    Args:
        size: the world size p when the state was saved.
        owner: this worker's rank and the world size, with two-sided compression; else None.
    """
    if owner is not None and owner[1] == size:
        return saved
    return {param: without_owner(tensors, size) for param, tensors in saved.items()}


def without_owner(tensors: ParamState, size: int) -> ParamState:
    """A parameter's state with its owner memory moved to the memory.

    It is multiplied by p, because a memory counts 1/p in the mean over all workers.

    Args:
        size: the world size p when the state was saved.
    """
    found = {name: tensor for name, tensor in tensors.items() if name != OWNER}
    if OWNER in tensors:
        memory = found.get(MEMORY, torch.zeros_like(tensors[OWNER]))
        found[MEMORY] = torch.add(memory, tensors[OWNER], alpha=size)
    return found


def make_place(groups: Iterable[Group], key: str = _STAMP) -> None:
    """Adds the key of the stamp to each param group.

    torch reads a flattened state_dict by the keys of the groups that it is loaded into, so the key
    must exist before there is a stamp.
    """
    for group in groups:
        group.setdefault(key, None)


def show(buckets: Iterable[Bucket], rule: Rule, state: dict[Any, Any], changed: list[bool]) -> None:
    """Makes the entries of optimizer.state views of the buckets. Other keys stay.

    Args:
        changed: see Entry.
    """
    for bucket in buckets:
        shown: dict[str, list[Tensor]] = {k: bucket.views(v) for k, v in bucket.vectors().items()}
        if not rule.local_momentum:
            views: list[Tensor] = [MomentumView(bucket, i) for i in range(len(bucket.params))]
            shown[rule.momentum_name(bucket.group)] = views
        if bucket.owner is not None:
            shown[OWNER] = [OwnerView(bucket, i) for i in range(len(bucket.params))]
        for i, param in enumerate(bucket.params):
            kept = {k: v for k, v in (state.get(param) or {}).items() if k not in SHOWN}
            state[param] = Entry(kept | {name: views[i] for name, views in shown.items()}, changed)


def _packed(bucket: Bucket, name: str, saved: Held) -> Tensor:
    # A new tensor, because saved may hold views of the vector that this is copied into.
    flat = torch.zeros_like(bucket.memory)
    for param, view in zip(bucket.params, bucket.views(flat), strict=True):
        if name in saved.get(param, {}):
            view.copy_(saved[param][name])
    return flat


def _check_fits(value: Tensor, what: str, param: Tensor) -> None:
    if value.shape != shard_of(param).shape:
        raise ValueError(
            f"{what} has shape {tuple(value.shape)}, must be {tuple(shard_of(param).shape)}"
        )
    if not value.is_floating_point():
        raise TypeError(f"{what}: got {value.dtype}, must be a floating-point dtype")


# ------------------------------------------------------------------------------ saving and loading


def add(state_dict: dict[str, Any], params: list[Tensor], held: Held, stamp: Stamp) -> None:
    """Adds dense memory and momentum, and the stamp, to torch's state_dict."""
    for i, param in enumerate(params):
        if param in held:
            state_dict["state"][i] = {**state_dict["state"].get(i, {}), **held[param]}
    places = {id_: (g, i) for g, group in enumerate(state_dict["param_groups"])
              for i, id_ in enumerate(group["params"])}  # fmt: skip
    frozen = [
        "{}.{}".format(*places[i])
        for i, param in enumerate(params)
        if not param.requires_grad and any(bool(t.any()) for t in held.get(param, {}).values())
    ]
    stamp = replace(stamp, frozen=" ".join(frozen))
    for group in state_dict["param_groups"]:
        group.update({key: _plain(value) for key, value in group.items()})
        group[_STAMP] = stamp.entry()


def _plain(value: Any) -> Any:
    """A NumPy number as Python's, because torch.load(weights_only=True) refuses NumPy's."""
    if type(value).__module__ == "builtins" or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def assemble(state: dict[int, ParamState], groups: list[Group], stamp: Stamp) -> dict[str, Any]:
    """Makes a state_dict from each parameter's state and the groups of a state_dict."""
    groups = [{**group, _STAMP: stamp.entry()} for group in groups]
    return {"state": state, "param_groups": groups}


@dataclass(frozen=True)
class Loaded:
    """A state_dict that fits the optimizer.

    Attributes:
        groups: its param groups, with the optimizer's own parameters.
        held: each parameter's tensors.
        others: each parameter's entries that are not the optimizer's but the user's.
        stamp: whose state it is; None for torch.optim.SGD's.
    """

    groups: list[Group]
    held: Held
    others: dict[Tensor, dict[str, Any]]
    stamp: Stamp | None


def read(
    state_dict: dict[str, Any],
    groups: list[Group],
    rule: Rule,
    name: str,
    shard: tuple[int, int] | None,
) -> Loaded:
    """Checks a state_dict against an optimizer's groups, and changes nothing.

    Args:
        name: the optimizer's class.
        shard: which shard of the parameters it trains, see shards.place.

    Raises:
        ValueError: it is of another optimizer, format, shard or model.
    """
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            f"state_dict: got the keys {sorted(map(str, state_dict))}, must have 'state' and "
            "'param_groups', as state_dict() returns them"
        )
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise ValueError(f"state_dict: got {len(saved_groups)} param groups, must be {len(groups)}")
    ids: dict[Any, Tensor] = {}
    for g, (saved, own) in enumerate(zip(saved_groups, groups, strict=True)):
        if len(saved["params"]) != len(own["params"]):
            raise ValueError(
                f"state_dict: got {len(saved['params'])} parameters in group {g}, must be "
                f"{len(own['params'])}"
            )
        for i, param in zip(saved["params"], own["params"], strict=True):
            if i in ids:
                raise ValueError(f"state_dict: parameter {i!r} appears twice")
            ids[i] = param
    stamp = _read_stamp(saved_groups, state_dict["state"], name)
    _check_shard(stamp, shard)
    loaded_groups = [
        _merged(own, saved if stamp is not None else _from_sgd(saved, own))
        for saved, own in zip(saved_groups, groups, strict=True)
    ]
    held: Held = {}
    others: dict[Tensor, dict[str, Any]] = {}
    for saved, group in zip(saved_groups, loaded_groups, strict=True):
        wanted = {rule.momentum_name(group)}
        for i in saved["params"]:
            tensors = state_dict["state"].get(i)
            if tensors is None:
                continue  # frozen, or torch.optim.SGD before its first step
            required = wanted | {MEMORY} if stamp is not None else set()
            held[ids[i]] = _checked(tensors, required, wanted | {MEMORY, OWNER}, ids[i], i)
            others[ids[i]] = {
                key: value.to(ids[i].device, copy=True) if isinstance(value, Tensor) else value
                for key, value in tensors.items() if key not in SHOWN
            }  # fmt: skip
    if stamp is not None:
        _warn_of_dropped(stamp, saved_groups, state_dict["state"])
    return Loaded(loaded_groups, held, others, stamp)


def _warn_of_dropped(stamp: Stamp, groups: list[Group], state: dict[Any, Any]) -> None:
    """Warns if a frozen parameter's memory was saved but is not in the state_dict."""
    dropped = []
    for place in stamp.frozen.split():
        g, i = map(int, place.split("."))
        if groups[g]["params"][i] not in state:
            dropped.append(f"{parameter_name(groups[g], i)} of group {g}")
    if dropped:
        warnings.warn(
            f"state_dict: it has no state of {', '.join(dropped)}, which was frozen with gradients "
            "in memory that were not sent yet; these are lost if it is trained again. torch's "
            "set_optimizer_state_dict leaves frozen parameters out: set requires_grad to True "
            "while it is called, or use optimizer.load_state_dict or gmc_cuda.checkpoint",
            stacklevel=4,
        )


def warn_of_another_ranks(held: Held, stamp: Stamp | None, rank: int, size: int) -> None:
    """Warns if another worker saved the memory that this one loads."""
    if stamp is None or stamp.averaged or (stamp.rank, stamp.world_size) == (rank, size):
        return
    unsent = (state[k] for state in held.values() for k in (MEMORY, OWNER) if k in state)
    if not any(bool(tensor.any()) for tensor in unsent):
        return
    warnings.warn(
        f"this optimizer is rank {rank} of {size}, but the state was saved by rank {stamp.rank} of "
        f"{stamp.world_size}: what other ranks had not sent is lost, and what this one had counts "
        "more than once. Call optimizer.average_memory_() on all ranks before saving, let each "
        "rank save and load its own state, or use gmc_cuda.checkpoint",
        stacklevel=3,
    )


def for_sgd(state_dict: dict[str, Any]) -> dict[str, Any]:
    """GMC's state for torch.optim.SGD.load_state_dict.

    Raises:
        ValueError: memory is not zero, or momentum_form is "iterate".
    """
    state: dict[Any, ParamState] = {}
    for i, tensors in state_dict["state"].items():
        if "momentum_buffer" not in tensors:
            raise ValueError(
                "torch.optim.SGD has no momentum_form='iterate': set it to 'buffer' and make a step"
            )
        if any(name in tensors and tensors[name].any() for name in (MEMORY, OWNER)):
            raise ValueError(
                f"parameter {i} has gradients in memory that were not sent yet, and "
                "torch.optim.SGD has no memory: set density to 1.0 in every param group, make a "
                "step, and export again"
            )
        state[i] = {"momentum_buffer": tensors["momentum_buffer"].clone()}
    groups = []
    for group in state_dict["param_groups"]:
        kept = {k: group[k] for k in ("params", *_SHARED_WITH_SGD, "initial_lr") if k in group}
        groups.append(
            kept | {"dampening": 0.0, "foreach": None}
            | {"differentiable": False, "fused": None}
        )  # fmt: skip
    return {"state": state, "param_groups": groups}


_SHARED_WITH_SGD = ("lr", "momentum", "weight_decay", "maximize", "nesterov")


def _read_stamp(groups: list[Group], state: dict[Any, Any], name: str) -> Stamp | None:
    stamps = [group.get(_STAMP) for group in groups]
    if not any(stamps):
        strange = {key for tensors in state.values() for key in tensors} - {"momentum_buffer"}
        if strange or any("dampening" not in group for group in groups):
            raise ValueError(
                f"state_dict: got the state of another optimizer, with {sorted(strange)} for a "
                f"parameter; must come from {name} or torch.optim.SGD"
            )
        return None
    if not all(stamps) or len({stamp["optimizer"] for stamp in stamps if stamp}) > 1:
        raise ValueError("state_dict: its param groups were saved by different optimizers")
    stamp: Any = stamps[0]
    if stamp["optimizer"] != name:
        raise ValueError(f"state_dict: got the state of {stamp['optimizer']}, must be of {name}")
    if stamp["format"] != FORMAT:
        raise ValueError(
            f"state_dict: got format {stamp['format']}, this version of gmc_cuda reads {FORMAT}"
        )
    return Stamp(**stamp)


def _check_shard(stamp: Stamp | None, own: tuple[int, int] | None) -> None:
    """Refuses another shard's state. Its tensors may have the right shapes, but are of other rows.

    States of earlier versions do not say of which shard they are.
    """
    if stamp is None or stamp.shard is None or (stamp.shard, stamp.shards) == own:
        return
    must = "be of parameters that are not sharded" if own is None else "be of shard {} of {}"
    raise ValueError(
        f"state_dict: got that of shard {stamp.shard} of {stamp.shards}, must "
        f"{must.format(*own or ())}: each worker of a node holds another shard of the parameters, "
        "and of memory and momentum. Let each worker save and load its own state, or use "
        "gmc_cuda.checkpoint; torch.distributed.checkpoint keeps only one shard's"
    )


def _from_sgd(saved: Group, own: Group) -> Group:
    for key, must in (("dampening", 0), ("nesterov", own.get("nesterov", False))):
        if saved[key] != must:
            raise ValueError(
                f"state_dict: got torch.optim.SGD's with {key}={saved[key]}, must be {must}"
            )
    keys = ("params", "param_names", "initial_lr", *_SHARED_WITH_SGD)
    return {key: saved[key] for key in keys if key in saved}


def _merged(own: Group, saved: Group) -> Group:
    """The saved options; an option that an old state lacks keeps its present value."""
    saved = {key: deepcopy(value) for key, value in saved.items() if key not in ("params", _STAMP)}
    for key, value in saved.items():
        if isinstance(value, Tensor) and isinstance(own.get(key), Tensor):
            saved[key] = value.to(own[key].device)  # a checkpoint's tensors are on the CPU
    return {**own, **one_budget(saved)}


def _checked(
    tensors: dict[str, Any], required: set[str], known: set[str], param: Tensor, i: Any
) -> ParamState:
    if tensors and not any(name in tensors for name in SHOWN):
        return {}  # a frozen parameter, with entries of the user's only
    missing = required - set(tensors)
    if missing:
        hint = "" if tensors else (
            ". torch reads a flattened state by what optimizer.state holds: construct the "
            "optimizer after requires_grad was set to True"
        )  # fmt: skip
        raise ValueError(
            f"state_dict: parameter {i} has no '{min(missing)}', but {sorted(tensors)}{hint}"
        )
    state = {key: value for key, value in tensors.items() if key in known and value is not None}
    for key, value in state.items():
        _check_fits(value, f"state_dict: {key} of parameter {i}", param)
    return state
