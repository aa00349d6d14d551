"""A disk cache for compiled drivers that an edited step cannot fool.

Numba files machine code under the driver's own source and bytecode only, so an edit to a step that the driver calls in
another file would be served the old code. Here the file's name holds a digest of every function in this package that
the driver's module can reach. It is taken from the code objects that were loaded, not from the files: it works without
sources, and a file edited after its import cannot be mistaken for what is running.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

from numba.core.caching import FunctionCache, IndexDataCacheFile

_PACKAGE = __name__.split(".")[0] + "."


def _describe(code: CodeType) -> Iterator[str]:
    """Everything that compiling this code depends on; line numbers and file names are left out."""
    yield repr((code.co_name, code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_argcount))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _describe(constant)
        else:
            yield _text(constant)


def _flat(value: Any) -> bool:
    return isinstance(value, (bool, int, float, complex, str, type(None))) or (
        isinstance(value, (tuple, set, frozenset)) and all(_flat(v) for v in value)
    )


def _text(value: Any) -> str:
    """repr, with sets in a fixed order: theirs changes from process to process."""
    if isinstance(value, (set, frozenset)):
        return repr(sorted(map(_text, value)))
    return repr(value)


def fingerprint(module: str) -> str:
    """Digest of the functions and constants of ``module``, and of the modules here that it takes some from."""
    digest, todo = hashlib.sha256(), [module]
    for name in todo:
        for key, value in sorted(vars(sys.modules[name]).items()):
            function = getattr(value, "py_func", value)
            if isinstance(function, FunctionType):
                home = function.__module__
                if home.startswith(_PACKAGE) and home not in todo:
                    todo.append(home)
                if home != name:
                    continue
                text = "".join(_describe(function.__code__)) + _options(value)
            elif isinstance(value, type) and value.__module__ == name:
                text = repr(getattr(value, "_fields", ()))  # of a named tuple: functions know the names, not the places
            elif not key.startswith("__") and (_flat(value) or isinstance(value, dict)):
                text = _text(value) if _flat(value) else repr(sorted((str(k), _text(v)) for k, v in value.items()))
            else:
                continue
            digest.update(f"{name}.{key}={text}\n".encode())
    return digest.hexdigest()


def _options(dispatcher: Any) -> str:
    options = getattr(dispatcher, "targetoptions", {})
    return repr(sorted((str(k), _text(v)) for k, v in options.items()))


class _Cache(FunctionCache):
    """Numba's cache with one set of files per digest, so that no process can be given another version's code."""

    def __init__(self, function: Callable[..., Any], digest: str) -> None:
        super().__init__(function)
        locator = self._impl.locator
        self._cache_file = IndexDataCacheFile(
            cache_path=locator.get_cache_path(),
            filename_base=f"{self._impl.filename_base}-{digest[:20]}",
            source_stamp=digest,
        )

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        found = super().load_overload(sig, target_context)
        # Two processes that save at the same moment may both take one file name for different signatures.
        return found if found is not None and tuple(found.signature.args) == tuple(sig) else None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:  # a full disk must not stop a call whose code is compiled
            warnings.warn(f"compiled code is not kept in {self.cache_path}: {error}", RuntimeWarning, stacklevel=2)


def cached(*drivers: Any) -> None:
    """Gives each compiled driver the guarded cache; where no folder can be written, it is compiled in each process."""
    for driver in drivers:
        if not hasattr(driver, "enable_caching"):  # NUMBA_DISABLE_JIT
            continue
        try:
            driver._cache = _Cache(driver.py_func, fingerprint(driver.py_func.__module__))
        except RuntimeError:  # numba's word for "neither __pycache__ nor the user's cache folder can be written"
            pass
