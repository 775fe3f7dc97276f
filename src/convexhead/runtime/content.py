"""Values are hashed by their content: arrays in full, a user's objects with their code.

Two values have equal hashes only if a fit cannot tell them apart. An array is hashed by dtype, shape and bytes, an
object by its class and its state. A class or function of the user is hashed by its bytecode, its attributes, and the
functions and constants it refers to. A class or function of an installed library is known by its name and version.
"""

from __future__ import annotations

import copyreg
import dis
import functools
import hashlib
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from convexhead.errors import InputError
from convexhead.runtime.stored_tokens import forget_pages

BLOCK = 1 << 22
"""Bytes of an array that are hashed at a time. Chosen by hand: much less than memory, much more than a call costs."""
SHORT = 16
"""Largest number of entries with which a sequence is its own description in JSON; longer ones are hashed."""


def content_hash(*values: Any) -> str:
    """Return the SHA-256 of ``values`` by content.

    Raises
    ------
    InputError
        A value that cannot be told from others by content: an open file, a lock.
    """
    walk = _Walk()
    for value in values:
        walk.feed(value)
    return walk.digest.hexdigest()


def described(value: Any) -> Any:
    """Return a JSON value that tells ``value`` from others: itself if it is short, else its `content_hash`."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.random.RandomState):
        return None  # like no seed at all: what was drawn from it is what counts
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, (list, tuple)) and len(value) <= SHORT:
        parts = [described(part) for part in value]
        if all(part is None or isinstance(part, (bool, int, float, str)) for part in parts):
            return parts
    return f"sha256:{content_hash(value)}"


class _Walk:
    """A walk feeds values to one hash, and knows the functions and classes that are in it already."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._codes: dict[int, tuple[int, Any]] = {}  # with the objects, so that an id is not given twice
        self._above: list[int] = []

    def feed(self, value: Any) -> None:
        if isinstance(value, np.generic) and not isinstance(value, np.void):
            value = value.item()
        if value is None or isinstance(value, (bool, str, bytes, bytearray, complex)):
            self._mark(type(value).__name__, value if isinstance(value, (bytes, bytearray)) else repr(value))
        elif isinstance(value, (int, float)) and type(value).__module__ == "builtins":
            whole = isinstance(value, float) and value.is_integer()  # 1 and 1.0 are one setting
            self._mark("number", repr(int(value)) if whole else repr(value))
        elif isinstance(value, (torch.dtype, torch.device, np.dtype, range, slice)) or value is Ellipsis:
            self._mark(type(value).__name__, repr(value))
        elif isinstance(value, PurePath):
            self._mark("path", str(value))
        elif id(value) in self._above:
            self._mark("above", str(len(self._above) - self._above.index(id(value))))
        else:
            self._above.append(id(value))
            self._feed_compound(value)
            self._above.pop()

    def _mark(self, kind: str, content: str | bytes | bytearray = b"") -> None:
        data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        self.digest.update(f"{kind} {len(data)} ".encode())
        self.digest.update(data)

    def _feed_compound(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._feed_tensor(value)
        elif isinstance(value, np.ndarray):
            self._feed_array(value)
        elif type(value) in (list, tuple):
            self._mark("sequence", str(len(value)))
            for part in value:
                self.feed(part)
        elif type(value) in (dict, types.MappingProxyType):
            self._mark("mapping", str(len(value)))
            self._feed_items(value)
        elif isinstance(value, (set, frozenset)):
            self._mark("set", " ".join(sorted(content_hash(part) for part in value)))
        elif isinstance(value, types.ModuleType):
            self._feed_module(value)
        elif isinstance(value, (type, types.FunctionType)):
            self._feed_definition(value)
        elif isinstance(value, types.CodeType):
            self._feed_code(value)
        elif isinstance(value, types.MethodType):
            self._mark("method")
            self.feed(value.__func__)
            self.feed(value.__self__)
        elif isinstance(value, (staticmethod, classmethod)):
            self._mark(type(value).__name__)
            self.feed(value.__func__)
        elif isinstance(value, property):
            self._mark("property")
            self.feed((value.fget, value.fset, value.fdel))
        elif isinstance(value, functools.cached_property):
            self._mark("property")
            self.feed(value.func)
        elif isinstance(value, torch.Generator):
            self._mark("generator")
            self.feed(value.get_state())
        else:
            self._feed_object(value)

    # -- data ---------------------------------------------------------------------------------------------------------
    def _feed_tensor(self, tensor: torch.Tensor) -> None:
        tensor = tensor.detach()
        if tensor.layout != torch.strided:
            tensor = tensor.to_dense()
        tensor = tensor.cpu().resolve_conj().resolve_neg()
        if tensor.dtype == torch.bfloat16:
            self._mark("bfloat16")
            tensor = tensor.view(torch.int16)
        self._feed_array(tensor.numpy())

    def _feed_array(self, array: np.ndarray) -> None:
        self._mark("array", repr((array.dtype.str if array.dtype.names is None else array.dtype.descr, array.shape)))
        if isinstance(array, np.ma.MaskedArray):
            self.feed(np.ma.getmaskarray(array))
            array = array.data
        if array.dtype.hasobject:
            self.feed(array.tolist())
            return
        rows = array if array.ndim else array.reshape(1)
        step = max(1, BLOCK * len(rows) // max(rows.nbytes, 1))
        for start in range(0, len(rows) if rows.size else 0, step):
            block = np.ascontiguousarray(rows[start : start + step])
            self.digest.update(block.reshape(-1).view(np.uint8).data)
            forget_pages(array)

    def _feed_items(self, items: Mapping[Any, Any]) -> None:
        for _, key, part in sorted(((content_hash(key), key, part) for key, part in items.items()), key=lambda x: x[0]):
            self.feed(key)
            self.feed(part)

    def _feed_object(self, value: Any) -> None:
        """Feed what pickle would write, and the class by content."""
        if hasattr(value, "__name__") and _of_a_library(getattr(value, "__module__", None)):  # a builtin, a ufunc
            self._mark("name", f"{value.__module__}.{value.__name__}")
            return
        try:
            reduce = copyreg.dispatch_table.get(type(value))
            reduced = reduce(value) if reduce else value.__reduce_ex__(2)
        except Exception as error:
            raise InputError(
                f"a {type(value).__module__}.{type(value).__qualname__} cannot be told from others by its content: "
                "keep it out of the settings and the loss"
            ) from error
        if isinstance(reduced, str):
            self._mark("name", f"{getattr(value, '__module__', None)}.{reduced}")
            return
        make, arguments, *rest = reduced
        self._mark("object")
        self.feed(type(value))
        if make is not copyreg.__newobj__:  # type: ignore[attr-defined]
            self.feed(make)
        self.feed(tuple(argument for argument in arguments if argument is not type(value)))
        for part in rest[:1]:
            self.feed(part)
        for part in rest[1:3]:
            self.feed(None if part is None else list(part))

    # -- code ---------------------------------------------------------------------------------------------------------
    def _feed_module(self, module: types.ModuleType) -> None:
        self._mark("module", module.__name__)
        source = getattr(module, "__file__", None)
        if _of_a_library(module.__name__):
            self._mark("version", _version(module.__name__))
        elif source is not None and Path(source).is_file():
            self._mark("source", Path(source).read_bytes())

    def _feed_definition(self, value: type | types.FunctionType) -> None:
        """Feed a class or function once: by name and version if it belongs to a library, else by its code."""
        if id(value) in self._codes:
            self._mark("again", str(self._codes[id(value)][0]))
            return
        self._codes[id(value)] = (len(self._codes), value)
        module = getattr(value, "__module__", None)
        self._mark("name", f"{module}.{value.__qualname__}")
        if isinstance(value, type):
            for cls in value.__mro__:
                self._mark("class", f"{cls.__module__}.{cls.__qualname__}")
                if _of_a_library(cls.__module__):
                    self._mark("version", _version(cls.__module__))
                    self._feed_items({k: v for k, v in vars(cls).items() if _is_setting(k, v)})
                else:
                    self._feed_items({k: v for k, v in vars(cls).items() if _is_content(k, v)})
        elif _of_a_library(module):
            self._mark("version", _version(str(module)))
        else:
            self._feed_function(value)

    def _feed_function(self, function: types.FunctionType) -> None:
        self._feed_code(function.__code__, function.__doc__)
        self.feed((function.__defaults__, function.__kwdefaults__, function.__dict__))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._mark("free", name)
            try:
                self.feed(cell.cell_contents)
            except ValueError:  # not bound yet
                self._mark("empty")
        for name in sorted(set(_global_names(function.__code__))):
            if name in function.__globals__:
                self._mark("global", name)
                self.feed(function.__globals__[name])

    def _feed_code(self, code: types.CodeType, doc: str | None = None) -> None:
        self._mark("code", code.co_code)
        consts = code.co_consts
        self.feed(consts[1:] if doc is not None and consts[:1] == (doc,) else consts)
        self.feed((code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars))
        self.feed((code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags))


def _global_names(code: types.CodeType) -> Iterator[str]:
    """Yield the names of the globals that the code reads, also inside its inner functions."""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield step.argval
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _global_names(const)


def _is_content(name: str, value: Any) -> bool:
    """Whether an entry of a user's class changes what the class does; docstrings and bookkeeping do not."""
    if isinstance(value, (types.MemberDescriptorType, types.GetSetDescriptorType)):
        return False
    own_method = isinstance(value, (types.FunctionType, classmethod, staticmethod, property))
    return own_method or not (name.startswith("__") or name == "_abc_impl")


def _is_setting(name: str, value: Any) -> bool:
    """Whether an entry of a library's class is a plain value, which a user may have replaced."""
    return not name.startswith("__") and isinstance(value, (bool, int, float, str, np.ndarray, torch.Tensor))


@functools.cache
def _library_folders() -> Sequence[Path]:
    paths = sysconfig.get_paths()
    return [Path(paths[name]).resolve() for name in ("purelib", "platlib")]


@functools.cache
def _of_a_library(name: str | None) -> bool:
    """Whether a module belongs to Python, to convexhead or to an installed package."""
    top = str(name).partition(".")[0]
    if top == "convexhead" or top in sys.stdlib_module_names:
        return True
    source = getattr(sys.modules.get(top), "__file__", None)
    if source is None:
        return False
    parents = Path(source).resolve().parents
    return any(folder in parents for folder in _library_folders()) or "site-packages" in (p.name for p in parents)


def _version(name: str) -> str:
    return str(getattr(sys.modules.get(name.partition(".")[0]), "__version__", ""))
