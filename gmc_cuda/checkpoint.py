"""Checkpoints that keep every worker's memory, and resume on any number of workers.

A checkpoint is a folder on storage that all workers see. It holds a subfolder written by
torch.distributed.checkpoint and a file ``current`` that names it; the file is replaced last, so
that a save that ends half-way (a full disk, a killed worker) leaves the checkpoint before it.
"""

from __future__ import annotations

import io
import os
import secrets
import shutil
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from gmc_cuda._engine import state as states
from gmc_cuda._engine.engine import params_of
from gmc_cuda._engine.exchange import Exchange, GroupLost
from gmc_cuda._engine.optimizer import CompressedSGD
from gmc_cuda._engine.shards import is_flattened, local

FORMAT = 2
_CURRENT, _FACTS = "current", "facts.pt"
_MODEL, _SHARED, _WORKER = "model", "shared", "worker"

# Saves on their way, and the gloo groups they use beside the training's own collectives.
_saving: weakref.WeakKeyDictionary[CompressedSGD, Future[None]] = weakref.WeakKeyDictionary()
_groups: weakref.WeakKeyDictionary[CompressedSGD, Exchange] = weakref.WeakKeyDictionary()


@torch.no_grad()
def save(
    folder: str | os.PathLike[str],
    model: torch.nn.Module,
    optimizer: CompressedSGD,
    extra: Any = None,
    *,
    wait: bool = True,
) -> Future[None]:
    """Saves model, optimizer and what else a run needs. All workers of the optimizer call it.

    Args:
        folder: where the checkpoint goes, on storage that all workers see. One that is there is
            replaced once the new one is complete.
        model: the model, also inside DistributedDataParallel or torch.compile. Buffers that differ
            between workers (BatchNorm's) are saved as worker 0 has them.
        optimizer: a GMC or DGC over the model's parameters, which FSDP2 may have sharded.
        extra: worker 0's is saved: a scheduler's state_dict, the epoch; tensors, numbers, strings
            and containers of them.
        wait: False copies the state and writes it while the training goes on. The next save waits
            for it.

    Returns:
        A future: ``result()`` waits for the end of the writing, and raises if it failed.

    Raises:
        TypeError: another optimizer, or extra holds what torch.load(weights_only=True) would
            refuse.
        RuntimeError: a worker could not write; on all workers. The checkpoint before is intact.
    """
    _check_optimizer(optimizer)
    before = _saving.pop(optimizer, None)
    if before is not None:
        before.result()
    optimizer.engine.refuse_open_round("checkpoint.save")
    _check_extra(extra)
    work = _Save(Path(folder), model, optimizer, extra)
    if wait or not _has_group_of_its_own(optimizer):
        done: Future[None] = Future()
        work.write(_everyone(optimizer))
        done.set_result(None)
        return done
    work.tensors = _copy(work.tensors)
    executor = ThreadPoolExecutor(1, thread_name_prefix="gmc_cuda.checkpoint")
    _saving[optimizer] = executor.submit(work.write, _groups[optimizer])
    executor.shutdown(wait=False)
    return _saving[optimizer]


@torch.no_grad()
def load(folder: str | os.PathLike[str], model: torch.nn.Module, optimizer: CompressedSGD) -> Any:
    """Loads what :func:`save` wrote into model and optimizer. All workers call it.

    On as many workers as saved it each gets its own memory back, and the run goes on bit for bit.
    On another number each gets the mean of the saved memories, so that nothing unsent is lost.
    Shards stay what they were: the number of nodes may change, not that of workers in a node.

    Returns:
        The ``extra`` that was saved.

    Raises:
        FileNotFoundError: there is no complete checkpoint in the folder.
        ValueError: it is of another method, model or format; nothing was changed.
    """
    _check_optimizer(optimizer)
    part = _current(Path(folder))
    facts = torch.load(part / _FACTS, weights_only=True)
    _check_facts(facts, _describe(model, optimizer))
    exchange, everyone = optimizer.engine.exchange, _everyone(optimizer)
    params = params_of(optimizer)
    size, shard = facts["world_size"], _shard(optimizer)

    def read(key: str, template: dict[str, Any]) -> dict[str, Any]:
        found = {key: {name: torch.empty_like(value) for name, value in template.items()}}
        _distributed(dcp_load, found, part, everyone)
        return found[key]

    def wanted(shared: bool) -> dict[str, Tensor]:
        return {
            f"{i}.{name}": torch.empty(param.shape, device=param.device)
            for (i, param), names in zip(enumerate(map(local, params)), facts["held"], strict=True)
            for name, is_shared in names.items()
            if is_shared == shared and param.numel()
        }

    state: dict[int, dict[str, Tensor]] = {}
    some_shared = any(is_shared for names in facts["held"] for is_shared in names.values())
    tensors = read(_SHARED + shard, wanted(shared=True)) if some_shared else {}
    if size == exchange.size:
        tensors |= read(f"{_WORKER}{exchange.rank}{shard}", wanted(shared=False))
    else:
        total = read(f"{_WORKER}0{shard}", wanted(shared=False))
        for rank in range(1, size):
            for name, tensor in read(f"{_WORKER}{rank}{shard}", wanted(shared=False)).items():
                total[name] += tensor
        tensors |= {name: tensor / size for name, tensor in total.items()}
    for key, tensor in tensors.items():
        i, name = key.split(".")
        state.setdefault(int(i), {})[name] = tensor
    whose = states.Stamp(
        type(optimizer).__name__,
        exchange.rank,
        exchange.size,
        averaged=facts["averaged"] or size != exchange.size,
    )
    model_state = read(_MODEL, get_model_state_dict(model))
    optimizer.load_state_dict(states.assemble(state, facts["groups"], whose))
    set_model_state_dict(model, model_state)
    return facts["extra"]


class _Save:
    """What a checkpoint holds, and how it gets into its folder."""

    def __init__(
        self, folder: Path, model: torch.nn.Module, optimizer: CompressedSGD, extra: Any
    ) -> None:
        self.folder = folder.absolute()  # a script may change its folder before it is written
        engine, params = optimizer.engine, params_of(optimizer)
        exchange, held, own = engine.exchange, engine.held(), engine.rule.own_state()
        shared: dict[str, Tensor] = {}
        private: dict[str, Tensor] = {}
        for i, param in enumerate(params):
            for name, tensor in held.get(param, {}).items():
                (private if name in own else shared)[f"{i}.{name}"] = tensor
        self.tensors: dict[str, Any] = {
            _MODEL: get_model_state_dict(model),
            _SHARED + _shard(optimizer): shared,
            f"{_WORKER}{exchange.rank}{_shard(optimizer)}": private,
        }
        self.facts = _describe(model, optimizer) | {
            "world_size": exchange.size,
            "averaged": engine.averaged,
            "groups": optimizer.state_dict()["param_groups"],
            "held": [{name: name not in own for name in held.get(p, {})} for p in params],
            "extra": extra,
        }

    def write(self, exchange: Exchange) -> None:
        """Collective over the exchange."""
        try:
            self._write(exchange)
        except GroupLost as error:
            outcome = "what the folder held is complete"
            raise error.told("checkpoint.save", exchange.rank, outcome) from error

    def _write(self, exchange: Exchange) -> None:
        cpu = torch.device("cpu")
        (name, *_) = exchange.gather_objects(secrets.token_hex(4), cpu)
        part = self.folder / name
        self._together(exchange, lambda: self._prepare(part) if exchange.rank == 0 else None)
        try:
            self._together(exchange, lambda: _distributed(dcp_save, self.tensors, part, exchange))
            self._together(exchange, lambda: self._publish(part) if exchange.rank == 0 else None)
        except Exception:
            if exchange.rank == 0:
                shutil.rmtree(part, ignore_errors=True)
            raise

    def _prepare(self, part: Path) -> None:
        part.mkdir(parents=True)
        torch.save(self.facts, part / _FACTS)

    def _publish(self, part: Path) -> None:
        """Makes the new part the current one; what was there before goes."""
        pointer = part.with_suffix(".pointer")
        pointer.write_text(part.name)
        with pointer.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(pointer, self.folder / _CURRENT)
        for old in self.folder.iterdir():
            if old.is_dir() and old != part and (old / _FACTS).exists():
                shutil.rmtree(old, ignore_errors=True)

    @staticmethod
    def _together(exchange: Exchange, action: Callable[[], Any]) -> None:
        """Runs it on every worker; if it fails on one, all raise."""
        error: BaseException | None = None
        try:
            action()
        except dcp.api.CheckpointException as met:  # no Exception, and raised on all workers
            error = dict(met.failures).get(exchange.rank, (None,))[0]
        except Exception as met:
            error = met
        said = exchange.gather_objects(
            error and f"{type(error).__name__}: {error}", torch.device("cpu")
        )
        failed = [f"worker {rank}: {text}" for rank, text in enumerate(said) if text]
        if failed:
            raise RuntimeError(f"the checkpoint was not saved; {'; '.join(failed)}") from error


def _everyone(optimizer: CompressedSGD) -> Exchange:
    """The workers that save together: those of all shards."""
    exchange = optimizer.engine.exchange
    if exchange.agree_group is None:
        return exchange
    everyone = Exchange(None)
    if everyone.size != exchange.size * _shards(optimizer):
        raise ValueError(
            f"optimizer: got a mesh of {exchange.size * _shards(optimizer)} workers, must hold all "
            f"{everyone.size} of this run"
        )
    return everyone


def _shards(optimizer: CompressedSGD) -> int:
    inside = optimizer.engine.exchange.agree_group
    return 1 if inside is None else dist.get_world_size(inside)


def _shard(optimizer: CompressedSGD) -> str:
    """What the names of this worker's tensors end with."""
    inside = optimizer.engine.exchange.agree_group
    return "" if inside is None else f".shard{dist.get_rank(inside)}"


def _check_optimizer(optimizer: Any) -> None:
    by_itself = (
        "Let each worker save and load its own state:\n"
        "    torch.save(optimizer.state_dict(), f'optimizer{rank}.pt')"
    )
    if not isinstance(optimizer, CompressedSGD):
        raise TypeError(
            f"optimizer: got a {type(optimizer).__name__}, must be a GMC or DGC. {by_itself}"
        )
    if any(is_flattened(param) for param in params_of(optimizer)):
        raise TypeError(
            "optimizer: got parameters of FullyShardedDataParallel, whose parts say nothing of the "
            f"whole, must be FSDP2's (fully_shard). {by_itself}"
        )


def _describe(model: torch.nn.Module, optimizer: CompressedSGD) -> dict[str, Any]:
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    params = params_of(optimizer)
    unknown = [i for i, param in enumerate(params) if param not in names]
    if unknown:
        raise ValueError(
            f"model: parameter {unknown[0]} of the optimizer is not one of the model's"
        )
    found = [(names[p].removeprefix("module."), tuple(p.shape), str(p.dtype)) for p in params]
    return {
        "format": FORMAT,
        "optimizer": type(optimizer).__name__,
        "number of shards": _shards(optimizer),
        "parameters": found,
    }


def _check_facts(saved: dict[str, Any], here: dict[str, Any]) -> None:
    for name in ("format", "optimizer", "number of shards"):
        if saved[name] != here[name]:
            raise ValueError(f"checkpoint: got {name} {saved[name]}, must be {here[name]}")
    if len(saved["parameters"]) != len(here["parameters"]):
        raise ValueError(
            f"checkpoint: got one of {len(saved['parameters'])} parameters, must be of "
            f"{len(here['parameters'])}"
        )
    for then, now in zip(saved["parameters"], here["parameters"], strict=True):
        if tuple(then) != tuple(now):
            raise ValueError(
                "checkpoint: got a parameter {} of shape {} and {}, must be {} of shape {} and "
                "{}".format(*then, *now)
            )


def _check_extra(extra: Any) -> None:
    file = io.BytesIO()
    torch.save(extra, file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except Exception as error:
        raise TypeError(
            "extra: got an object that torch.load(weights_only=True) refuses, must be made of "
            "tensors, numbers, strings and containers of them (a state_dict, not the object)"
        ) from error


def _current(folder: Path) -> Path:
    try:
        return folder / (folder / _CURRENT).read_text()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no complete checkpoint in {folder}") from None


def _distributed(
    action: Callable[..., Any], tensors: dict[str, Any], part: Path, exchange: Exchange
) -> None:
    """Calls dcp.save or dcp.load with the workers of the exchange."""
    with warnings.catch_warnings():
        if exchange.group is None:  # which is just what no_dist says
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
        action(
            tensors,
            checkpoint_id=part,
            process_group=exchange.group,
            no_dist=exchange.group is None,
        )


def _copy(tensors: Any) -> Any:
    if isinstance(tensors, dict):
        return {key: _copy(value) for key, value in tensors.items()}
    return tensors.detach().to("cpu", copy=True) if isinstance(tensors, Tensor) else tensors


def _has_group_of_its_own(optimizer: CompressedSGD) -> bool:
    """Makes the group on which a save goes on beside the training, unless it is there already."""
    if optimizer in _groups:
        return True
    exchange = _everyone(optimizer)
    if exchange.group is None:
        _groups[optimizer] = exchange
    elif exchange.group is dist.group.WORLD:
        _groups[optimizer] = Exchange(_joined(dist.new_group(backend="gloo")))
    else:  # the others of the world are not here
        ranks = dist.get_process_group_ranks(exchange.group)
        if not _names_it_alike(ranks, exchange):
            warnings.warn(
                "checkpoint.save: wait=False waits, because this torch cannot make a group where "
                "workers are in different numbers of groups so far (torch 2.14 can)",
                stacklevel=4,  # of save(), which no_grad wraps
            )
            return False
        group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        _groups[optimizer] = Exchange(_joined(group))
    return True


def _names_it_alike(ranks: list[int], exchange: Exchange) -> bool:
    """Whether torch gives the group one name on all workers; with two they never find each other.

    It makes the name of the number of groups that a worker is in (up to 2.13) or has made.
    """
    name = getattr(dist.distributed_c10d, "_hash_ranks_to_str", lambda ranks: "")
    return len(set(exchange.gather_objects(name(ranks), torch.device("cpu")))) == 1


def _joined(group: Any) -> dist.ProcessGroup:
    assert isinstance(group, dist.ProcessGroup)  # torch's type allows for a group without us
    return group
