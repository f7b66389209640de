"""Watches for what must not go unnoticed: damaged payloads, workers that all send the same, long
runs of skipped steps, and replicas that differ.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from gmc_cuda import ops
from gmc_cuda._engine.bucket import Bucket
from gmc_cuda._engine.device import is_capturing, is_synchronous
from gmc_cuda._engine.exchange import Exchange
from gmc_cuda._engine.fingerprint import fingerprints


class DamageWatch:
    """Notices, without waiting for the device, that a GPU received payloads it could not use.

    CPU operators raise at once. Kernels cannot raise: they leave the parameters alone and set bits
    in one word on the device, which nothing clears. Each step copies that word to the host and
    looks at it before the next step, so a damaged payload is usually reported one step late.
    """

    def __init__(self) -> None:
        self._flags: Tensor | None = None
        self._seen: Tensor | None = None  # its copy in page-locked memory

    def flags(self, skip: Tensor, size: int) -> Tensor | None:
        """The word for kernels, int32 [1], made at the first step; None without GPU or peers."""
        if self._flags is None and not is_synchronous(skip.device) and size > 1:
            self._flags = torch.zeros(1, dtype=torch.int32, device=skip.device)
            self._seen = _on_the_host(self._flags)
        return self._flags

    def report(self) -> None:
        """Copies the word to the host without waiting. A CUDA graph's replay copies it too."""
        if self._seen is not None and self._flags is not None:
            self._seen.copy_(self._flags, non_blocking=True)

    def check(self, rank: int) -> None:
        """Raises RuntimeError if a step before met such payloads."""
        seen = 0 if self._seen is None else int(self._seen)
        if seen & ops.DAMAGED:
            raise RuntimeError(
                f"rank {rank} received a damaged payload in an earlier step and did not apply "
                "it; replicas may differ: restart from a checkpoint"
            )
        if seen & (ops.MISMATCH | ops.OFF):
            raise RuntimeError(
                f"rank {rank} received payloads in an earlier step that did not belong together, "
                "and did not apply them: the workers were at different steps, in different "
                "optimizers or had other options, or one of them had left its step by an "
                "exception. Compare what the workers do; what was not sent is in memory"
            )


class DuplicateWatch:
    """Warns if all workers send the same in the first steps, since different data never gives that.

    It reads the payloads on the host, in these few steps only.
    """

    STEPS = 3

    def __init__(self) -> None:
        self._same = 0  # steps so far, in all of which the workers sent the same; -1: has ended

    @property
    def ended(self) -> bool:
        return self._same < 0

    def look(
        self, gathered: list[Tensor], aggregates: list[tuple[Tensor, Bucket]], size: int
    ) -> None:
        """Looks at one step.

        Args:
            gathered: every rank's payloads, uint8 [p, n], of each sparse bucket.
            aggregates: each bucket's aggregate, and the bucket. An owner gathers its range alone.
        """
        if not gathered or is_capturing(gathered[0]):
            return
        # Gradients of zero are equal on all workers without a mistake.
        sent = any(a.any() and _in_own_range(a, bucket).any() for a, bucket in aggregates)
        if not sent:
            return
        alike = all(bool((payloads == payloads[0]).all()) for payloads in gathered)
        self._same = self._same + 1 if alike else -1
        if self._same == self.STEPS:
            self._same = -1
            warnings.warn(
                f"all {size} workers sent the same payload in {self.STEPS} steps: either "
                "DistributedDataParallel averages the gradients as well (leave it out, or call "
                "gmc_cuda.local_gradients(ddp_model)), or every worker reads the same data (use a "
                "DistributedSampler, or another seed for each rank)",
                stacklevel=4,
            )


def _in_own_range(aggregate: Tensor, bucket: Bucket) -> Tensor:
    dense = ops.densify(aggregate, bucket.numel)
    return dense if bucket.owner is None else bucket.owner.part(dense)


class SkipWatch:
    """Warns when many steps in a row are skipped, since such a run rarely recovers by itself.

    Each step copies a GPU's count of skipped steps to the host, and the next step looks at it. The
    host waits for the device only to write the warning.

    Attributes:
        in_a_row: how many.
        hint: a sentence for the warning.
    """

    def __init__(self) -> None:
        self.in_a_row, self.hint = 10, ""
        self._steps = self._seen_before = 0
        self._seen: Tensor | None = None  # the count's copy in page-locked memory

    def look(self, skipped: Tensor, nonfinite: Callable[[], list[str]]) -> None:
        """Looks at the step that was just made.

        Args:
            skipped: number of skipped steps so far, int64 [1].
            nonfinite: says how many non-finite values each rank had in this step.
        """
        if is_capturing(skipped):
            return
        if is_synchronous(skipped.device):
            count = int(skipped)
        elif skipped.is_meta:
            return
        else:
            if self._seen is None:
                self._seen = _on_the_host(skipped)
            count = int(self._seen)
            self._seen.copy_(skipped, non_blocking=True)
        self._steps = self._steps + 1 if count > self._seen_before else 0
        self._seen_before = count
        if self._steps == self.in_a_row:
            met = ", ".join(nonfinite()) or "none here"
            many = f"{self.in_a_row} steps in a row were" if self.in_a_row > 1 else "a step was"
            warnings.warn(
                f"{many} skipped, because gradients, or the memory beside them, are not finite "
                f"({met} in this step): the model no longer learns. {self.hint}Look for the cause "
                "on these ranks: the loss, the data, the learning rate, a memory_decay above 1; "
                "nonfinite='raise' raises at the first such step",
                stacklevel=4,
            )


def check_replicas(
    exchange: Exchange,
    params: list[Tensor],
    device: torch.device,
    name: Callable[[int], str],
    step: int,
) -> None:
    """Compares the parameters' bits on all ranks by one collective of 8 bytes. Reads the device.

    Where parameters are sharded, the workers of a node share what they found.

    Args:
        params: contiguous tensors, of which a worker may have none.
        device: of the parameters.
        name: returns the name of the i-th of them in errors.

    Raises:
        RuntimeError: on every rank, naming the first parameter that differs.
    """
    if exchange.size == 1:
        return
    equal = True
    if params:
        prints = fingerprints(params)
        weights = torch.arange(prints.numel(), dtype=torch.int64, device=prints.device) * 2 + 1
        equal = _all_equal(exchange, (prints * weights).sum().view(1)) is None
    elsewhere = False
    if exchange.shard_group is not None:
        found = torch.tensor([not equal], dtype=torch.int32, device=device)
        elsewhere = bool(exchange.strictest(found))
    if equal and not elsewhere:
        return
    differing = None if equal else _all_equal(exchange, prints)
    if differing is None:
        # A replica that changed between the two collectives is seen by the next check.
        if exchange.shard_group is None:
            return
        raise RuntimeError(
            f"replicas differ after step {step}, in a shard of another worker of this node, which "
            "says where"
        )
    i = int(differing.any(0).nonzero()[0])
    ranks = ", ".join(str(exchange.name(r)) for r in differing[:, i].nonzero().view(-1).tolist())
    raise RuntimeError(
        f"replicas differ after step {step}: {name(i)} has other bits on rank {ranks} than "
        f"on rank {exchange.name(0)}. Either something besides this optimizer changed it there, "
        "such as weights that were loaded after the optimizer was constructed (construct it after "
        "that), or memory is faulty (restart from a checkpoint)"
    )


def _all_equal(exchange: Exchange, numbers: Tensor) -> Tensor | None:
    """None if int64 [n] is equal on all ranks, else where it differs from rank 0's: bool [p, n]."""
    gathered, work = exchange.all_gather(numbers.view(torch.uint8))
    work.wait()
    rows = gathered.view(torch.int64)
    differs = rows != rows[0]
    return differs if bool(differs.any()) else None


def _on_the_host(number: Tensor) -> Tensor:
    """A zero to copy a GPU's number [1] to, in page-locked memory, so that no copy waits."""
    return torch.zeros(1, dtype=number.dtype, device="cpu", pin_memory=number.is_cuda)
