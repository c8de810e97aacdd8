"""A model's repository, in a folder or on the Hub, as far as its config and the headers of its weights tell.

No weights are downloaded: of a safetensors file on the Hub the first 100 KB are asked for, which hold the header of
nearly every one. What a `.bin` file holds is only known once the file is there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_bigload.checkpoint.formats import SAFETENSORS_DTYPES
from hf_bigload.checkpoint.index import SAFETENSORS_SUFFIX, checkpoint_files, open_checkpoint
from hf_bigload.errors import CheckpointError, MissingShardError, RepositoryError
from hf_bigload.specs import TensorSpec

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

CONFIG_NAME = "config.json"
PIPELINE_NAME = "model_index.json"
"""In place of a config, where a repository holds a pipeline: its components, which are in folders of their own."""

_NO_MODEL = {
    "adapter_config.json": "it is an adapter: give the name of the model that it adapts",
}


@dataclass(frozen=True)
class Repository:
    """What is known of a model before its weights are there."""

    name: str
    """As it was asked for: a folder, or a name on the Hub."""
    folder: str
    """Where its config.json is on this machine."""
    config: Mapping[str, Any]
    stored: Mapping[str, TensorSpec] | None
    """Its tensors by their names in the files; None where no header tells."""
    file_bytes: int
    """Of all weights files."""
    download_bytes: int
    """Of those that are not on this machine."""
    is_pipeline: bool = False
    """Whether `config` names components, each in a folder of its own. Their tensors are not told."""


def open_repository(name: str | os.PathLike[str], revision: str | None = None) -> Repository:
    """The repository in the folder `name`, else the one of that name on the Hub.

    Where the Hub cannot be reached, what its cache on this machine has of the repository is used.

    Raises:
        RepositoryError: it does not exist, may not be read, cannot be reached, or holds no model.
        CheckpointError, DtypeError: its weights files are damaged; see `index.open_checkpoint`.
    """
    name = os.fspath(name)
    if os.path.isdir(os.path.expanduser(name)):
        return _in_folder(name, os.path.expanduser(name))
    if os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise RepositoryError(
            f"{name} is no folder. Give a folder with a {CONFIG_NAME}, or a name on the Hub (org/model)."
        )
    return _on_hub(name, revision)


# ---------------------------------------------------------------- in a folder


def _in_folder(name: str, folder: str) -> Repository:
    if _is_pipeline(os.listdir(folder)):
        paths = (os.path.join(path, file) for path, _, inside in os.walk(folder) for file in inside)
        return _pipeline(name, folder, {os.path.relpath(path, folder): os.path.getsize(path) for path in paths})
    _check_is_model(name, sorted(os.listdir(folder)))
    config = _read_config(folder)
    try:
        files = checkpoint_files(folder)
    except MissingShardError:
        raise
    except CheckpointError as error:
        raise RepositoryError(f"{name} has a {CONFIG_NAME} and no weights that can be told apart: {error}") from error
    index = open_checkpoint(folder)
    stored = {
        entry.name: TensorSpec(entry.name, entry.nbytes, entry.dtype, entry.shape) for entry in index.entries.values()
    }
    sizes = sum(os.path.getsize(file) for file in files)
    return Repository(name, folder, config, None if index.legacy_files else stored, sizes, 0)


def _read_config(folder: str, name: str = CONFIG_NAME) -> dict[str, Any]:
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except ValueError as error:
        raise RepositoryError(f"{path} is no JSON: {error}. Download it again.") from error
    if not isinstance(config, dict):
        raise RepositoryError(f"{path} holds no JSON object. Download it again.")
    return config


_PIPELINE_WEIGHTS = re.compile(r"(diffusion_pytorch_model|pytorch_model|model)(-\d+-of-\d+)?\.(safetensors|bin)")
"""What is loaded of a component where no variant is asked for."""


def _is_pipeline(files: Collection[str]) -> bool:
    return PIPELINE_NAME in files and CONFIG_NAME not in files


def _pipeline(name: str, folder: str, sizes: Mapping[str, int]) -> Repository:
    """The pipeline whose configs are in `folder`; `sizes` are bytes of all its files by path."""
    config = _read_config(folder, PIPELINE_NAME)
    components = [part for part, classes in config.items() if isinstance(classes, list) and classes[0] is not None]
    files = [path for part in components for path in _component_files(part, sizes)]
    missing = [path for path in files if not os.path.exists(os.path.join(folder, path))]
    total, missing_bytes = (sum(sizes[path] for path in each) for each in (files, missing))
    return Repository(name, folder, config, None, total, missing_bytes, is_pipeline=True)


def _component_files(component: str, sizes: Mapping[str, int]) -> list[str]:
    inside = [path for path in sizes if os.path.dirname(path) == component]
    weights = [path for path in inside if _PIPELINE_WEIGHTS.fullmatch(os.path.basename(path))]
    return [path for path in weights if path.endswith(SAFETENSORS_SUFFIX)] or weights


def _check_is_model(name: str, files: list[str]) -> None:
    if CONFIG_NAME in files:
        return
    reason = next((reason for file, reason in _NO_MODEL.items() if file in files), None)
    if reason is None:
        shown = ", ".join(files[:8]) or "no files"
        reason = f"it holds {shown}{', ...' if len(files) > 8 else ''}. Give the repository of a model"
    raise RepositoryError(f"{name} has no {CONFIG_NAME}, so it is no model that can be planned: {reason}.")


# ---------------------------------------------------------------- on the Hub


def _on_hub(name: str, revision: str | None) -> Repository:
    from huggingface_hub import errors

    where = f"{name} (revision {revision})" if revision else name
    try:
        return _ask_hub(name, revision)
    except errors.GatedRepoError as error:
        raise RepositoryError(
            f"{where} is gated: its owners ask you to accept their terms. Do so on its page, {_page(name)}, then log "
            "in with `hf auth login`, or set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise RepositoryError(f"{name} has no revision {revision!r}. Its branches are on {_page(name)}.") from error
    except errors.RepositoryNotFoundError as error:
        raise RepositoryError(
            f"There is no folder {name!r}, and no model {name!r} on the Hub that you may read. Check the name; for a "
            "private one, log in with `hf auth login`, or set HF_TOKEN."
        ) from error
    except errors.HFValidationError as error:
        raise RepositoryError(f"{name!r} is neither a folder nor a name on the Hub (org/model): {error}") from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        return _in_cache(name, revision, error)


def _page(name: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{name}"


def _ask_hub(name: str, revision: str | None) -> Repository:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    info = HfApi().model_info(name, revision=revision, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    if _is_pipeline(sizes):
        patterns = [PIPELINE_NAME, f"*/{CONFIG_NAME}"]
        return _pipeline(name, snapshot_download(name, revision=info.sha, allow_patterns=patterns), sizes)
    _check_is_model(name, sorted(sizes))
    # all from one commit, whatever is pushed meanwhile
    folder = os.path.dirname(hf_hub_download(name, CONFIG_NAME, revision=info.sha))
    stored, files = _headers(name, info)
    files = files or [file for file in sizes if file.startswith("pytorch_model") and file.endswith(".bin")]
    if not files:
        _refuse_weightless(name, sizes)
    missing = [file for file in files if not os.path.exists(os.path.join(folder, file))]
    total, missing_bytes = (sum(sizes.get(file, 0) for file in each) for each in (files, missing))
    return Repository(name, folder, _read_config(folder), stored, total, missing_bytes)


def _headers(name: str, info: ModelInfo) -> tuple[dict[str, TensorSpec] | None, list[str]]:
    """(tensors, files) of a repository with safetensors files; (None, []) for others."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    try:
        metadata = HfApi().get_safetensors_metadata(name, revision=info.sha)
    except NotASafetensorsRepoError:
        return None, []
    except SafetensorsParsingError as error:
        raise CheckpointError(f"{name}: the header of a weights file is damaged on the Hub: {error}") from error
    stored = {}
    for file in metadata.files_metadata.values():
        for tensor, said in file.tensors.items():
            begin, end = said.data_offsets
            dtype = SAFETENSORS_DTYPES.get(said.dtype, str(said.dtype))
            stored[tensor] = TensorSpec(tensor, end - begin, dtype, tuple(said.shape))
    return stored, sorted(metadata.files_metadata)


def _refuse_weightless(name: str, files: Mapping[str, int]) -> None:
    weights = [file for file in files if file.endswith((SAFETENSORS_SUFFIX, ".bin", ".gguf", ".msgpack", ".h5", ".ot"))]
    found = f"It holds {', '.join(weights[:8])}." if weights else "It holds no weights at all."
    raise RepositoryError(
        f"{name} has a {CONFIG_NAME}, but neither model.safetensors nor pytorch_model.bin (or shards of one). {found} "
        "Give a repository with one of them."
    )


def _in_cache(name: str, revision: str | None, error: Exception) -> Repository:
    """What was downloaded before, for when the Hub cannot be reached."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, revision=revision, local_files_only=True)
        return _in_folder(name, folder)
    except (LocalEntryNotFoundError, RepositoryError, CheckpointError) as incomplete:
        raise RepositoryError(
            f"There is no folder {name!r}, and the Hub at {constants.ENDPOINT} cannot be asked "
            f"({type(error).__name__}: {error}). The cache on this machine does not have its weights either "
            f"({constants.HF_HUB_CACHE}). Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a folder."
        ) from incomplete
