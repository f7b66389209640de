"""The functional layer: gradient compression operators on CPU or CUDA tensors.

Every function checks its arguments and raises ``ValueError`` or ``TypeError`` naming the argument,
what it was and what it must be, before anything is changed. On the CPU :func:`unpack`,
:func:`merge` and :func:`merge_ranges` also raise ``RuntimeError`` for a damaged payload. Only
:func:`repairs` synchronises the host with a CUDA device. The operators are registered as
``torch.ops.gmc_cuda.*``. :mod:`gmc_cuda.reference` has all functions but :func:`repairs` in plain
PyTorch, with the same bytes in payloads and memories, and others in aggregates.

Notation, as in the GMC paper: memory u, gradient g, momentum coefficient beta, aggregate a, vector
to compress v, what is sent c, parameters w, learning rate eta, numel N, world size p.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import starmap
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from gmc_cuda._engine import library  # noqa: F401  (loads the operators)

__all__ = [
    "payload_nbytes",
    "select_state",
    "repairs",
    "compress_",
    "accumulate_",
    "apply_dense_",
    "unpack",
    "verdict",
    "merge",
    "merge_ranges",
    "apply_",
    "restore_",
    "mask_",
    "sparsify",
    "densify",
    "NONFINITE",
    "DAMAGED",
    "MISMATCH",
    "OFF",
    "CALLED_OFF",
]

_ops = torch.ops.gmc_cuda

NONFINITE = 1  #: Bit of a :func:`verdict`: some rank met a non-finite value.
DAMAGED = 2  #: Bit of a :func:`verdict` and of ``flags``: a payload is damaged.
MISMATCH = 4  #: Bit of a :func:`verdict`: in some bucket the tags of two ranks differ.
OFF = 8  #: Bit of a :func:`verdict`: a rank has called its step off.
_is_negative: Any = Tensor.is_neg  # torch's negative bit, which conj() of a complex tensor leaves
_SMALLEST_STATE = 64  # bytes, on the CPU
CALLED_OFF = 1  #: The tag by which a rank calls its step off.
_KINDS = {kind.__name__: kind for kind in (ValueError, TypeError, NotImplementedError)}
# The operators of which a second call would count something twice.
_ADDING = {
    _ops.compress_, _ops.accumulate_, _ops.apply_, _ops.apply_dense_, _ops.restore_, _ops.mask_
}  # fmt: skip


class noted:
    """Within it, what operators return that add to their arguments goes into a list as well.

    Python raises an interrupt of the user's when the operator that it came in returns, and what
    that returned is lost. The list has it, and so tells whether the operator has run. Used by
    gmc_cuda's own steps.
    """

    _now = threading.local()

    def __init__(self, results: list[Any]) -> None:
        self._results = results

    def __enter__(self) -> None:
        self._before = getattr(self._now, "results", None)
        self._now.results = self._results

    def __exit__(self, *_: object) -> None:
        self._now.results = self._before


def _call(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls an operator. C++ can raise RuntimeError alone, and puts the kind before the text."""
    try:
        if not torch.compiler.is_compiling() and op in _ADDING:
            results = getattr(noted._now, "results", None)
            if results is not None:
                # All in C, so that no interrupt comes before the result is in the list.
                results.extend(starmap(partial(op.default._op, **kwargs), (args,)))
                return results[-1]
        return op.default(*args, **kwargs)
    except RuntimeError as error:
        kind, _, text = str(error).partition(": ")
        problem = _KINDS[kind](text) if kind in _KINDS else _unusual_layout(op, args)
        if problem is None:
            raise
        raise problem from None


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _fake(name: str) -> Callable[[_Function], _Function]:
    """Marks what an operator returns without computing it, for torch.compile and torch.export."""
    fake: Callable[[_Function], _Function] = torch.library.register_fake(f"gmc_cuda::{name}")
    return fake


def _changes_arguments(*args: Any, **options: Any) -> None:
    """The fake of an operator that only changes its arguments."""


for _name in ("merge_", "apply_", "apply_dense_", "restore_", "mask_"):
    _fake(_name)(_changes_arguments)


def _tensor(op: Any, *args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = _call(op, *args, **kwargs)
    return result


def _integer(op: Any, *args: Any) -> int:
    result: int = _call(op, *args)
    return result


def _unusual_layout(op: Any, args: Sequence[Any]) -> Exception | None:
    """Tensors that are not dense reach no kernel of ours, and torch's own words name none."""
    for argument, value in zip(op.default._schema.arguments, args):
        for i, tensor in enumerate(value if isinstance(value, list) else ()):
            if tensor is not None and tensor.layout is not torch.strided:
                return TypeError(
                    f"{argument.name}[{i}]: got layout {tensor.layout}, must be a dense tensor "
                    "(torch.strided)"
                )
    return None


def payload_nbytes(numel: int, k: int, wire_dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of one rank's payload for a bucket.

    A header of 24 bytes, a uint32 for each tile of 65,536 elements, the low byte of each index, a
    bitmap with a 1 for each entry and a 0 for each block of 256 elements, and a value for each
    entry; each section padded to 16 bytes.

    Args:
        numel: N, elements of the bucket, 1 to 2**31 - 1.
        k: entries sent, 1 to numel.
        wire_dtype: torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn or
            torch.float4_e2m1fn_x2.
    """
    return _integer(_ops.payload_nbytes, numel, k, wire_dtype)


def select_state(
    numel: int,
    k: int,
    device: torch.device | str,
    state: Tensor | None = None,
    ranges: int | None = None,
) -> Tensor:
    """What :func:`compress_` carries from step to step: what guesses are made from, repair count.

    It decides how fast a selection is, never what is selected; use one for each bucket. It serves
    every call with this k or a smaller one.

    Args:
        numel: elements of the bucket, or of each range that it is cut into.
        k: the largest number of entries to send that it is to serve, 1 to numel.
        device: the memory's device.
        state: one for fewer elements to send, whose knowledge the new one takes over.
        ranges: how many ranges the bucket is cut into; None: it is not cut.

    Returns:
        An opaque uint8 tensor on ``device``, with a row for each range, which is ``state`` where
        that is large enough.
    """
    device = torch.device(device)
    nbytes = _integer(_ops.state_nbytes, numel, k, device)
    if state is not None and state.size(-1) >= nbytes:
        return state
    shape = (nbytes,) if ranges is None else (ranges, nbytes)
    larger = torch.zeros(shape, dtype=torch.uint8, device=device)
    if state is not None:
        larger[..., : state.size(-1)] = state
    return larger


def repairs(state: Tensor) -> int:
    """How many selections found the guess in ``state`` too high or too low and read all of memory.

    Reads the device: do not call it inside a step.
    """
    if state.dtype != torch.uint8:
        raise TypeError(f"state: got {state.dtype}, must be torch.uint8")
    if state.dim() not in (1, 2) or state.size(-1) < _SMALLEST_STATE:
        raise ValueError(f"state: got shape {list(state.shape)}, must come from select_state")
    counts = state[..., :8].contiguous().view(torch.int64)  # Guess::repairs of csrc/shared/guess.h
    return int(counts.sum())


def compress_(
    memory: Tensor,
    grads: Sequence[Tensor | None] | None,
    k: int,
    *,
    momentum: float | Tensor = 0.0,
    aggregate: Tensor | None = None,
    momentum_buffer: Tensor | None = None,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    memory_decay: float = 1.0,
    params: Sequence[Tensor] | None = None,
    maximize: bool = False,
    grad_scale: float | Tensor | None = None,
    found_inf: Tensor | None = None,
    wire_dtype: torch.dtype = torch.bfloat16,
    state: Tensor | None = None,
    tag: int = 0,
    width: int = 0,
    last_k: int = 0,
) -> Tensor:
    """Accumulates a gradient into memory and takes the k largest entries out, as a payload.

    With ``width``, it cuts the bucket into ranges, and takes the k largest entries out of each.

    With g' = g / grad_scale (negated for ``maximize``; zero where that is not finite) and
    d = memory_decay:

    - global momentum (GMC): v = ((d * u + g') + weight_decay * w) + momentum * a
    - local momentum (DGC), with ``momentum_buffer`` m: g'' = g' + weight_decay * w,
      m = momentum * m + g'', v = d * u + m, or with ``nesterov`` v = (d * u + g'') + momentum * m

    each operation rounded to float32. The k entries of largest \\|v\\| (ties to the lowest index)
    become the payload, rounded to ``wire_dtype`` and saturated at its largest finite value, which
    for the 8- and 4-bit types counts from a power of two that suits these k; the rest, rounding
    included, stays: u = v - c. An element whose v is not finite keeps its u, which does not
    decay either, and m (or zero) and is counted.

    Args:
        memory: u, float32 [numel], updated in place.
        grads: tensors (float32, bfloat16, float16; any alignment; contiguous) whose numels add up
            to numel. None counts as zero, sized by ``params``.
        k: entries to send, 1 to numel.
        momentum: beta, a number or a tensor holding one.
        aggregate: a_{t-1} from :func:`merge` or :func:`sparsify`; global momentum only.
        momentum_buffer: m, float32 [numel], updated in place; selects local momentum.
        nesterov: look ahead; local momentum only.
        weight_decay: lambda; needs ``params``.
        memory_decay: d, 0 to 2: what u is multiplied by.
        params: w, tensors like ``grads``. Looked at only where they are needed: with
            ``weight_decay``, or where ``grads`` holds None.
        maximize: ascend instead of descend.
        grad_scale: loss scale S that the gradients carry, a number or a tensor holding one.
        found_inf: a tensor holding one number; non-zero counts the whole gradient as zero and adds
            one to the count of non-finite values.
        wire_dtype: dtype of the values sent.
        state: from :func:`select_state` for this k or a larger one; without it every call starts
            from nothing.
        tag: what this payload is for, 0 to 2**24 - 1, such as a digest of optimizer, step, bucket
            and options: :func:`verdict` tells where the ranks' differ. 0: untagged. CALLED_OFF:
            this rank calls its step off.
        width: elements of a range; the last range has what is left. 0: the bucket is not cut. With
            ranges there is no ``aggregate``, because their owners add it.
        last_k: entries of the last range, 1 to k.

    Returns:
        The payload, uint8 [payload_nbytes(numel, k, wire_dtype)]. With ranges the payloads of all,
        one after the other; each header counts the non-finite values of the whole bucket.
    """
    grads, params = _lists(grads, params, weight_decay)
    return _tensor(
        _ops.compress_,
        memory,
        grads,
        k,
        momentum=_number(momentum, "momentum"),
        aggregate=aggregate,
        momentum_buffer=momentum_buffer,
        nesterov=nesterov,
        weight_decay=float(weight_decay),
        memory_decay=_float(memory_decay, "memory_decay"),
        params=params,
        maximize=maximize,
        grad_scale=None if grad_scale is None else _number(grad_scale, "grad_scale"),
        found_inf=found_inf,
        wire_dtype=wire_dtype,
        state=state,
        tag=_tag(tag),
        width=width,
        last_k=last_k,
    )


@_fake("compress_")
def _(
    memory: Tensor,
    grads: list[Tensor | None],
    k: int,
    *,
    wire_dtype: Any,
    width: int = 0,
    last_k: int = 0,
    **rest: Any,
) -> Tensor:
    for i, grad in enumerate(grads):
        if grad is not None and grad.device != memory.device:
            raise ValueError(
                f"grads[{i}]: got device {grad.device}, must be {memory.device}, like memory"
            )
    numel, nbytes = memory.numel(), 0
    if width:
        others = (numel - 1) // width
        numel, nbytes = numel - others * width, others * _ops.payload_nbytes(width, k, wire_dtype)
        k = last_k
    nbytes += _ops.payload_nbytes(numel, k, wire_dtype)
    return memory.new_empty(nbytes, dtype=torch.uint8)


def accumulate_(
    memory: Tensor,
    grads: Sequence[Tensor | None] | None,
    *,
    rank: int = 0,
    ranks: int = 1,
    momentum: float | Tensor = 0.0,
    aggregate: Tensor | None = None,
    momentum_buffer: Tensor | None = None,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    memory_decay: float = 1.0,
    params: Sequence[Tensor] | None = None,
    maximize: bool = False,
    grad_scale: float | Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """Accumulates a dense bucket's gradient into memory, all of which is to be sent.

    v is that of :func:`compress_`, bit for bit, with the same arguments but for ``aggregate``. All
    of v stays in memory until :func:`apply_dense_` knows the verdict.

    Args:
        memory: u, float32 [numel], becomes v in place.
        rank: this rank's number, 0 to ranks - 1.
        ranks: p, how many ranks will be summed over.
        aggregate: a_{t-1}, dense float32 [numel]; global momentum only.

    Returns:
        What is to be summed over all ranks, float32 [numel + ranks]: v, then zeros but for place
        ``numel + rank``, which holds this rank's count of non-finite values (2**24 at most, up to
        where a float32 counts on). More ``ranks`` than p make room for what else is to be summed,
        such as the tags that :func:`verdict` asks for.
    """
    grads, params = _lists(grads, params, weight_decay)
    return _tensor(
        _ops.accumulate_,
        memory,
        grads,
        rank=rank,
        ranks=ranks,
        momentum=_number(momentum, "momentum"),
        aggregate=aggregate,
        momentum_buffer=momentum_buffer,
        nesterov=nesterov,
        weight_decay=float(weight_decay),
        memory_decay=_float(memory_decay, "memory_decay"),
        params=params,
        maximize=maximize,
        grad_scale=None if grad_scale is None else _number(grad_scale, "grad_scale"),
        found_inf=found_inf,
    )


@_fake("accumulate_")
def _(memory: Tensor, grads: list[Tensor | None], *, ranks: int, **rest: Any) -> Tensor:
    return memory.new_empty(memory.numel() + ranks)


def apply_dense_(
    params: Sequence[Tensor],
    memory: Tensor,
    total: Tensor,
    lr: float | Tensor,
    *,
    skip: Tensor | None = None,
    skipped_steps: Tensor | None = None,
    flags: Tensor | None = None,
) -> None:
    """w -= eta * a for a dense bucket, a = total / p, and memory is empty: all of it was sent.

    ``total[:numel]`` becomes a, dense, for the next step's :func:`accumulate_`.

    Args:
        params: contiguous float32, bfloat16 or float16 tensors, updated in place; computed in
            float32 and rounded to each one's dtype.
        memory: float32 [numel], zero afterwards.
        total: float32 [numel + p] from :func:`accumulate_`, summed over all ranks, updated in
            place.
        lr: eta, a number or a tensor holding one.
        skip: int32 [1]; non-zero leaves params and memory as they are, and a is zero.
        skipped_steps: int64 [1]; one is added where ``skip`` is not zero.
        flags: int32 [1]; gets those of the bits DAMAGED, MISMATCH and OFF that ``skip`` has, and
            keeps them.
    """
    params = list(params)
    _call(
        _ops.apply_dense_,
        params,
        memory,
        total,
        _number(lr, "lr"),
        skip=skip,
        skipped_steps=skipped_steps,
        flags=flags,
    )
    _changed(params)


def unpack(
    payload: Tensor, numel: int, k: int, wire_dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """Reads a payload.

    Args:
        payload: uint8 [payload_nbytes(numel, k, wire_dtype)].
        numel, k, wire_dtype: as for :func:`payload_nbytes`.

    Returns:
        indices (int64 [k], ascending), values (float32 [k]), and how many non-finite values the
        sender met (int64 scalar tensor).

    Raises:
        RuntimeError: the payload is damaged (CPU).
    """
    result: tuple[Tensor, Tensor, Tensor] = _call(_ops.unpack, payload, numel, k, wire_dtype)
    return result


@_fake("unpack")
def _(payload: Tensor, numel: int, k: int, wire_dtype: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        payload.new_empty(k, dtype=torch.int64),
        payload.new_empty(k, dtype=torch.float32),
        payload.new_empty((), dtype=torch.int64),
    )


def verdict(payloads: Sequence[Tensor], counts: Sequence[Tensor] = ()) -> Tensor:
    """Whether this step must be skipped: the same answer on every rank, without a collective.

    Args:
        payloads: for each sparse bucket the gathered payloads, uint8 [p, payload_nbytes].
        counts: for each dense bucket float32 [2 p], summed over all ranks: every rank's count of
            non-finite values, as from :func:`accumulate_`, then every rank's tag.

    Returns:
        int32 [1], to be handed on as ``skip``. Zero: go on. Otherwise the sum of

        - NONFINITE (1): some rank met a non-finite value;
        - DAMAGED (2): a header is damaged;
        - MISMATCH (4): in some bucket the tags of two ranks differ. Those of damaged headers and
          CALLED_OFF are not compared;
        - OFF (8): a tag is CALLED_OFF, and its header is not damaged.
    """
    if not payloads and not counts:
        raise ValueError("payloads: got an empty list, must hold one tensor for each bucket")
    return _tensor(_ops.verdict, list(payloads), list(counts))


@_fake("verdict")
def _(payloads: list[Tensor], counts: list[Tensor]) -> Tensor:
    return (payloads or counts)[0].new_empty(1, dtype=torch.int32)


def merge(
    payloads: Tensor,
    numel: int,
    k: int,
    wire_dtype: torch.dtype = torch.bfloat16,
    *,
    skip: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """a_t = (1/p) sum_k c_k, summed in rank order, so that every replica has the same bits.

    Args:
        payloads: one bucket's gathered payloads, uint8 [p, payload_nbytes].
        numel, k, wire_dtype: what the payloads were made with, as for :func:`payload_nbytes`.
        skip: int32 [1] from :func:`verdict`; non-zero gives an empty aggregate.
        out: an aggregate of as many ranks and the same numel and k, to be overwritten. On the CPU
            that spares a step thousands of new pages.

    Returns:
        The aggregate, an opaque uint8 tensor for :func:`apply_`, :func:`compress_` and
        :func:`densify`.

    Raises:
        RuntimeError: a payload is damaged (CPU).
    """
    if out is None:
        return _tensor(_ops.merge, payloads, numel, k, wire_dtype, skip=skip)
    _call(_ops.merge_, out, payloads, numel, k, wire_dtype, skip=skip)
    return out


@_fake("merge")
def _(payloads: Tensor, numel: int, k: int, wire_dtype: Any, *, skip: Any = None) -> Tensor:
    return payloads.new_empty(_ops.aggregate_nbytes(numel, k, payloads.size(0)))


def merge_ranges(
    payloads: Tensor,
    numel: int,
    width: int,
    k: int,
    last_k: int,
    wire_dtype: torch.dtype = torch.bfloat16,
    *,
    skip: Tensor | None = None,
) -> Tensor:
    """a_t of a bucket from the payloads of its ranges, side by side (two-sided compression).

    Args:
        payloads: a row for each range, uint8 [ranges, payload_nbytes(width, k, wire_dtype)]. The
            last range's payload, which may be smaller, is the beginning of its row.
        numel: N, elements of the bucket.
        width: elements of a range; the last has what is left.
        k, last_k: entries in a payload of a full range, and in that of the last one.
        wire_dtype: dtype of the values sent.
        skip: int32 [1] from :func:`verdict`; non-zero gives an empty aggregate.

    Returns:
        The aggregate, as from :func:`merge`.

    Raises:
        RuntimeError: a payload is damaged (CPU).
    """
    return _tensor(_ops.merge_ranges, payloads, numel, width, k, last_k, wire_dtype, skip=skip)


@_fake("merge_ranges")
def _(
    payloads: Tensor, numel: int, width: int, k: int, last_k: int, wire_dtype: Any, *,
    skip: Any = None,
) -> Tensor:  # fmt: skip
    entries = k * ((numel + width - 1) // width - 1) + last_k
    return payloads.new_empty(_ops.aggregate_nbytes(numel, entries, 1))


def apply_(
    params: Sequence[Tensor],
    aggregate: Tensor,
    lr: float | Tensor,
    *,
    skip: Tensor | None = None,
    skipped_steps: Tensor | None = None,
    flags: Tensor | None = None,
    memory: Tensor | None = None,
    payload: Tensor | None = None,
    k: int = 0,
    wire_dtype: torch.dtype = torch.bfloat16,
) -> None:
    """w -= eta * a in float32, rounded to each parameter's dtype; touches a's entries only.

    Or, in a skipped step, u += c for what this rank had sent, as by :func:`restore_`.

    Args:
        params: contiguous float32, bfloat16 or float16 tensors, updated in place.
        aggregate: from :func:`merge` or :func:`sparsify`, for the sum of their numels.
        lr: eta, a number or a tensor holding one.
        skip: int32 [1]; non-zero leaves params as they are.
        skipped_steps: int64 [1]; one is added where ``skip`` is not zero.
        flags: int32 [1]; gets those of the bits DAMAGED, MISMATCH and OFF that ``skip`` has, and
            DAMAGED where a payload was damaged behind its header (CUDA; on the CPU :func:`merge`
            raises), and keeps them.
        memory: float32 [numel], which a skipped step gives ``payload`` back to. None: it does not.
        payload: this rank's own, uint8 [payload_nbytes(numel, k, wire_dtype)].
        k, wire_dtype: what the payload was made with; needed with ``payload`` only.
    """
    params = list(params)
    _call(
        _ops.apply_,
        params,
        aggregate,
        _number(lr, "lr"),
        skip=skip,
        skipped_steps=skipped_steps,
        flags=flags,
        memory=memory,
        payload=payload,
        k=k,
        wire_dtype=wire_dtype,
    )
    _changed(params)


def restore_(
    memory: Tensor,
    payload: Tensor,
    k: int,
    wire_dtype: torch.dtype = torch.bfloat16,
    *,
    skip: Tensor | None = None,
    width: int = 0,
    last_k: int = 0,
) -> None:
    """Gives a payload back to the memory it was taken from: u += c.

    Args:
        memory: float32 [numel], updated in place.
        payload: this rank's own payload, or those of its ranges, from :func:`compress_`.
        k, wire_dtype: what the payload was made with.
        skip: int32 [1]; acts when it is non-zero. Or int32 [ranges], one for each range's payload.
            None: always.
        width, last_k: the ranges, as for :func:`compress_`.
    """
    _call(_ops.restore_, memory, payload, k, wire_dtype, skip=skip, width=width, last_k=last_k)


def mask_(
    momentum_buffer: Tensor,
    payload: Tensor,
    k: int,
    wire_dtype: torch.dtype = torch.bfloat16,
    *,
    skip: Tensor | None = None,
    width: int = 0,
    last_k: int = 0,
) -> None:
    """Momentum factor masking (DGC, section 3.3): m = 0 where this rank sent a value.

    Args:
        momentum_buffer: float32 [numel], updated in place.
        payload: this rank's own payload, or those of its ranges, from :func:`compress_`.
        k, wire_dtype: what the payload was made with.
        skip: int32 [1]; non-zero does nothing.
        width, last_k: the ranges, as for :func:`compress_`.
    """
    _call(
        _ops.mask_, momentum_buffer, payload, k, wire_dtype, skip=skip, width=width, last_k=last_k
    )


def sparsify(dense: Tensor) -> Tensor:
    """An aggregate that holds the non-zero entries of a dense tensor.

    Args:
        dense: float32 [numel], contiguous.

    Returns:
        The aggregate, as from :func:`merge`. It has room for numel entries (6 bytes each).
    """
    return _tensor(_ops.sparsify, dense)


@_fake("sparsify")
def _(dense: Tensor) -> Tensor:
    nbytes = _ops.aggregate_nbytes(dense.numel(), dense.numel(), 1)
    return dense.new_empty(nbytes, dtype=torch.uint8)


def densify(aggregate: Tensor, numel: int) -> Tensor:
    """An aggregate as a dense tensor, float32 [numel].

    Args:
        aggregate: from :func:`merge`, :func:`merge_ranges` or :func:`sparsify`.
        numel: N, elements of the bucket.

    Raises:
        ValueError: the aggregate is not one of this many elements.
    """
    return _tensor(_ops.densify, aggregate, numel)


@_fake("densify")
def _(aggregate: Tensor, numel: int) -> Tensor:
    return aggregate.new_empty(numel, dtype=torch.float32)


def _lists(
    grads: Sequence[Tensor | None] | None, params: Sequence[Tensor] | None, weight_decay: float
) -> tuple[list[Tensor | None], list[Tensor] | None]:
    """What the operators take; params only where they are needed."""
    grads = [None] * len(params or ()) if grads is None else list(grads)
    try:  # torch.compile cannot trace the question
        plain = not torch.compiler.is_compiling() and not any(map(_is_negative, grads))
    except TypeError:  # one is None
        plain = False
    if not plain:  # kernels read what is stored, whatever its sign is to be
        grads = [None if grad is None else grad.resolve_neg() for grad in grads]
    if params is not None:
        params = list(params)
        needed = weight_decay != 0 or (not plain and any(grad is None for grad in grads))
        if not needed and len(params) == len(grads):
            params = None  # a list of 161 tensors takes 45 us to hand over
    return grads, params


def _changed(params: list[Tensor]) -> None:
    """Tells autograd that these were changed in place, which the stable interface cannot."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(params)


def _number(value: float | Tensor, name: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name}: got {type(value).__name__}, must be a number or a tensor")
    return torch.full((), float(value), dtype=torch.float64, device="cpu")


def _float(value: float, name: str) -> float:
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name}: got {type(value).__name__}, must be a number")
    return float(value)


def _tag(tag: int) -> int:
    if type(tag) is not int and (isinstance(tag, bool) or not isinstance(tag, Integral)):
        raise TypeError(f"tag: got {type(tag).__name__}, must be a whole number")
    if not 0 <= tag < 2**24:  # here too, because of numbers that no int64 holds
        raise ValueError(f"tag: got {tag}, must be between 0 and 2**24 - 1")
    return int(tag)
