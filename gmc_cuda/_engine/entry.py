"""A parameter's entry in optimizer.state, which notices that it is written to."""

from __future__ import annotations

from typing import Any


class Entry(dict[str, Any]):
    """A dict, whose look-ups cost nothing extra.

    Hundreds of entries need not be read at every step to find out that nobody has changed them.
    Copies and pickles of it are ordinary dicts.

    Attributes:
        changed: one bool, which entries share, set when any of them is written to.
    """

    __slots__ = ("changed",)

    def __init__(self, content: dict[str, Any], changed: list[bool]) -> None:
        super().__init__(content)
        self.changed = changed

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def _noticed(name: str) -> Any:
    method = getattr(dict, name)

    def write(self: Entry, *args: Any, **kwargs: Any) -> Any:
        self.changed[0] = True
        return method(self, *args, **kwargs)

    return write


for _name in (
    "__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update",
):  # fmt: skip
    setattr(Entry, _name, _noticed(_name))
