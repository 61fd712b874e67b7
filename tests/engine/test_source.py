"""Resolving MODEL: what is refused, with which remedy, and what is downloaded."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from expertflow.engine import source
from expertflow.engine.source import model_class, resolve_model
from expertflow.hub_headers import http_client
from tests.families import write_checkpoint


def config_folder(folder: Path, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_is_itself(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "model", model_type="mixtral")
    assert resolve_model(folder) == resolve_model(str(folder)) == folder


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/no-such-folder", "a/b/c", "", "  "])
def test_paths_that_do_not_exist_never_ask_the_hub(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; give a folder"):
        resolve_model(name)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(ValueError, match="is a file; give the folder that holds it"):
        resolve_model(tmp_path / "model.gguf")


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="revision='v2' chooses a version of a hub model"):
        resolve_model(config_folder(tmp_path, model_type="mixtral"), "v2")


def test_a_gguf_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mixtral.Q4_K_M.gguf").write_text("")
    with pytest.raises(ValueError, match=r"GGUF weights, .* original safetensors checkpoint"):
        resolve_model(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        resolve_model(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[1]", "holds list")])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_damaged_config_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_moe"}')
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} {message}"):
        resolve_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "names no model_type"),
        (
            {"model_type": "perceptron9000"},
            "unknown architecture 'perceptron9000'; .*install -U transformers",
        ),
        (
            {"model_type": "newmoe", "auto_map": {"AutoModelForCausalLM": "modeling_newmoe.NewMoe"}},
            "exists only as Python code inside the checkpoint .* never runs such code",
        ),
        ({"model_type": "vit"}, "'vit' does not generate text"),
        (
            {"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8"}},
            r"is quantized \(FP8, .* use an unquantized \(bf16\) copy",
        ),
        (
            {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}},
            r"is quantized \(MXFP4",
        ),
        ({"model_type": "mixtral", "quantization_config": {"bits": 4}}, r"is quantized \(UNKNOWN"),
    ],
)
def test_configs_that_cannot_run_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        resolve_model(config_folder(tmp_path / "model", **config))
    assert str(tmp_path / "model") in str(caught.value)


def test_an_architecture_we_have_natively_needs_no_remote_code() -> None:
    config = {"model_type": "deepseek", "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.Deepseek"}}
    assert model_class(config, "here").__name__ == "AutoModelForCausalLM"
    assert model_class({"model_type": "switch_transformers"}, "here").__name__ == "AutoModelForSeq2SeqLM"


class FakeHub:
    """Stands in for the three functions of huggingface_hub that are used; records what is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, names: list[str] | None = None):
        self.folder = folder
        self.names = names if names is not None else [path.name for path in folder.iterdir()]
        self.list_error: Exception | None = None
        self.file_error: Exception | None = None
        self.asked: dict[str, Any] = {}
        monkeypatch.setattr(source, "HfApi", lambda: SimpleNamespace(model_info=self.model_info))
        monkeypatch.setattr(source, "hf_hub_download", self.hf_hub_download)
        monkeypatch.setattr(source, "snapshot_download", self.snapshot_download)

    def model_info(self, repo: str, revision: str | None = None) -> Any:
        if self.list_error is not None:
            raise self.list_error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.names])

    def hf_hub_download(self, repo: str, name: str, revision: str | None, local_files_only: bool) -> str:
        self.asked["local_files_only"] = local_files_only
        if self.file_error is not None:
            raise self.file_error
        return str(self.folder / name)

    def snapshot_download(self, repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked |= {"repo": repo, "revision": revision, "patterns": allow_patterns}
        return str(self.folder)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("mixtral", tmp_path_factory.mktemp("source") / "mixtral")


def test_a_hub_model_is_downloaded_at_its_revision(monkeypatch: pytest.MonkeyPatch, mixtral: Path) -> None:
    hub = FakeHub(monkeypatch, mixtral, [path.name for path in mixtral.iterdir()] + ["pytorch_model.bin"])
    assert resolve_model("owner/mixtral", "v2") == mixtral
    assert (hub.asked["repo"], hub.asked["revision"]) == ("owner/mixtral", "v2")
    wanted = {
        name
        for name in (
            "model.safetensors",
            "config.json",
            "tokenizer.json",
            "pytorch_model.bin",
            "modeling.py",
            "a.gguf",
        )
        if any(Path(name).match(pattern) for pattern in hub.asked["patterns"])
    }
    assert wanted == {"model.safetensors", "config.json", "tokenizer.json"}, (
        "neither twice the weights nor code"
    )


def test_bin_weights_are_downloaded_when_there_is_nothing_else(
    monkeypatch: pytest.MonkeyPatch, mixtral: Path
) -> None:
    hub = FakeHub(monkeypatch, mixtral, ["config.json", "pytorch_model-00001-of-00002.bin"])
    resolve_model("owner/mixtral")
    assert "pytorch_model-*.bin" in hub.asked["patterns"]


def test_a_dense_hub_model_is_refused_before_its_weights_are_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    size = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    hub = FakeHub(monkeypatch, config_folder(tmp_path, model_type="llama", vocab_size=16, **size))
    with pytest.raises(ValueError, match=r"owner/llama \('llama'\) has no experts .* dense model"):
        resolve_model("owner/llama")
    assert "patterns" not in hub.asked


def test_a_quantized_hub_model_is_refused_before_its_weights_are_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quantization = {"quant_method": "fp8"}
    hub = FakeHub(
        monkeypatch, config_folder(tmp_path, model_type="deepseek_v3", quantization_config=quantization)
    )
    with pytest.raises(ValueError, match="owner/big is quantized"):
        resolve_model("owner/big")
    assert "patterns" not in hub.asked


def response(status: int) -> Any:
    return http_client.Response(
        status, request=http_client.Request("GET", "https://huggingface.co/owner/model")
    )


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            GatedRepoError("gated", response=response(403)),
            ValueError,
            r"owner/model is gated: accept its terms at https?://\S+/owner/model, then `hf auth login`",
        ),
        (
            RepositoryNotFoundError("404", response=response(404)),
            FileNotFoundError,
            "owner/model is neither a folder nor a model on the hub",
        ),
    ],
)
def test_refusals_of_the_hub_have_a_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, kind: type[Exception], message: str
) -> None:
    for at in ("list_error", "file_error"):
        hub = FakeHub(monkeypatch, tmp_path)
        setattr(hub, at, error)
        with pytest.raises(kind, match=message):
            resolve_model("owner/model")


def test_an_unknown_revision_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    FakeHub(monkeypatch, tmp_path).list_error = RevisionNotFoundError("404", response=response(404))
    with pytest.raises(FileNotFoundError, match="owner/model has no revision 'v9'"):
        resolve_model("owner/model", "v9")


OFFLINE = [OfflineModeIsEnabled("offline"), http_client.ConnectError("no route"), ConnectionError("no route")]


@pytest.mark.parametrize("error", OFFLINE)
def test_offline_without_a_download_says_connect(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    hub = FakeHub(monkeypatch, tmp_path)
    hub.list_error, hub.file_error = error, LocalEntryNotFoundError("not cached")
    with pytest.raises(ConnectionError, match=r"owner/model .*connect \(and unset HF_HUB_OFFLINE .* folder"):
        resolve_model("owner/model")
    assert hub.asked["local_files_only"], "without network a download only retries"


@pytest.mark.parametrize("error", OFFLINE)
def test_offline_an_earlier_download_is_used(
    monkeypatch: pytest.MonkeyPatch, mixtral: Path, error: Exception
) -> None:
    FakeHub(monkeypatch, mixtral).list_error = error
    assert resolve_model("owner/mixtral") == mixtral


def test_a_gguf_repository_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = FakeHub(monkeypatch, tmp_path, ["mixtral.Q4_K_M.gguf", "README.md"])
    hub.file_error = RemoteEntryNotFoundError("404", response=response(404))
    with pytest.raises(ValueError, match="owner/model holds GGUF weights"):
        resolve_model("owner/model")


def test_names_that_no_hub_model_can_have() -> None:
    with pytest.raises(ValueError, match="neither a folder nor the id of a hub model"):
        resolve_model("owner/..model--x")
