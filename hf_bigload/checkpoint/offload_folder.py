"""The folder that offloaded weights are written to: one `<name>.dat` per tensor, and an `index.json` of them all.

A `.dat` holds a tensor's bytes and nothing else; the index holds its dtype and shape. An entry of the index may
instead point into a safetensors shard (`safetensors_file`, and `weight_name` where the tensor's name differs there).

A weight that is offloaded again replaces the one of that name, whichever model it was of. The new bytes are written
beside the old and renamed over them, so a reader sees one or the other, and a crash leaves the old.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import (
    CorruptShardError,
    DtypeError,
    MissingShardError,
    OffloadedWeightError,
    QuantizedOffloadError,
    SpillError,
    human_bytes,
)
from ..specs import DTYPE_BYTES, TensorEntry
from .formats import missing_shard, read_safetensors

INDEX_NAME = "index.json"
OFFLOAD_AGAIN = "Offload the model again."
UNSAFE_IN_FILE_NAMES = str.maketrans({"%": "%25", "/": "%2F", "\\": "%5C", "\0": "%00"})

PathLike = str | os.PathLike[str]
WeightInfo = Mapping[str, Any]


def weight_file(offload_folder: PathLike, weight_name: str) -> str:
    """The path of a weight's `.dat`, always directly in the folder: a "/" in a module's name is quoted as in a URL."""
    return os.path.join(offload_folder, weight_name.translate(UNSAFE_IN_FILE_NAMES) + ".dat")


def offload_weight(
    weight: torch.Tensor, weight_name: str, offload_folder: PathLike, index: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """Write `weight` into the folder, note its dtype and shape in `index` where one is given, and return `index`.

    Any dtype, any device. Raises `OffloadedWeightError` for a tensor on meta, which has no bytes;
    `QuantizedOffloadError` for a tensor that is made of others; `SpillError` where the disk refuses.
    """
    data = _plain_bytes(weight, weight_name)
    path = weight_file(offload_folder, weight_name)
    try:
        with _replacing(path) as file:
            file.write(data.numpy().data)
    except OSError as error:
        raise SpillError(_refused(weight_name, path, data.numel(), error)) from error
    if index is not None:
        index[weight_name] = {"dtype": dtype_name(weight.dtype), "shape": list(weight.shape)}
    return index


def load_offloaded_weight(weight_file: PathLike, weight_info: WeightInfo) -> torch.Tensor:
    """The tensor in a `.dat` file, in memory of its own; `weight_info` is its entry of the index.

    Raises `MissingShardError` without the file, `CorruptShardError` where its size is not that of the entry.
    """
    path = os.fspath(weight_file)
    name = os.path.basename(path).removesuffix(".dat")
    return read_tensor(_checked_size(_dat_entry(name, path, weight_info)))


def offload_state_dict(save_dir: PathLike, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Write every tensor of `state_dict` into the folder `save_dir`, made where it is not there, and its index."""
    os.makedirs(save_dir, exist_ok=True)
    index: dict[str, Any] = {}
    for name, tensor in state_dict.items():
        offload_weight(tensor, name, save_dir, index)
    save_offload_index(index, save_dir)


def save_offload_index(index: Mapping[str, Any] | None, offload_folder: PathLike) -> None:
    """Add `index` to the folder's `index.json`; entries of other weights stay. Nothing is written for an empty one."""
    if not index:
        return
    path = os.path.join(offload_folder, INDEX_NAME)
    merged = {**(_read_index(path) if os.path.exists(path) else {}), **index}
    with _replacing(path) as file:
        file.write(json.dumps(merged, indent=2).encode())


def read_offload_index(offload_folder: PathLike) -> dict[str, WeightInfo]:
    """The folder's `index.json`. Raises `MissingShardError` without one, `CorruptShardError` where it is not JSON."""
    return _read_index(os.path.join(offload_folder, INDEX_NAME))


def folder_index(folder: PathLike, index: Mapping[str, WeightInfo] | None = None) -> dict[str, TensorEntry]:
    """Where the bytes of each tensor lie that the folder's index names: a whole `.dat`, or a range of a shard.

    Reads the index (unless `index` is given in its place) and the headers of the shards it points into, no tensor.
    """
    shards = _Shards()
    named = read_offload_index(folder) if index is None else index
    return {name: shards.entry(name, info, folder) for name, info in named.items()}


class PrefixedDataset(Mapping[str, Any]):
    """The part of `dataset` whose names begin with `prefix`, under the names without it."""

    def __init__(self, dataset: Mapping[str, Any], prefix: str) -> None:
        self.dataset = dataset
        self.prefix = prefix

    def __getitem__(self, key: str) -> Any:
        return self.dataset[f"{self.prefix}{key}"]

    def __iter__(self) -> Iterator[str]:
        return (key[len(self.prefix) :] for key in self.dataset if key.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class OffloadedWeightsLoader(Mapping[str, torch.Tensor]):
    """Weights by name: those of `state_dict` as they are, the others read from disk each time they are asked for.

    `index` says where the ones on disk lie, and defaults to the `index.json` of `save_folder`. What is read goes to
    `device`, the CPU by default.
    """

    def __init__(
        self,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        save_folder: PathLike | None = None,
        index: Mapping[str, WeightInfo] | None = None,
        device: int | str | torch.device | None = None,
    ) -> None:
        if state_dict is None and save_folder is None and index is None:
            raise ValueError("no weights to load: give a `state_dict`, a `save_folder` or an `index`")
        if index is None and save_folder is not None:
            index = read_offload_index(save_folder)
        self.state_dict: Mapping[str, torch.Tensor] = {} if state_dict is None else state_dict
        self.index: Mapping[str, WeightInfo] = {} if index is None else index
        self.save_folder = save_folder
        self.device = device
        self.all_keys = list(dict.fromkeys([*self.state_dict, *self.index]))
        self._shards = _Shards()

    def __getitem__(self, key: str) -> torch.Tensor:
        if key in self.state_dict:
            return self.state_dict[key]
        info = self.index[key]
        tensor = read_tensor(self._shards.entry(key, info, self.save_folder or ""))
        dtype = torch_dtype(info["dtype"], key) if "dtype" in info else tensor.dtype
        return tensor.to(device="cpu" if self.device is None else self.device, dtype=dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.all_keys)

    def __len__(self) -> int:
        return len(self.all_keys)


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """The tensor that `entry` describes, read into memory of its own."""
    buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
    try:
        with open(entry.file, "rb") as file:
            file.seek(entry.offset)
            count = file.readinto(buffer.numpy().data)
    except FileNotFoundError:
        raise missing_shard(entry.file) from None
    if count != entry.nbytes:
        raise CorruptShardError(
            f"tensor {entry.name!r} needs {entry.nbytes} bytes from offset {entry.offset} of {entry.file}, "
            f"which ends after {count} of them. {OFFLOAD_AGAIN}"
        )
    return buffer.view(torch_dtype(entry.dtype, entry.name)).reshape(entry.shape)


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name of a dtype, without the "torch."."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str, tensor: str) -> torch.dtype:
    """The dtype of that name. Raises `DtypeError` naming `tensor` where torch has none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise DtypeError(f"tensor {tensor!r} has dtype {name!r}, which this version of torch does not know")
    return dtype


class _Shards:
    """Resolves entries of an offload index; the header of each safetensors file is read once."""

    def __init__(self) -> None:
        self._headers: dict[str, dict[str, TensorEntry]] = {}

    def entry(self, name: str, info: WeightInfo, folder: PathLike) -> TensorEntry:
        shard = info.get("safetensors_file") if isinstance(info, Mapping) else None
        if shard is None:
            return _checked_size(_dat_entry(name, weight_file(folder, name), info))
        header = self._header(os.fspath(shard))
        stored = info.get("weight_name", name)
        if stored not in header:
            raise CorruptShardError(f"tensor {stored!r} is not in {shard}, where the offload index says it is")
        return header[stored]

    def _header(self, shard: str) -> Mapping[str, TensorEntry]:
        if shard not in self._headers:
            self._headers[shard], _ = read_safetensors(shard)
        return self._headers[shard]


def _dat_entry(name: str, path: str, info: Any) -> TensorEntry:
    dtype, shape = (info.get("dtype"), info.get("shape")) if isinstance(info, Mapping) else (None, None)
    if not isinstance(dtype, str) or not _is_shape(shape):
        raise CorruptShardError(
            f"the offload index describes tensor {name!r} as {info!r}, without its dtype or shape. {OFFLOAD_AGAIN}"
        )
    if dtype not in DTYPE_BYTES:
        raise DtypeError(f"tensor {name!r} in {path} has dtype {dtype!r}; known are {', '.join(DTYPE_BYTES)}.")
    shape = tuple(shape)  # type: ignore[arg-type]
    return TensorEntry(name, path, 0, math.prod(shape) * DTYPE_BYTES[dtype], dtype, shape)


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, (list, tuple)) and all(isinstance(size, int) and size >= 0 for size in shape)


def _plain_bytes(weight: torch.Tensor, name: str) -> torch.Tensor:
    """The bytes of `weight` in row-major order, on the CPU, as uint8 of shape (nbytes,)."""
    if weight.is_meta:
        raise OffloadedWeightError(f"tensor {name!r} is on meta and has no bytes to offload: load it first")
    if is_traceable_wrapper_subclass(weight):
        raise QuantizedOffloadError(
            f"tensor {name!r} is a {type(weight).__name__}, made of other tensors: keep it on a device"
        )
    return weight.detach().cpu().resolve_conj().resolve_neg().reshape(-1).contiguous().view(torch.uint8)


def _checked_size(entry: TensorEntry) -> TensorEntry:
    """`entry`, whose `.dat` is there and has exactly its bytes."""
    try:
        size = os.stat(entry.file).st_size
    except FileNotFoundError:
        raise MissingShardError(f"tensor {entry.name!r} is not in {entry.file}. {OFFLOAD_AGAIN}") from None
    if size != entry.nbytes:
        raise CorruptShardError(
            f"{entry.file} has {size} bytes; the offload index gives tensor {entry.name!r} the shape "
            f"{list(entry.shape)} of {entry.dtype}, which takes {entry.nbytes}. {OFFLOAD_AGAIN}"
        )
    return entry


def _refused(name: str, path: str, nbytes: int, error: OSError) -> str:
    folder = os.path.dirname(path) or "."
    free = human_bytes(shutil.disk_usage(folder).free) if os.path.isdir(folder) else "no such folder"
    return (
        f"tensor {name!r} ({human_bytes(nbytes)}) could not be written to {path}: {error.strerror or error} "
        f"(free there: {free}). Choose another offload folder."
    )


def _read_index(path: str) -> dict[str, WeightInfo]:
    try:
        with open(path, encoding="utf-8") as file:
            index = json.load(file)
    except FileNotFoundError:
        raise MissingShardError(
            f"{path} does not exist: {os.path.dirname(path) or '.'} is no folder of offloaded weights"
        ) from None
    except ValueError as error:
        raise CorruptShardError(f"{path} is not readable as JSON: {error}. {OFFLOAD_AGAIN}") from error
    if not isinstance(index, dict):
        raise CorruptShardError(f"{path} is no map from weights to their dtype and shape. {OFFLOAD_AGAIN}")
    return index


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` once the block has ended well, and leaves no trace otherwise."""
    temporary = os.path.join(os.path.dirname(path), f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
