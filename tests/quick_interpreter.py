"""Triton's interpreter without its own repeated work; what it computes stays the same.

Whenever a kernel calls another function, the interpreter looks through the whole of
`triton.language` for what to replace, though the kernel that runs has it replaced already; and for
every tensor that it makes it builds a table of all types. Together that was more than a third of
the time of the kernels' tests. Written from the behaviour of Triton 3.7; where its interpreter has
other parts, it is left alone.
"""

from functools import wraps
from typing import Any


class _Nothing:
    """What is to be restored where nothing was replaced."""

    def restore(self) -> None:
        pass


def hurry() -> None:
    """Make the interpreter replace once a launch, and look types up."""
    from triton.runtime import interpreter

    parts = ("_patch_lang", "_get_np_dtype", "GridExecutor", "InterpretedFunction")
    if not all(hasattr(interpreter, name) for name in parts):
        return
    _replace_once(interpreter)
    _look_types_up(interpreter)


def _replace_once(interpreter: Any) -> None:
    """A module's view of the language is replaced once in a launch, not once a call."""
    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    seen: list[set[int]] = []

    @wraps(replace)
    def once(function: Any) -> Any:
        module = id(function.__globals__)
        if seen and module in seen[-1]:
            return _Nothing()
        if seen:
            seen[-1].add(module)
        return replace(function)

    @wraps(launch)
    def launched(self: Any, *arguments: Any, **options: Any) -> None:
        seen.append(set())
        try:
            launch(self, *arguments, **options)
        finally:
            seen.pop()

    interpreter._patch_lang = once
    interpreter.GridExecutor.__call__ = launched


def _look_types_up(interpreter: Any) -> None:
    """NumPy's type of a Triton type, found by name."""
    import triton.language as tl

    slow = interpreter._get_np_dtype
    table: dict[str, Any] = {}

    @wraps(slow)
    def quick(kind: Any) -> Any:
        one = kind.element_ty if isinstance(kind, tl.block_type) else kind
        if isinstance(one, tl.pointer_type):
            return slow(one)
        if one.name not in table:
            table[one.name] = slow(one)
        return table[one.name]

    interpreter._get_np_dtype = quick
