"""A parameter's entry in optimizer.state, which notices writes to it."""

from __future__ import annotations

from typing import Any


class Entry(dict[str, Any]):
    """A dict that sets a flag when it is written to; reading it costs nothing extra.

    The flag spares each step a look at hundreds of entries that nobody has changed. Copies and
    pickles of an entry are ordinary dicts.

    Attributes:
        changed: a list of one bool, which all entries share.
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
