"""Tensors in optimizer.state that read what a bucket keeps for all its parameters together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gmc_cuda._engine.bucket import Bucket
from gmc_cuda._engine.shards import shard_of


class LazyView(Tensor):
    """One parameter's part of a vector that a bucket keeps: float32, and shaped like the parameter.

    This tensor has no storage. An operation on it acts on a dense copy, and an operation that
    writes hands that copy to the bucket.

    Attributes:
        KEPT: whether the bucket may keep a dense copy as it is. Then one that returns a view, such
            as detach() or [0], hands it over too, so that what is written to the view counts.
    """

    KEPT: ClassVar[bool] = False
    _bucket: Bucket
    _index: int

    @staticmethod
    def __new__(cls, bucket: Bucket, index: int) -> LazyView:
        param = shard_of(bucket.params[index])
        view: LazyView = torch.Tensor._make_wrapper_subclass(
            cls, param.shape, strides=param.stride(), dtype=torch.float32, device=param.device
        )
        return view

    def __init__(self, bucket: Bucket, index: int) -> None:
        self._bucket, self._index = bucket, index

    @staticmethod
    def read(bucket: Bucket) -> Tensor:
        """The bucket's vector, float32 [N]."""
        raise NotImplementedError

    @staticmethod
    def write(bucket: Bucket, flat: Tensor) -> None:
        """Sets the bucket's vector."""
        raise NotImplementedError

    def place(self) -> tuple[Bucket, int]:
        """The bucket, and the parameter's index in it."""
        return self._bucket, self._index

    def dense(self) -> Tensor:
        """The values as an ordinary tensor."""
        return self._bucket.views(self.read(self._bucket))[self._index]

    def writable(self) -> Tensor:
        """The same; what is written to it counts, where KEPT says so."""
        if self.KEPT:
            self.write(self._bucket, self.read(self._bucket))
        return self.dense()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        flats: dict[tuple[type, Bucket], Tensor] = {}

        def dense(value: Any) -> Any:
            if not isinstance(value, LazyView):
                return value
            bucket, index = value.place()
            key = type(value), bucket
            if key not in flats:
                flats[key] = value.read(bucket)
            return bucket.views(flats[key])[index]

        result = func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))
        schema = func._schema
        of_view = any(value.alias_info is not None for value in schema.returns)
        for (kind, bucket), flat in flats.items():
            if schema.is_mutable or (of_view and kind.KEPT):  # type: ignore[attr-defined]
                kind.write(bucket, flat)  # type: ignore[attr-defined]
        return result

    @property
    def data(self) -> Tensor:
        return self.writable()

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.numel() or not self.numel():  # emptying .data saves no memory here
            self.copy_(value)

    # torch reads the storage in these, without asking for the class.

    def numpy(self, *, force: bool = False) -> Any:
        return self.writable().numpy(force=force)

    def tolist(self) -> Any:
        return self.dense().tolist()

    def apply_(self, function: Callable[[Any], Any]) -> Tensor:
        return self.copy_(self.dense().clone().apply_(function))

    def share_memory_(self) -> NoReturn:
        raise RuntimeError(
            f"{type(self).__name__}.share_memory_(): the bucket keeps these values in another "
            "form; share a clone()"
        )

    def __dlpack__(self, **options: Any) -> Any:
        return self.writable().__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.dense().__dlpack_device__()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().clone().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dense().clone()

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return repr(self.dense())


class MomentumView(LazyView):
    """a_{t-1}, which a bucket keeps as a sparse aggregate."""

    KEPT = True

    @staticmethod
    def read(bucket: Bucket) -> Tensor:
        return bucket.momentum()

    @staticmethod
    def write(bucket: Bucket, flat: Tensor) -> None:
        bucket.aggregate = flat


class OwnerView(LazyView):
    """The owner memory r, zero outside the range that this worker owns.

    What is written outside the range is moved to this worker's memory, times p, so that the mean
    over all workers is the same.
    """

    @staticmethod
    def read(bucket: Bucket) -> Tensor:
        assert bucket.owner is not None
        return bucket.owner.spread(bucket.memory)

    @staticmethod
    def write(bucket: Bucket, flat: Tensor) -> None:
        assert bucket.owner is not None
        bucket.owner.take_over(flat, bucket.memory)
