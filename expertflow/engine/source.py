"""MODEL: a folder or a hub id becomes a local folder whose config expertflow can run, or a clear error.

Everything that can be refused is refused from config.json, before weights are downloaded. Code that comes
with a checkpoint is never run. Downloads are huggingface_hub's, into its cache, with its progress bars.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled

from expertflow.hub_headers import _clear_errors as clear_hub_errors
from expertflow.store.quantized import refuse_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SMALL_FILES = ("*.json", "tokenizer*", "*.model", "*.jinja", "*.txt", "*.tiktoken")
_SAFETENSORS = ("model.safetensors", "model-*.safetensors")
_BIN = ("pytorch_model.bin", "pytorch_model-*.bin")


def resolve_model(model: str | Path, revision: str | None = None) -> Path:
    """A folder with config, tokenizer and weights; downloads what the cache lacks.

    Raises FileNotFoundError, ConnectionError or ValueError with the remedy. The weights are not looked at:
    store/checkpoint.py does that when they are opened.
    """
    name = str(model)
    folder = Path(model).expanduser()
    if folder.is_dir() and name.strip():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} chooses a version of a hub model, and {folder} is a folder; leave it "
                f"out"
            )
        check_config(read_config(folder), str(folder))
        return folder
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give the folder that holds it")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise FileNotFoundError(
            f"{name or 'the empty name'} does not exist; give a folder that holds a checkpoint, or a hub id "
            f"such as Qwen/Qwen1.5-MoE-A2.7B"
        )
    return _download(name, revision)


def _download(repo: str, revision: str | None) -> Path:
    with clear_hub_errors(repo, revision):
        # The list comes first: a download retries for half a minute when there is no network.
        names = _file_names(repo, revision)
        offline = names is None
        try:
            config = Path(hf_hub_download(repo, "config.json", revision=revision, local_files_only=offline))
        except LocalEntryNotFoundError:
            raise _offline_error(repo, revision) from None
        except EntryNotFoundError:
            raise _no_config_error(repo, names or []) from None
        check_config(read_config(config.parent), repo)
        if names is None:  # whatever an earlier run has downloaded
            return config.parent
        check_has_experts(config.parent, repo)
        has_safetensors = any(Path(name).match(pattern) for name in names for pattern in _SAFETENSORS)
        weights = _SAFETENSORS if has_safetensors else _BIN
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[*_SMALL_FILES, *weights]))


def _file_names(repo: str, revision: str | None) -> list[str] | None:
    """None when the hub is switched off (HF_HUB_OFFLINE) or out of reach; then the cache must do."""
    try:
        siblings = HfApi().model_info(repo, revision=revision).siblings or []
        return [entry.rfilename for entry in siblings]
    except (OfflineModeIsEnabled, ConnectionError):
        return None
    except Exception as error:
        # The name of the HTTP client behind huggingface_hub, and so of its errors, differs between versions.
        if type(error).__name__ in ("ConnectError", "ConnectTimeout", "ReadTimeout"):
            return None
        raise


def _offline_error(repo: str, revision: str | None) -> ConnectionError:
    at = f"{repo} at {revision}" if revision else repo
    return ConnectionError(
        f"there is no folder {repo}, and as a hub model {at} is not in the local cache while the hub cannot "
        f"be "
        f"asked; connect (and unset HF_HUB_OFFLINE if it is set), or give the folder of a downloaded model"
    )


def _no_config_error(repo: str, names: list[str]) -> Exception:
    if any(name.endswith(".gguf") for name in names):
        return ValueError(_gguf(repo))
    return FileNotFoundError(
        f"{repo} has no config.json, so it is no transformers checkpoint; give the repository or folder of "
        f"the "
        f"original safetensors weights"
    )


def _gguf(where: str) -> str:
    return (
        f"{where} holds GGUF weights, which expertflow does not read; give the original safetensors "
        f"checkpoint "
        f"that they were made from"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder; generation_config.json is read for errors alone.

    A GGUF folder, which usually has none, is named as such.
    """
    path = folder / "config.json"
    if not path.exists():
        raise _no_config_error(str(folder), [entry.name for entry in folder.iterdir()])
    # transformers goes on without this one where it cannot be read: with other sampling, and no word of it.
    if (sampling := folder / "generation_config.json").exists():
        _json_object(sampling)
    return _json_object(path)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds {type(content).__name__}, not the settings of a model; download it again"
        )
    return content


def check_config(config: dict[str, Any], where: str) -> None:
    """ValueError, with the remedy, for what cannot run whatever the weights are."""
    refuse_quantized(config, where)
    model_type = config.get("model_type")
    if not model_type:
        raise ValueError(f"{where}: config.json names no model_type, so its architecture is unknown")
    model_class(config, where)


def model_class(config: dict[str, Any], where: str) -> Any:
    """The Auto class that loads this config: causal language model, or encoder-decoder."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    from expertflow.models.attach import register

    register()  # adds the architectures that transformers lacks
    model_type = config["model_type"]
    if model_type not in CONFIG_MAPPING:
        if config.get("auto_map"):
            raise ValueError(
                f"{where}: architecture {model_type!r} exists only as Python code inside the checkpoint "
                f"(auto_map), "
                f"and expertflow never runs such code; use a model whose architecture transformers has "
                f"itself, or "
                f"a newer transformers if it has it by now"
            )
        raise ValueError(
            f"{where}: unknown architecture {model_type!r}; if it is new, `pip install -U transformers` may "
            f"know it"
        )
    config_class = CONFIG_MAPPING[model_type]
    if config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if config_class in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return AutoModelForSeq2SeqLM
    raise ValueError(
        f"{where}: {model_type!r} does not generate text from text; expertflow runs causal language models "
        f"and "
        f"encoder-decoders"
    )


def check_has_experts(folder: Path, where: str) -> None:
    """ValueError for a dense model, found on a skeleton without weights, so before any is downloaded."""
    import torch
    from transformers import AutoConfig

    from expertflow.models.spans import find_moe_layers

    auto_class = model_class(read_config(folder), where)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        skeleton = auto_class.from_config(config)
    if not find_moe_layers(skeleton):
        raise ValueError(
            f"{where} ({config.model_type!r}) has no experts that expertflow knows: it is a dense model; run "
            f"it "
            f"with transformers or accelerate directly"
        )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's own. ValueError, naming the files to download, where there is none."""
    from transformers import AutoTokenizer

    reason = "none of its files is there"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # For some architectures transformers makes an empty tokenizer out of nothing.
        if any(
            (folder / name).exists() for name in ("tokenizer.json", *tokenizer.vocab_files_names.values())
        ):
            return tokenizer
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
    raise ValueError(
        f"{folder} has no tokenizer that can be loaded ({reason}); download tokenizer.json and "
        f"tokenizer_config.json of the model into it"
    )
