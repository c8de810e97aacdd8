"""Where each tensor's bytes lie in one weights file, read from what the file says of itself.

Only headers are read, never weights. What a header claims is checked against the file before anybody relies on it.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, TypeGuard

from hf_bigload.errors import CheckpointError, CorruptShardError, DtypeError, MissingShardError, human_bytes
from hf_bigload.specs import DTYPE_BYTES, TensorEntry

if TYPE_CHECKING:
    import torch

SAFETENSORS_DTYPES: Mapping[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
    "C64": "complex64",
}
"""Torch's name for each dtype code of a safetensors header."""

LENGTH_PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit: a longer header is a damaged length prefix, and must not be allocated."""

ZIP_MAGIC = b"PK\x03\x04"
# signature, ..., length of the name, length of the extra field; the member's data follows these two
ZIP_LOCAL_HEADER = struct.Struct("<4s22xHH")
PICKLE_MAGIC = b"\x80"
TAR_MAGIC, TAR_MAGIC_OFFSET = b"ustar", 257

DOWNLOAD_AGAIN = "Download the shard again."


def missing_shard(path: str) -> MissingShardError:
    """The error for a weights file that does not exist, naming it and its folder."""
    folder, name = os.path.split(os.path.abspath(path))
    return MissingShardError(f"{name} is not in {folder}. Download the shard again, or correct the path.")


# ---------------------------------------------------------------------------------------------------- safetensors


def read_safetensors(path: str) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors and the `__metadata__` of a safetensors file, from its header alone.

    Raises:
        MissingShardError: there is no such file.
        CorruptShardError: the header is unreadable, or contradicts itself or the file.
        DtypeError: a tensor has a dtype that torch tensors of whole bytes cannot hold.
    """
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        header, data_start = _read_header(path, file, size)
    metadata = _checked_metadata(path, header.pop("__metadata__", {}))
    entries = {name: _header_entry(path, name, said, data_start) for name, said in header.items()}
    _check_coverage(path, entries.values(), data_start, size)
    return entries, metadata


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise missing_shard(path) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def _read_header(path: str, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The parsed header and the position where the tensors' bytes begin."""
    prefix = file.read(LENGTH_PREFIX_BYTES)
    if len(prefix) < LENGTH_PREFIX_BYTES:
        raise CorruptShardError(
            f"{path} has {size} bytes; a safetensors file begins with {LENGTH_PREFIX_BYTES} bytes of header length. "
            f"{DOWNLOAD_AGAIN}"
        )
    length = int.from_bytes(prefix, "little")
    data_start = LENGTH_PREFIX_BYTES + length
    if length > MAX_HEADER_BYTES or data_start > size:
        raise CorruptShardError(
            f"{path} claims a header of {length} bytes; the file has {size} bytes, and a header at most "
            f"{MAX_HEADER_BYTES}. {_what_it_may_be(prefix)}"
        )
    return _parse_header(path, file.read(length)), data_start


def _parse_header(path: str, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CorruptShardError(f"{path} has an unreadable header: {error}. {DOWNLOAD_AGAIN}") from error
    if not isinstance(header, dict):
        raise CorruptShardError(f"{path} has a header that is no JSON object. {DOWNLOAD_AGAIN}")
    return header


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a name given twice would silently hide a tensor."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it describes {twice!r} twice")
    return found


def _checked_metadata(path: str, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptShardError(f"{path} has a __metadata__ that is no map from text to text. {DOWNLOAD_AGAIN}")
    return metadata


def _header_entry(path: str, name: str, said: Any, data_start: int) -> TensorEntry:
    """One tensor of a header, its description checked against itself."""
    if not isinstance(said, dict) or not isinstance(said.get("dtype"), str):
        raise CorruptShardError(f"{path} describes tensor {name!r} as {said!r}, without a dtype. {DOWNLOAD_AGAIN}")
    shape, offsets = said.get("shape"), said.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise CorruptShardError(
            f"{path} gives tensor {name!r} the shape {shape!r} and the data_offsets {offsets!r}: both must be lists "
            f"of whole numbers from 0 on, the second of two. {DOWNLOAD_AGAIN}"
        )
    dtype, (begin, end) = _torch_dtype(path, name, said["dtype"]), offsets
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != nbytes:
        raise CorruptShardError(
            f"{path} gives tensor {name!r} the bytes {begin} to {end}, which are {end - begin}; its shape {shape} of "
            f"{said['dtype']} takes {nbytes}. {DOWNLOAD_AGAIN}"
        )
    return TensorEntry(name, path, data_start + begin, nbytes, dtype, tuple(shape))


def _are_sizes(numbers: Any) -> TypeGuard[list[int]]:
    # type() and not isinstance(): JSON's `true` is an int to Python
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)


def _torch_dtype(path: str, name: str, code: str) -> str:
    try:
        return SAFETENSORS_DTYPES[code]
    except KeyError:
        # Not corruption: the format grows, and some codes pack several elements into a byte.
        raise DtypeError(
            f"{path} holds tensor {name!r} in dtype {code!r}, which is not supported; supported are "
            f"{', '.join(SAFETENSORS_DTYPES)}. Use a checkpoint of this model in another dtype."
        ) from None


def _check_coverage(path: str, entries: Iterable[TensorEntry], data_start: int, size: int) -> None:
    """The format wants every byte after the header to belong to exactly one tensor."""
    covered, before = data_start, "the header"
    ordered = sorted(entries, key=lambda entry: (entry.offset, entry.end))
    for entry in ordered:
        if entry.offset != covered:
            fault = "overlaps" if entry.offset < covered else f"leaves {entry.offset - covered} bytes unused after"
            raise CorruptShardError(
                f"{path}: tensor {entry.name!r} begins at byte {entry.offset} and {fault} {before!r}, which ends at "
                f"byte {covered}. {DOWNLOAD_AGAIN}"
            )
        covered, before = entry.end, entry.name
    if covered > size:
        first_cut = next(entry.name for entry in ordered if entry.end > size)
        raise CorruptShardError(
            f"{path} is cut off: the header describes a file of {covered} bytes ({human_bytes(covered)}), this one has "
            f"{size}. {covered - size} bytes are missing, from tensor {first_cut!r} on. {DOWNLOAD_AGAIN}"
        )
    if covered < size:
        raise CorruptShardError(
            f"{path} has {size} bytes, and the header describes only {covered}: {size - covered} bytes after tensor "
            f"{before!r} belong to none. {DOWNLOAD_AGAIN}"
        )


def _what_it_may_be(head: bytes) -> str:
    """What to do about a file that does not begin as weights do."""
    if b"version https://git-lfs".startswith(head[:8]) and head:
        return "It is a Git LFS pointer, not the weights: run `git lfs pull`, or download the shard again."
    if head.lstrip()[:1] == b"<":
        return "It is a web page, not the weights: download the shard again, logged in if the model is gated."
    return DOWNLOAD_AGAIN


# ---------------------------------------------------------------------------------------- torch.save's zip archives


def read_bin(path: str) -> dict[str, TensorEntry] | None:
    """The tensors of a file written by `torch.save`, or None where they cannot be read in place.

    None means that the file must be loaded whole: it has the format from before torch 1.6, compressed members, the
    other byte order, or tensors that are more than strided bytes (sparse, quantised, conjugate views, subclasses).
    Values that are not tensors are left out. The pickle is read with `weights_only`: no code of the file is run.

    An entry with a `stride` spans the bytes from its first to its last element; other tensors may lie in between.

    Raises:
        MissingShardError: there is no such file.
        CorruptShardError: the archive is truncated or contradicts itself.
        CheckpointError: reading it would run code, or it holds no state dict.
    """
    members = _stored_members(path)
    content = None if members is None else _load_on_meta(path)
    if members is None or content is None:
        return None
    entries = {}
    for name, value in content.items():
        if _is_tensor(value) and isinstance(name, str):
            entry = _bin_entry(path, name, value, members)
            if entry is None:
                return None
            entries[name] = entry
    return entries


def _stored_members(path: str) -> dict[int, int] | None:
    """Where the archive's members lie: first byte -> bytes; None where they are not the tensors' bytes as they are."""
    with _open(path) as file:
        if not _is_zip(path, file):
            return None
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
                orders = {archive.read(info) for info in infos if info.filename.endswith("/byteorder")}
            starts = [_member_start(file, info) for info in infos]
        except (zipfile.BadZipFile, struct.error, OSError, EOFError, ValueError, RuntimeError) as error:
            raise CorruptShardError(
                f"{path} is a zip archive that is cut off or damaged: {error}. {DOWNLOAD_AGAIN}"
            ) from error
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos) or orders - {sys.byteorder.encode()}:
        return None
    return {start: info.file_size for start, info in zip(starts, infos, strict=True)}


def _is_zip(path: str, file: BinaryIO) -> bool:
    """Whether this is a zip archive; False for the formats torch had before."""
    head = file.read(TAR_MAGIC_OFFSET + len(TAR_MAGIC))
    file.seek(0)
    if head.startswith(ZIP_MAGIC):
        return True
    if head.startswith(PICKLE_MAGIC) or head[TAR_MAGIC_OFFSET:] == TAR_MAGIC:
        return False
    raise CorruptShardError(f"{path} is no file that torch.save has written. {_what_it_may_be(head)}")


def _member_start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where a member's data begins: its directory entry only tells where its local header does."""
    file.seek(info.header_offset)
    signature, name_bytes, extra_bytes = ZIP_LOCAL_HEADER.unpack(file.read(ZIP_LOCAL_HEADER.size))
    if signature != ZIP_MAGIC:
        raise zipfile.BadZipFile(f"there is no member at byte {info.header_offset}")
    return info.header_offset + ZIP_LOCAL_HEADER.size + name_bytes + extra_bytes


def load_bin(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a file that `read_bin` cannot read in place, in memory.

    Raises:
        CorruptShardError, CheckpointError: see `read_bin`.
    """
    return {name: value for name, value in _load(path, "cpu").items() if isinstance(name, str) and _is_tensor(value)}


def _load_on_meta(path: str) -> Mapping[Any, Any] | None:
    """What the file holds, tensors without their bytes; None where torch has no such form of them."""
    try:
        return _load(path, "meta")
    except (NotImplementedError, AssertionError):  # the latter: offsets could not be inferred
        return None


def _load(path: str, device: str) -> Mapping[Any, Any]:
    import torch

    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (NotImplementedError, AssertionError):
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, error)) from error
    except Exception as error:  # a damaged pickle makes torch raise nearly anything
        raise CorruptShardError(f"{path} cannot be read by torch: {error}. {DOWNLOAD_AGAIN}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a state dict. Save the model's state_dict() instead."
        )
    return content


def _refusal(path: str, error: pickle.UnpicklingError) -> str:
    # torch wraps what stopped it in advice to run the file's code
    reason = str(error.__context__ or error).strip().partition("\n")[0]
    return (
        f"{path} was not loaded, because its pickle is damaged or would run code: {reason} If you trust the file, load "
        "it once with torch.load(..., weights_only=False) and save the tensors alone, best with "
        "safetensors.torch.save_file; or allow the class with torch.serialization.add_safe_globals."
    )


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _bin_entry(path: str, name: str, tensor: torch.Tensor, members: Mapping[int, int]) -> TensorEntry | None:
    """Where a tensor on meta lies in the archive; None where its values are not its bytes alone."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPE_BYTES or not _is_strided_bytes(tensor):
        return None
    itemsize = DTYPE_BYTES[dtype]
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    nbytes = _span(tensor.shape, tensor.stride()) * itemsize
    if start is None or (nbytes and start not in members):
        return None  # torch infers offsets as its own writer lays members out; this archive was packed by another
    offset = start + tensor.storage_offset() * itemsize
    if nbytes and offset + nbytes > start + members[start]:
        raise CorruptShardError(
            f"{path}: tensor {name!r} needs the bytes {offset} to {offset + nbytes}; its member of the archive ends "
            f"at byte {start + members[start]}. {DOWNLOAD_AGAIN}"
        )
    stride = None if tensor.is_contiguous() else tuple(tensor.stride())
    return TensorEntry(name, path, offset, nbytes, dtype, tuple(tensor.shape), stride)


def _is_strided_bytes(tensor: torch.Tensor) -> bool:
    import torch

    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    return plain and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())


def _span(shape: Iterable[int], stride: Iterable[int]) -> int:
    """Elements from the first to the last one of a strided tensor, both included."""
    sizes = list(shape)
    if 0 in sizes:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(sizes, stride, strict=True))
