"""Turns weights that come as pickles into safetensors files, without running anything that stands in them.

Two pickles are read: PyTorch's file format of before version 1.6 (a row of pickles, then the storages as raw numbers; the later format is a zip
file), and plain tables of numbers. The reader knows the four names that such a file of plain tensors needs and refuses every other one. Tensors are
views of storages with strides of their own; ignoring those gives numbers of the right shape in the wrong places.

Standard library only.
"""

from __future__ import annotations

import array
import io
import json
import math
import pickle
import struct
import sys
from dataclasses import dataclass
from typing import Any, BinaryIO, Mapping, Sequence

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
# What a storage is called: the letter of Python's `array`, its bytes, and the dtype of safetensors.
STORAGES = {"FloatStorage": ("f", 4, "F32"), "LongStorage": ("q", 8, "I64")}


class WeightsError(Exception):
    """A file that holds something else than plain tensors; the text says what."""


@dataclass(frozen=True)
class Tensor:
    """Numbers in row-major order."""

    dtype: str
    shape: tuple[int, ...]
    values: array.array[Any]


@dataclass(frozen=True)
class _Storage:
    kind: str
    key: str
    count: int


@dataclass(frozen=True)
class _View:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Names(dict[str, object]):
    """Stands for the OrderedDict of a state; attributes that the pickle would set on it are left out."""

    def __setstate__(self, _state: object) -> None:
        pass


def _view(storage: object, offset: object, shape: object, strides: object, *_others: object) -> _View:
    """Stands for torch._utils._rebuild_tensor_v2; the others are whether it needs a gradient, and its hooks."""
    whole = isinstance(shape, tuple) and isinstance(strides, tuple) and all(isinstance(n, int) for n in (offset, *shape, *strides))
    if not isinstance(storage, _Storage) or not whole:
        raise WeightsError("a tensor is not described by a storage, an offset, a shape and strides")
    assert isinstance(offset, int) and isinstance(shape, tuple) and isinstance(strides, tuple)
    return _View(storage, offset, shape, strides)


class _Reader(pickle.Unpickler):
    """Knows the names of plain tensors only, so that nothing else can be called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _Names
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _view
        if module == "torch" and name in STORAGES:
            return name
        raise WeightsError(f"the file asks for {module}.{name}, which plain tensors do not need; it is not read")

    def persistent_load(self, pid: object) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) == 6 and pid[0] == "storage" and pid[5] is None):
            raise WeightsError("the file refers to something else than a storage")
        _, kind, key, _location, count, _whole = pid
        if kind not in STORAGES or not isinstance(key, str) or not isinstance(count, int) or count < 0:
            raise WeightsError("a storage has no kind, key and length")
        return _Storage(kind, key, count)


def _load(file: BinaryIO) -> Any:
    try:
        return _Reader(file).load()
    except WeightsError:
        raise
    except Exception as error:  # damaged pickles fail in every imaginable way
        raise WeightsError(f"the file is damaged: {error!r}") from error


def _rows(view: _View, data: array.array[Any]) -> array.array[Any]:
    """The numbers of a view in row-major order."""
    # An axis of length 1 never steps, whatever its stride says.
    axes = [(n, step) for n, step in zip(view.shape, view.strides) if n != 1]
    if len(view.shape) != len(view.strides) or view.offset < 0 or any(n < 0 or step < 0 for n, step in axes):
        raise WeightsError("a tensor has no usable offset, shape or strides")
    if any(n == 0 for n, _ in axes):
        return array.array(data.typecode)
    last = view.offset + sum((n - 1) * step for n, step in axes)
    if last >= len(data):
        raise WeightsError(f"a tensor reaches to number {last} of a storage with {len(data)}")
    if not axes:
        return data[view.offset : view.offset + 1]
    starts = [view.offset]
    for n, step in axes[:-1]:
        starts = [start + index * step for start in starts for index in range(n)]
    n, step = axes[-1]
    rows = array.array(data.typecode)
    for start in starts:
        # A step of 0 repeats one number.
        rows.extend(data[start : start + (n - 1) * step + 1 : step] if step else data[start : start + 1] * n)
    return rows


def read_legacy(raw: bytes) -> dict[str, Tensor]:
    """The tensors of a file in PyTorch's old format, by name."""
    file = io.BytesIO(raw)
    if _load(file) != MAGIC or _load(file) != PROTOCOL:
        raise WeightsError("this is not PyTorch's old file format")
    system = _load(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise WeightsError("the file was not written by a little-endian machine")
    state = _load(file)
    keys = _load(file)
    if not isinstance(state, dict) or not isinstance(keys, list):
        raise WeightsError("the file holds no tensors by name")
    views = {name: view for name, view in state.items() if isinstance(name, str) and isinstance(view, _View)}
    if len(views) != len(state):
        raise WeightsError("the file holds something else than tensors by name")
    storages = {view.storage.key: view.storage for view in views.values()}
    data: dict[str, array.array[Any]] = {}
    for key in keys:
        if key not in storages or key in data:
            raise WeightsError(f"the storage {key!r} is not one that a tensor uses, or comes twice")
        letter, size, _ = STORAGES[storages[key].kind]
        head = file.read(8)
        count = struct.unpack("<q", head)[0] if len(head) == 8 else -1
        if count != storages[key].count:
            raise WeightsError(f"the storage {key!r} has {count} numbers, {storages[key].count} were announced")
        numbers = array.array(letter)
        block = file.read(count * size)
        if len(block) != count * size:
            raise WeightsError(f"the storage {key!r} is cut short")
        numbers.frombytes(block)
        if sys.byteorder == "big":
            numbers.byteswap()
        data[key] = numbers
    if len(data) != len(storages) or file.read(1):
        raise WeightsError("the storages are not those that the tensors use")
    return {
        name: Tensor(STORAGES[view.storage.kind][2], view.shape, _rows(view, data[view.storage.key])) for name, view in views.items()
    }


def read_table(raw: bytes) -> dict[str, list[float]]:
    """A pickled dictionary of lists of numbers."""
    table = _load(io.BytesIO(raw))
    if not isinstance(table, dict):
        raise WeightsError("the file holds no table")
    columns = {}
    for name, column in table.items():
        if not isinstance(name, str) or not isinstance(column, list) or not all(isinstance(x, float) for x in column):
            raise WeightsError(f"the column {name!r} is no list of numbers")
        columns[name] = column
    return columns


def numbers(shape: Sequence[int], values: Sequence[float]) -> Tensor:
    """A tensor of f32."""
    if math.prod(shape) != len(values):
        raise WeightsError(f"{len(values)} numbers do not fill the shape {tuple(shape)}")
    return Tensor("F32", tuple(shape), array.array("f", values))


def safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors as a safetensors file, in the order of their names: equal tensors give equal bytes."""
    header: dict[str, object] = {}
    blocks = []
    end = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        block = tensor.values[:]
        if sys.byteorder == "big":
            block.byteswap()
        raw = block.tobytes()
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [end, end + len(raw)]}
        end += len(raw)
        blocks.append(raw)
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(blocks)


def efficientnet(raw: bytes) -> bytes:
    """EfficientNet's weights as safetensors; the counters of its batch normalisation, which only training reads, are left out."""
    tensors = read_legacy(raw)
    return safetensors({name: tensor for name, tensor in tensors.items() if not name.endswith(".num_batches_tracked")})


def brisque(svm: str, table: bytes) -> bytes:
    """LIBSVM's text file of an RBF regression and the bounds of its features as safetensors.

    A score is the sum of coefficient * exp(-gamma |x - v|^2) over the support vectors v, less rho, for features x scaled from their bounds to -1..1.
    """
    head, _, body = svm.partition("\nSV\n")
    fields = dict(line.split(" ", 1) for line in head.splitlines())
    if fields.get("svm_type") != "epsilon_svr" or fields.get("kernel_type") != "rbf":
        raise WeightsError("the table is not that of a regression with RBF kernel")
    bounds = read_table(table)
    width = len(bounds.get("min_", []))
    if width == 0 or len(bounds.get("max_", [])) != width:
        raise WeightsError("the features have no lower and upper bounds")
    coefficients: list[float] = []
    vectors: list[float] = []
    try:
        for line in body.splitlines():
            coefficient, *entries = line.split()
            coefficients.append(float(coefficient))
            row = [0.0] * width  # what is not written is 0
            for entry in entries:
                place, _, value = entry.partition(":")
                if not 1 <= int(place) <= width:
                    raise WeightsError(f"a support vector has a feature {place}, there are {width}")
                row[int(place) - 1] = float(value)
            vectors.extend(row)
        count = int(fields["total_sv"])
        scalars = {name: [float(fields[name])] for name in ("gamma", "rho")}
    except (KeyError, ValueError) as error:
        raise WeightsError(f"the table of the regression is damaged: {error!r}") from error
    if count != len(coefficients):
        raise WeightsError(f"{len(coefficients)} support vectors, {count} were announced")
    return safetensors(
        {
            "coefficients": numbers([count], coefficients),
            "vectors": numbers([count, width], vectors),
            "low": numbers([width], bounds["min_"]),
            "high": numbers([width], bounds["max_"]),
            **{name: numbers([1], value) for name, value in scalars.items()},
        }
    )
