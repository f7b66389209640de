"""The momentum of global momentum compression as a tensor in optimizer.state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gmc_cuda._engine.bucket import Bucket
from gmc_cuda._engine.shards import shard_of


class MomentumView(Tensor):
    """a_{t-1} of one parameter, float32 and shaped like it, read from its bucket at each use.

    A bucket keeps a_{t-1} for all its parameters together, in a form with few entries. This tensor
    has no storage: an operation on it is done on a dense copy. One that writes to it makes that
    copy the bucket's a_{t-1}.
    """

    _bucket: Bucket
    _index: int

    @staticmethod
    def __new__(cls, bucket: Bucket, index: int) -> MomentumView:
        param = shard_of(bucket.params[index])
        view: MomentumView = torch.Tensor._make_wrapper_subclass(
            cls, param.shape, strides=param.stride(), dtype=torch.float32, device=param.device
        )
        return view

    def __init__(self, bucket: Bucket, index: int) -> None:
        self._bucket, self._index = bucket, index

    def place(self) -> tuple[Bucket, int]:
        """Its bucket, and which of the bucket's parameters it is of."""
        return self._bucket, self._index

    def dense(self, write: bool = False) -> Tensor:
        """The values; with write=True in the place where the next step reads them."""
        momentum = self._bucket.momentum()
        if write:
            self._bucket.aggregate = momentum
        return self._bucket.views(momentum)[self._index]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        write = func._schema.is_mutable

        def dense(value: Any) -> Any:
            return value.dense(write) if isinstance(value, cls) else value

        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))

    @property
    def data(self) -> Tensor:
        return self.dense()

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.numel() or not self.numel():  # who empties it to save memory has saved none
            self.dense(write=True).copy_(value)

    def numpy(self, *, force: bool = False) -> Any:
        return self.dense().numpy(force=force)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().clone().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dense().clone()

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return repr(self.dense())
