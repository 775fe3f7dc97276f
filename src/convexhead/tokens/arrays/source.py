"""Arrays of tokens as a source, of which each sample is the tokens themselves."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convexhead.errors import InputError
from convexhead.tokens.arrays.open import READERS, open_arrays
from convexhead.tokens.arrays.roles import ROLES, Found, texts
from convexhead.tokens.arrays.rows import Rows
from convexhead.tokens.sources.base import check_split
from convexhead.tokens.sources.class_folders import ClassFolders
from convexhead.tokens.sources.naming import encode_labels
from convexhead.tokens.sources.targets import check_targets, column_names

STORED = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float32", "float64": "float32"}
"""Types of tokens, and in which they are stored."""
BLOCK = 1 << 20
"""Numbers of tokens that are read at a time. Chosen by hand."""


class Part(NamedTuple):
    """One split: tokens ``(n, s, d)`` or ``(n, d)``, tokens in front of them ``(n, p, d)``, labels ``(n,)`` or targets
    ``(n, c)``, names, and where samples differ in it the number of each one's tokens."""

    tokens: Rows
    prefix: Rows | None
    labels: NDArray[Any]
    names: list[str]
    lengths: NDArray[np.int64] | None = None


class TokenArrays:
    """Labelled tokens in arrays; see `convexhead.tokens.sources.base.ImageSource`.

    Attributes
    ----------
    shape
        ``(p + s, d)``, what `load` returns.
    n_prefix
        ``p``, of arrays that have the tokens in front apart; else 0.
    dtype
        In which tokens can be stored without loss (float64 without much).

    Raises
    ------
    InputError
        Arrays that are no tokens or labels, or that do not fit together.
    """

    def __init__(self, found: Found, class_names: list[str] | None) -> None:
        self.spec = found.spec
        self.splits = tuple(found.splits)
        self.left_out = found.left_out
        self._files = {path: _stamp(path) for path in found.files}
        if found.exported_reduced and any("prefix" in roles for roles in found.splits.values()):
            raise InputError(
                f"{self.spec!r} was exported with class tokens as stored and the other tokens reduced: export it again "
                "with --raw"
            )
        labels, self.class_names = self._read_labels(found, class_names or found.class_names)
        self._parts = {
            split: Part(roles["tokens"], roles.get("prefix"), labels[split], _names(split, roles), _lengths(roles))
            for split, roles in found.splits.items()
        }
        shapes = {split: _shape(part) for split, part in self._parts.items()}
        self.shape, self.n_prefix = shapes["train"]
        if any("lengths" in roles for roles in found.splits.values()):
            self.shape = max(s for (s, _), _ in shapes.values()), self.shape[1]
            shapes = {split: ((self.shape[0], d), p) for split, ((_, d), p) in shapes.items()}
        for split, shape in shapes.items():
            if shape != shapes["train"]:
                raise InputError(
                    f"{self._parts[split].tokens.name} has {shape[0][0]} tokens x {shape[0][1]} channels a sample, "
                    f"those of train have {self.shape[0]} x {self.shape[1]}"
                )
        self.ragged = any(part.lengths is not None for part in self._parts.values())
        if self.ragged and self.n_prefix:
            raise InputError(f"{self.spec!r} has tokens in front and lengths: samples of different length have neither")
        self.dtype = _common(rows for part in self._parts.values() for rows in (part.tokens, part.prefix) if rows)
        self._mine = threading.local()
        self._fingerprint = ""

    def _read_labels(self, found: Found, names: list[str] | None) -> tuple[dict[str, NDArray[Any]], list[str]]:
        """Return what is known of the samples of each split, and what it means."""
        return _numbered(self.spec, {split: _labels(roles) for split, roles in found.splits.items()}, names)

    def labels(self, split: str) -> NDArray[np.int64]:
        return self._parts[check_split(split, self.splits)].labels

    def lengths(self, split: str) -> NDArray[np.int64]:
        """Return how many tokens each sample has."""
        part = self._parts[check_split(split, self.splits)]
        full = part.tokens.shape[1] if len(part.tokens.shape) == 3 else 1
        return np.full(len(part.names), full) if part.lengths is None else part.lengths

    def files(self, split: str) -> list[str]:
        return self._parts[check_split(split, self.splits)].names

    def load(self, split: str, index: int) -> Any:
        """Return the tokens ``(p + s, d)`` of a sample. Safe to call from several threads.

        Raises
        ------
        InputError
            NaN or infinite values near it.
        """
        step = self._step
        place = split, index // step
        # A thread reads one sample after the other: it keeps the block that it is in.
        if getattr(self._mine, "place", None) != place:
            start = index // step * step
            self._mine.block = self._block(split, start, min(start + step, len(self._parts[split].names)))
            self._mine.place = place
        return self._mine.block[index % step]

    def fingerprint(self) -> str:
        """Hash all tokens, labels and names, whatever the files that they lie in."""
        if not self._fingerprint:
            digest = hashlib.sha256("\0".join(self.class_names).encode(errors="surrogateescape"))
            for split, part in self._parts.items():
                digest.update(f"{split}{self.shape}{part.names}".encode(errors="surrogateescape"))
                digest.update(part.labels.tobytes())
                digest.update(b"" if part.lengths is None else part.lengths.tobytes())
                for start in range(0, len(part.names), self._step):
                    block = self._block(split, start, min(start + self._step, len(part.names)))
                    digest.update(block.reshape(-1).view(torch.uint8).numpy().data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def changed(self) -> str | None:
        """Name a file that was rewritten since the source was opened."""
        return next((f"{str(path)!r} was rewritten" for path in self._files if _stamp(path) != self._files[path]), None)

    @property
    def _step(self) -> int:
        return max(1, BLOCK // (self.shape[0] * self.shape[1]))

    def _block(self, split: str, start: int, stop: int) -> Tensor:
        """Return the tokens of some samples ``(k, p + s, d)``, zeros behind those that there are."""
        part = self._parts[split]
        blocks = [_finite(rows.tensor(start, stop), rows.name, start) for rows in (part.prefix, part.tokens) if rows]
        blocks = [block.reshape(stop - start, -1, self.shape[1]) for block in blocks]
        block = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
        if not self.ragged:
            return block
        lengths = torch.from_numpy(self.lengths(split)[start:stop])
        block = torch.nn.functional.pad(block, (0, 0, 0, self.shape[0] - block.shape[1]))
        return block * (torch.arange(self.shape[0]) < lengths[:, None]).unsqueeze(2)


class TargetArrays(TokenArrays):
    """Tokens in arrays with several classes a sample, or numbers: see `convexhead.tokens.sources.base.TargetSource`."""

    def __init__(self, found: Found, class_names: list[str] | None, task: str) -> None:
        self.task = task
        super().__init__(found, class_names)

    def _read_labels(self, found: Found, names: list[str] | None) -> tuple[dict[str, NDArray[Any]], list[str]]:
        columns = {split: _targets(roles, self.task) for split, roles in found.splits.items()}
        for split, values in columns.items():
            if (c := values.shape[1]) != columns["train"].shape[1]:
                raise InputError(
                    f"{found.splits[split]['labels'].name} has {c} columns, those of train {columns['train'].shape[1]}"
                )
        return columns, column_names(self.task, columns["train"].shape[1], names)

    def labels(self, split: str) -> NoReturn:
        """Refuse: a sample has no label of its own."""
        raise InputError(f"{self.spec!r} has targets, not one label a sample")

    def targets(self, split: str) -> NDArray[np.float64]:
        return self._parts[check_split(split, self.splits)].labels


class TokenFolder(ClassFolders):
    """Class folders with the tokens of one sample a file; ``shape``, ``n_prefix`` and ``dtype`` as of `TokenArrays`."""

    kind, other, extensions = "arrays", "not an array", frozenset(READERS)

    def __init__(self, root: str | Path, any_length: bool = False) -> None:
        super().__init__(root)
        first = self._only(self.root / self.files("train")[0])
        self.shape, self.dtype, self.n_prefix = _sample(first), _common([first]), 0
        self._type, self.ragged = first.dtype, any_length
        if any_length:
            each = {split: [self._length(name) for name in self.files(split)] for split in self.splits}
            self._lengths = {split: np.array(lengths, np.int64) for split, lengths in each.items()}
            self.shape = max(map(max, each.values())), self.shape[1]

    def lengths(self, split: str) -> NDArray[np.int64]:
        """Return how many tokens each sample has."""
        return self._lengths[check_split(split, self.splits)]

    def load(self, split: str, index: int) -> Any:
        """Return the tokens ``(s, d)`` of a sample, with zeros behind those that there are.

        Raises
        ------
        InputError
            NaN or infinite values, or another shape or type than the first sample's.
        FileFormatError
            A file that cannot be read.
        """
        rows = self._only(self.root / self.files(split)[index])
        s = int(self._lengths[split][index]) if self.ragged else self.shape[0]
        if (rows.dtype, _sample(rows)) != (self._type, (s, self.shape[1])):
            self._refuse(rows)
        tokens = _finite(rows.tensor(0, len(rows)), rows.name, None).reshape(s, self.shape[1])
        return torch.nn.functional.pad(tokens, (0, 0, 0, self.shape[0] - s))

    def _length(self, name: str) -> int:
        rows = self._only(self.root / name)
        if (rows.dtype, _sample(rows)[1]) != (self._type, self.shape[1]):
            self._refuse(rows)
        return _sample(rows)[0]

    def _refuse(self, rows: Rows) -> NoReturn:
        told = "" if self.ragged else "; say any_length=True where samples have different numbers of tokens"
        raise InputError(
            f"{rows.name} has {rows.dtype} tokens {_sample(rows)}, the first file's are {self._type} {self.shape}{told}"
        )

    def _only(self, path: Path) -> Rows:
        found = open_arrays(path)
        named = [rows for key, rows in found.items() if key.lower() in ROLES["tokens"]]
        if len(found) > 1 and len(named) != 1:
            raise InputError(f"{str(path)!r} holds the arrays {', '.join(found)}: call one of them tokens")
        if not found:
            raise InputError(f"{str(path)!r} holds no array")
        return named[0] if len(found) > 1 else next(iter(found.values()))


def _labels(roles: dict[str, Rows]) -> NDArray[Any]:
    rows, tokens = roles["labels"], roles["tokens"]
    if len(rows.shape) == 2 and len(rows) == len(tokens) and rows.shape[1] > 1:
        of_tokens = rows.shape[1:] == tokens.shape[1:-1]
        raise InputError(
            f"{rows.name} has {rows.shape[1]} columns: say task='multi-label' if they are ones and zeros of as many "
            "classes, or task='regression' if they are numbers"
            + (f"; labels of the {rows.shape[1]} tokens go beside the arrays to fit(X, y) with pool=None" * of_tokens)
        )
    if rows.shape not in ((len(tokens),), (len(tokens), 1)):
        raise InputError(f"{rows.name} has shape {rows.shape} for the {len(tokens)} samples of {tokens.name}")
    labels = rows.whole().reshape(-1)
    if labels.dtype.kind == "f" and not (labels == np.rint(labels)).all():
        row = int(np.flatnonzero(labels != np.rint(labels))[0])
        raise InputError(
            f"{rows.name} has {labels[row]} in row {row}: a label is one text or one whole number; if these are "
            "numbers to predict say task='regression'"
        )
    return labels


def _targets(roles: dict[str, Rows], task: str) -> NDArray[np.float64]:
    """Return targets ``(n, c)``, checked."""
    rows, tokens = roles["labels"], roles["tokens"]
    if len(rows.shape) not in (1, 2) or len(rows) != len(tokens) or 0 in rows.shape:
        raise InputError(
            f"{rows.name} has shape {rows.shape} for the {len(tokens)} samples of {tokens.name}: targets are (n, c)"
        )
    return check_targets(rows.whole().reshape(len(rows), -1), task, rows.name)


def _numbered(
    spec: str, columns: dict[str, NDArray[Any]], class_names: list[str] | None
) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
    """Turn labels into indices of class names; where those are given, labels are indices of them, or the names."""
    if class_names is not None:
        if len(set(class_names)) < len(class_names):
            twice = next(name for name in class_names if class_names.count(name) > 1)
            raise InputError(f"several classes are called {twice!r}: give each class a name of its own")
        for split, column in columns.items():
            if column.dtype.kind in "USOT":
                names = [v.decode() if isinstance(v, bytes) else str(v) for v in column.tolist()]
                if strangers := sorted(set(names) - set(class_names)):
                    raise InputError(f"{spec!r}: the {split} label {strangers[0]!r} is none of the class names")
                columns[split] = np.array([class_names.index(name) for name in names], np.int64)
    return encode_labels(spec, columns, class_names)


def _names(split: str, roles: dict[str, Rows]) -> list[str]:
    n = len(roles["tokens"])
    if "names" not in roles:
        return [f"{split}-{i}" for i in range(n)]
    names = texts(roles["names"])
    if len(names) != n:
        raise InputError(f"{roles['names'].name} has {len(names)} names for the {n} samples of {roles['tokens'].name}")
    if len(set(names)) < n:
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InputError(f"{roles['names'].name} names two samples {twice!r}: names tell samples apart")
    return names


def _lengths(roles: dict[str, Rows]) -> NDArray[np.int64] | None:
    """Return how many tokens each sample has, checked; None where nothing says it."""
    if "lengths" not in roles:
        return None
    rows, tokens = roles["lengths"], roles["tokens"]
    lengths, most = rows.whole(), (1, *tokens.shape[1:])[-2]
    if lengths.shape != (len(tokens),) or lengths.dtype.kind not in "iu":
        raise InputError(f"{rows.name} must be whole numbers, one for each of the {len(tokens)} samples")
    if bad := np.flatnonzero((lengths < 1) | (lengths > most)).tolist():
        raise InputError(f"{rows.name} has {lengths[bad[0]]} in row {bad[0]}: a sample has 1 to {most} tokens here")
    return lengths.astype(np.int64)


def _shape(part: Part) -> tuple[tuple[int, int], int]:
    """Return ``(p + s, d)`` and ``p``."""
    tokens, prefix = part.tokens, part.prefix
    if len(tokens.shape) not in (2, 3) or 0 in tokens.shape:
        flatten = "; flatten the grid to (n, h*w, d)" if len(tokens.shape) == 4 else ""
        raise InputError(f"{tokens.name} has shape {tokens.shape}, tokens are (n, s, d) or (n, d){flatten}")
    s, d = (1, *tokens.shape[1:])[-2:]
    if prefix is None:
        return (s, d), 0
    if len(prefix.shape) != 3 or prefix.shape[::2] != (len(tokens), d) or not prefix.shape[1]:
        raise InputError(
            f"{prefix.name} has shape {prefix.shape}, beside these tokens it must be ({len(tokens)}, p, {d})"
        )
    return (s + prefix.shape[1], d), prefix.shape[1]


def _sample(rows: Rows) -> tuple[int, int]:
    if len(rows.shape) not in (1, 2) or 0 in rows.shape:
        raise InputError(f"{rows.name} has shape {rows.shape}, the tokens of a sample are (s, d) or (d,)")
    s, d = (1, *rows.shape)[-2:]
    return s, d


def _common(arrays: Any) -> str:
    """Return the type that holds all of the arrays."""
    kinds = set()
    for rows in arrays:
        if rows.dtype not in STORED:
            raise InputError(f"{rows.name} holds {rows.dtype}, tokens are float16, bfloat16, float32 or float64")
        kinds.add(STORED[rows.dtype])
    return kinds.pop() if len(kinds) == 1 else "float32"


def _finite(block: Tensor, name: str, first: int | None) -> Tensor:
    """Return the block, as float32 where it was float64.

    Raises
    ------
    InputError
        NaN, infinity, or float64 beyond float32; says in which row.
    """
    narrow = block.float() if block.dtype == torch.float64 else block
    if narrow.isfinite().all():
        return narrow
    kind = "NaN" if block.isnan().any() else "an infinite value" if block.isinf().any() else "a value beyond float32"
    bad = ~narrow.flatten(1).isfinite().all(1) if narrow.ndim > 1 else ~narrow.isfinite()
    row = "" if first is None else f" in row {first + int(bad.int().argmax())}"
    raise InputError(f"{name} has {kind}{row}: mend or leave out that sample")


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
