"""From what a person names (a file, an index, a folder) to where every tensor lies. No weights are read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath

from hf_bigload.checkpoint.formats import missing_shard, read_bin, read_safetensors
from hf_bigload.errors import CheckpointChangedError, CheckpointError, MissingShardError
from hf_bigload.specs import CheckpointIndex, FileStamp, TensorEntry

SAFETENSORS_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".index.json"
WEIGHTS_NAMES = ("model.safetensors", "pytorch_model.bin")
"""The names a folder's single weights file usually has, the one to prefer first."""


def stamp(path: str) -> FileStamp:
    """What identifies the file at `path` now. Raises MissingShardError."""
    return _stamp(path, _status(path))


def check_stamp(expected: FileStamp, status: os.stat_result | None = None) -> None:
    """Refuse a file that is no longer the one that was indexed.

    `status` is that of the opened file where there is one; else the path is looked up.

    Raises:
        CheckpointChangedError: the file is gone, was replaced, or has another size or time of change.
    """
    try:
        found = _stamp(expected.path, status or _status(expected.path))
    except MissingShardError as error:
        raise CheckpointChangedError(f"{expected.path} was removed after it was indexed. Load again.") from error
    changes = [
        f"{what} was {getattr(expected, field)} and is {getattr(found, field)}"
        for field, what in (("size", "its size in bytes"), ("mtime_ns", "its time of change"), ("inode", "its inode"))
        if getattr(expected, field) != getattr(found, field)
    ]
    if changes:
        raise CheckpointChangedError(
            f"{expected.path} changed after it was indexed: {', '.join(changes)}. Nothing was read from it. Load again."
        )


def _status(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise missing_shard(path) from None


def _stamp(path: str, status: os.stat_result) -> FileStamp:
    return FileStamp(path, status.st_size, status.st_mtime_ns, status.st_ino)


def build_index(files: Sequence[str]) -> CheckpointIndex:
    """Index the tensors of some weights files; paths in it are absolute.

    A name in several files stands for the tensor of the last one, as when state dicts are merged by `dict.update`,
    which is what the libraries do.

    Raises:
        MissingShardError: a file does not exist.
        CorruptShardError, DtypeError, CheckpointError: see `formats.read_safetensors` and `formats.read_bin`.
    """
    entries: dict[str, TensorEntry] = {}
    stamps: dict[str, FileStamp] = {}
    metadata: dict[str, str] = {}
    legacy = []
    for path in map(os.path.abspath, files):
        stamps[path] = stamp(path)  # before the header is read: a file replaced in between no longer matches
        if path.endswith(SAFETENSORS_SUFFIX):
            found, said = read_safetensors(path)
            entries.update(found)
            metadata.update(said)
        elif (streamable := read_bin(path)) is not None:
            entries.update(streamable)
        else:
            legacy.append(path)
    return CheckpointIndex(entries, stamps, metadata, tuple(legacy))


def open_checkpoint(checkpoint: str | os.PathLike[str]) -> CheckpointIndex:
    """`build_index(checkpoint_files(checkpoint))`, and what an index file says checked against its shards.

    Raises:
        CheckpointError: an index file names a tensor that its shard does not hold.
    """
    source = _resolve(os.fspath(checkpoint))
    if not source.endswith(".json"):
        return build_index([source])
    shards = read_weight_map(source)
    index = build_index(_existing_shards(source, shards))
    _check_weight_map(source, shards, index)
    return index


def checkpoint_files(checkpoint: str | os.PathLike[str]) -> list[str]:
    """The weights files of a checkpoint: a weights file, an index (.json), or a folder that holds one of them.

    In a folder, `model.safetensors` comes before `pytorch_model.bin`, before the only `*.index.json`, before the only
    `*.safetensors`, before the only `*.bin`. Shards are in the order in which the index first names them.

    Raises:
        MissingShardError: the path, or a shard of the index, does not exist.
        CheckpointError: the folder holds no weights or several candidates; the index is unreadable, or names a file
            outside its folder.
    """
    source = _resolve(os.fspath(checkpoint))
    return _existing_shards(source, read_weight_map(source)) if source.endswith(".json") else [source]


def read_weight_map(index_file: str) -> dict[str, str]:
    """The weight map of an index file: tensor name -> name of its shard, relative to the index file's folder."""
    try:
        with open(index_file, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index_file} cannot be read as an index of shards: {error}.") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_file} has no weight_map, which tells the shard of each tensor.")
    check_stays_inside(index_file, weight_map)
    return weight_map


def check_stays_inside(index_file: str, weight_map: Mapping[str, object]) -> None:
    """Refuse an index that sends a reader out of its folder. Raises CheckpointError."""
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _stays_inside(shard):
            raise CheckpointError(
                f"{index_file} says that tensor {name!r} is in {shard!r}. A shard must be a file in the folder of its "
                "index: use an index from a source you trust."
            )


def _stays_inside(shard: str) -> bool:
    """Whether a shard's name stays in its folder. The name only: the Hub's cache links each file to its content."""
    posix, windows = PurePosixPath(shard), PureWindowsPath(shard)
    return bool(posix.name) and not windows.anchor and ".." not in posix.parts and ".." not in windows.parts


def _resolve(checkpoint: str) -> str:
    """The weights file or index file that `checkpoint` stands for."""
    if os.path.isdir(checkpoint):
        return _in_folder(checkpoint)
    if not os.path.exists(checkpoint):
        folder, name = os.path.split(os.path.abspath(checkpoint))
        raise MissingShardError(
            f"{name} is not in {folder}. Give a weights file, an index (.json) or a folder of them; download a model "
            "of the Hub first, with huggingface_hub.snapshot_download."
        )
    return checkpoint


def _in_folder(folder: str) -> str:
    names = sorted(name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name)))
    for name in WEIGHTS_NAMES:
        if name in names:
            return os.path.join(folder, name)
    for suffix in (INDEX_SUFFIX, SAFETENSORS_SUFFIX, ".bin"):
        candidates = [name for name in names if name.endswith(suffix)]
        if len(candidates) > 1:
            raise CheckpointError(
                f"{folder} holds several candidates: {', '.join(candidates)}. Name the one to load instead of the "
                "folder, or add the index of the shards."
            )
        if candidates:
            return os.path.join(folder, candidates[0])
    raise CheckpointError(
        f"{folder} holds no weights: no *{INDEX_SUFFIX}, no *{SAFETENSORS_SUFFIX}, no *.bin. It holds "
        f"{', '.join(names[:10]) or 'no files'}."
    )


def _existing_shards(index_file: str, weight_map: Mapping[str, str]) -> list[str]:
    folder = os.path.dirname(index_file)
    shards = list(dict.fromkeys(weight_map.values()))
    missing = [shard for shard in shards if not os.path.isfile(os.path.join(folder, shard))]
    if missing:
        raise MissingShardError(
            f"{len(missing)} of the {len(shards)} shards that {os.path.basename(index_file)} names are not in "
            f"{os.path.abspath(folder)}: {', '.join(missing)}. Download them again."
        )
    return [os.path.join(folder, shard) for shard in shards]


def _check_weight_map(index_file: str, weight_map: Mapping[str, str], index: CheckpointIndex) -> None:
    """Every tensor of the weight map must be there. A legacy shard tells its names only once it is loaded."""
    folder = os.path.dirname(os.path.abspath(index_file))
    for name, shard in weight_map.items():
        if name not in index and os.path.normpath(os.path.join(folder, shard)) not in index.legacy_files:
            raise CheckpointError(
                f"{index_file} says that tensor {name!r} is in {shard}, which does not hold it. The index and the "
                "shard are not of the same checkpoint: download both again."
            )
