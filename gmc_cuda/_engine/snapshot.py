"""The files of a checkpoint: what they hold of a model and its optimizer, and how they are read.

``facts.pt`` describes the model and the optimizer. ``shared.pt`` holds the model, and the momentum
if all workers have the same. ``worker0.pt``, ``worker1.pt`` ... hold each worker's own state, and
``entries0.pt`` ... what users have put into optimizer.state, if anything. If parameters are
sharded, each worker of a node writes its shard: ``shared.shard1.pt`` and so on.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gmc_cuda._engine import engine, format2, names, parts
from gmc_cuda._engine import state as states
from gmc_cuda._engine.exchange import Exchange
from gmc_cuda._engine.optimizer import CompressedSGD
from gmc_cuda._engine.shards import is_sharded, shard_of

FORMAT = 3
_MODEL, _MOMENTUM, _NOT_TENSORS = "model", "momentum", "not tensors"

# ----------------------------------------------------------------------------------------- writing


def take(
    model: torch.nn.Module, optimizer: CompressedSGD, extra: Any, everyone: Exchange, copy: bool
) -> dict[str, Any]:
    """The content of the files that this worker writes, by file name.

    Args:
        everyone: the workers that save together.
        copy: whether to copy all tensors, because the training goes on during the save.
    """
    own_engine = optimizer.engine
    place = {param: i for i, param in enumerate(engine.params_of(optimizer))}
    own, shard = own_engine.rule.own_state(), _shard(optimizer)
    # Before held(), because state_dict() makes copies of the momentum too, which are freed here.
    groups = dict(enumerate(optimizer.state_dict()["param_groups"]))
    groups = _loadable_entries("param_groups", groups)
    momentum: dict[str, Tensor] = {}
    private: dict[str, Tensor] = {}
    for param, tensors in own_engine.held().items():
        for name, tensor in tensors.items():
            if name == states.OWNER and not tensor.any():  # most of it is another worker's
                continue
            (private if name in own else momentum)[f"{place[param]}.{name}"] = tensor
    files: dict[str, Any] = {f"worker{own_engine.exchange.rank}{shard}.pt": private}
    entries = _users_entries(optimizer)
    if entries:
        files[f"entries{own_engine.exchange.rank}{shard}.pt"] = entries
    if own_engine.exchange.rank == 0:
        files[f"shared{shard}.pt"] = {**_model_state(model, optimizer), _MOMENTUM: momentum}
    if everyone.rank == 0:
        files[parts.FACTS] = describe(model, optimizer) | {
            "world_size": own_engine.exchange.size,
            "averaged": own_engine.averaged,
            "groups": list(groups.values()),
            "extra": extra,
        }
    return _copied(files) if copy else files


def _model_state(model: torch.nn.Module, optimizer: CompressedSGD) -> dict[str, Any]:
    state = model.state_dict()
    plain = names.plain_names(state)
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            _check_shards(name, value, optimizer)
            tensor = shard_of(value).detach()
            # torch.save writes the whole storage of a view.
            whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            tensors[plain[name]] = tensor if whole else tensor.clone()
        else:
            rest[plain[name]] = value
    return {_MODEL: tensors, _NOT_TENSORS: loadable("the model's extra state", rest)}


def _check_shards(name: str, value: Tensor, optimizer: CompressedSGD) -> None:
    """Refuses a DTensor that is sharded in another way than the optimizer's parameters.

    Its shards would not be the files' shards, so some would be written twice and others not.
    """
    if not is_sharded(value):
        return
    inside = optimizer.engine.exchange.shard_group
    mesh = value.device_mesh  # type: ignore[attr-defined]
    ranks = [] if inside is None else sorted(dist.get_process_group_ranks(inside))
    if sorted(mesh.mesh.flatten().tolist()) != ranks:
        raise TypeError(
            f"model: got {name} as a DTensor over the ranks {mesh.mesh.tolist()}, must be one over "
            f"{ranks}, like the parameters of this optimizer. Give all of the model to one "
            "optimizer, or save such a model by torch.distributed.checkpoint, and let each worker "
            "save and load its own state of each optimizer:\n"
            "    torch.save(optimizer.state_dict(), f'optimizer{rank}.pt')"
        )


def loadable(what: str, value: Any) -> Any:
    """A copy of a value, as torch.load(weights_only=True) returns it.

    Raises:
        TypeError: torch.load(weights_only=True) refuses it.
    """
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise TypeError(
            f"{what}: got an object that torch.load(weights_only=True) refuses, must be made of "
            "tensors, numbers, strings and containers of them (a state_dict, not the object)"
        ) from error


def _loadable_entries(what: str, dicts: dict[int, dict[Any, Any]]) -> dict[int, dict[Any, Any]]:
    """loadable() of the optimizer's dicts, to which users may add; names the entry refused."""
    try:
        found: dict[int, dict[Any, Any]] = loadable("optimizer", dicts)
    except TypeError:
        for i, entries in dicts.items():
            for key, value in entries.items():
                loadable(f"optimizer.{what}[{i}][{key!r}]", value)
        raise
    return found


def _users_entries(optimizer: CompressedSGD) -> dict[int, dict[str, Any]]:
    """What users have put into optimizer.state, by the place of the parameter.

    A DTensor would name the ranks of this run, so its shard is kept, and "shards" has its key.
    """
    found: dict[int, dict[Any, Any]] = {}
    shards: dict[int, list[Any]] = {}
    for i, param in enumerate(engine.params_of(optimizer)):
        for key, value in (optimizer.state.get(param) or {}).items():
            if key in states.SHOWN:
                continue
            if isinstance(value, Tensor) and is_sharded(value):
                if not _is_cut_like(value, param):
                    raise TypeError(
                        f"optimizer.state[{i}][{key!r}]: got a DTensor that is not sharded like "
                        "its parameter, must be, or be a plain tensor"
                    )
                shards.setdefault(i, []).append(key)
                value = shard_of(value)
            found.setdefault(i, {})[key] = value
    return {
        i: {"entries": entries, "shards": shards.get(i, [])}
        for i, entries in _loadable_entries("state", found).items()
    }


def _is_cut_like(value: Any, param: Any) -> bool:
    same = is_sharded(param) and value.shape == param.shape
    return same and (value.device_mesh, value.placements) == (param.device_mesh, param.placements)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


# ----------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Found:
    """A checkpoint that was read and fits.

    Attributes:
        model, optimizer: arguments of their load_state_dict().
        extra: the argument of checkpoint.save.
    """

    model: dict[str, Any]
    optimizer: dict[str, Any]
    extra: Any


def read(part: Path, model: torch.nn.Module, optimizer: CompressedSGD) -> Found:
    """Reads what this worker needs, and changes nothing. No collective.

    Raises:
        Damaged: a file differs from what was written.
        ValueError, TypeError: the checkpoint does not fit.
    """
    listing = parts.listing(part)

    def open_file(name: str) -> Any:
        if listing is not None:
            if name not in listing:
                raise parts.Damaged(f"{part / name} is not in the list of its files")
            parts.verify(part, name, *listing[name])
        return torch.load(part / name, map_location="cpu", weights_only=True)

    facts = open_file(parts.FACTS)
    _check_facts(facts, describe(model, optimizer))
    exchange, shard = optimizer.engine.exchange, _shard(optimizer)
    if listing is None:
        shared, private = format2.readers(part, facts, model, optimizer, shard)
    else:
        shared = open_file(f"shared{shard}.pt")

        def private(rank: int) -> dict[str, Tensor]:
            tensors: dict[str, Tensor] = open_file(f"worker{rank}{shard}.pt")
            return tensors

    size = facts["world_size"]
    own = private(exchange.rank) if size == exchange.size else _mean(private, size)
    state: dict[int, dict[Any, Any]] = _by_parameter(shared[_MOMENTUM] | own)
    # On another number of workers all get rank 0's, for nobody knows how to average them.
    entries = f"entries{exchange.rank if size == exchange.size else 0}{shard}.pt"
    if listing is not None and entries in listing:
        params = engine.params_of(optimizer)
        for i, users in open_file(entries).items():
            for key in users["shards"]:
                name = f"state[{i}][{key!r}]"
                users["entries"][key] = _like(params[i], users["entries"][key], name)
            state[i] = {**state.get(i, {}), **users["entries"]}
    averaged = facts["averaged"] or size != exchange.size
    stamp = states.Stamp(type(optimizer).__name__, exchange.rank, exchange.size, averaged)
    whole = states.assemble(state, facts["groups"], stamp)
    states.read(whole, optimizer.param_groups, optimizer.engine.rule, stamp.optimizer, None)
    return Found(_for_model(model, shared), whole, facts["extra"])


def _mean(private: Callable[[int], dict[str, Tensor]], size: int) -> dict[str, Tensor]:
    """What each of other workers had, for any worker: the mean. What one of them owned for all
    counts in it as much as what each of them had not sent."""
    total: dict[str, Tensor] = {}
    for rank in range(size):
        for i, tensors in _by_parameter(private(rank)).items():
            for name, tensor in states.without_owner(tensors, size).items():
                key = f"{i}.{name}"
                total[key] = total[key] + tensor if key in total else tensor
    return {key: tensor / size for key, tensor in total.items()}


def _by_parameter(tensors: dict[str, Tensor]) -> dict[int, states.ParamState]:
    """Tensors of a file, whose keys are "place.name", by the place of their parameter."""
    found: dict[int, states.ParamState] = {}
    for key, tensor in tensors.items():
        i, name = key.split(".")
        found.setdefault(int(i), {})[name] = tensor
    return found


def _for_model(model: torch.nn.Module, shared: dict[str, Any]) -> dict[str, Any]:
    own, saved = model.state_dict(), shared[_MODEL] | shared[_NOT_TENSORS]
    plain = names.plain_names(own)
    for here, there, which in ((set(plain.values()), set(saved), "lacks"),
                               (set(saved), set(plain.values()), "has")):  # fmt: skip
        if here - there:
            verb = "must have it" if which == "lacks" else "this model does not have it"
            raise ValueError(f"checkpoint: {which} {min(here - there)!r} of a model, {verb}")
    return {name: _like(value, saved[plain[name]], plain[name]) for name, value in own.items()}


def _like(own: Any, saved: Any, name: str) -> Any:
    if not isinstance(own, Tensor):
        return saved
    shape = tuple(shard_of(own).shape)
    if tuple(saved.shape) != shape:
        raise ValueError(
            f"checkpoint: got {name!r} of the model with shape {tuple(saved.shape)}, must be "
            f"{shape}"
        )
    if not is_sharded(own):
        return saved
    from torch.distributed.tensor import DTensor

    assert isinstance(own, DTensor)
    shard = saved.to(shard_of(own).device)
    return DTensor.from_local(
        shard, own.device_mesh, own.placements, run_check=False, shape=own.shape,
        stride=own.stride(),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- facts


def shards(optimizer: CompressedSGD) -> int:
    """Over how many workers of a node the parameters are sharded."""
    inside = optimizer.engine.exchange.shard_group
    return 1 if inside is None else dist.get_world_size(inside)


def _shard(optimizer: CompressedSGD) -> str:
    """The part of this worker's file names that names its shard."""
    inside = optimizer.engine.exchange.shard_group
    return "" if inside is None else f".shard{dist.get_rank(inside)}"


def describe(model: torch.nn.Module, optimizer: CompressedSGD) -> dict[str, Any]:
    """The facts that must be the same when a checkpoint is saved and when it is loaded.

    Raises:
        ValueError: the optimizer is not this model's.
    """
    named: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    params = engine.params_of(optimizer)
    unknown = [i for i, param in enumerate(params) if param not in named]
    if unknown:
        raise ValueError(
            f"model: parameter {unknown[0]} of the optimizer is not one of the model's"
        )
    plain = names.plain_names(named.values())
    found = [(plain[named[p]], tuple(p.shape), str(p.dtype)) for p in params]
    return {
        "format": FORMAT,
        "optimizer": type(optimizer).__name__,
        "number of shards": shards(optimizer),
        "parameters": found,
    }


def _check_facts(saved: dict[str, Any], here: dict[str, Any]) -> None:
    if saved["format"] not in (FORMAT, format2.FORMAT):
        raise ValueError(
            f"checkpoint: got format {saved['format']}, this version of gmc_cuda reads "
            f"{format2.FORMAT} and {FORMAT}"
        )
    for name in ("optimizer", "number of shards"):
        if saved[name] != here[name]:
            raise ValueError(f"checkpoint: got {name} {saved[name]}, must be {here[name]}")
    if len(saved["parameters"]) != len(here["parameters"]):
        raise ValueError(
            f"checkpoint: got one of {len(saved['parameters'])} parameters, must be of "
            f"{len(here['parameters'])}"
        )
    plain = names.plain_names(
        name for name, *_ in saved["parameters"]
    )  # format 2 stored full names
    for (name, *then), now in zip(saved["parameters"], here["parameters"], strict=True):
        then = [plain[name], *map(_as_tuple, then)]
        if tuple(then) != tuple(now):
            raise ValueError(
                "checkpoint: got a parameter {} of shape {} and {}, must be {} of shape {} and "
                "{}".format(*then, *now)
            )


def _as_tuple(value: Any) -> Any:
    return value if isinstance(value, str) else tuple(value)
