"""Parameter names without the prefixes that torch's wrappers add."""

from __future__ import annotations

from collections.abc import Iterable

# The prefixes are those of DistributedDataParallel and DataParallel, torch.compile, activation
# checkpointing, FSDP's first version (its present and its old one), and Lightning.
_WRAPPERS = frozenset({
    "module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module",
    "_forward_module",
})  # fmt: skip


def plain_name(name: str) -> str:
    """A parameter's name in the model without wrappers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """The plain name of each of a model's names.

    A submodule that the user called "module" loses that name as a wrapper does. If two names become
    equal by that, "module" is removed only from the beginning, and only if all names begin with it.

    Raises:
        ValueError: two names become equal all the same.
    """
    names = list(names)
    plain = {name: plain_name(name) for name in names}
    if len(set(plain.values())) == len(plain):
        return plain
    plain = {name: _without_private(name) for name in names}
    while all(name.startswith("module.") for name in plain.values()):
        plain = {name: short.removeprefix("module.") for name, short in plain.items()}
    by_plain: dict[str, str] = {}
    for name, short in plain.items():
        if short in by_plain:
            raise ValueError(
                f"model: got the names {by_plain[short]!r} and {name!r}, which are both "
                f"{short!r} without the wrappers of torch, must differ without them: rename one "
                "of the submodules"
            )
        by_plain[short] = name
    return plain


def _without_private(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS - {"module"})
