"""Uploading to a hub on this machine, and what the uploaded folder holds."""

import inspect
import json
import shutil
import socket

import huggingface_hub
import mlx_lm
import pytest
from huggingface_hub import HfApi
from huggingface_hub import constants as hub_constants
from quantizing import quantize
from upload_hub import UploadHub

from mlx_rotor.bundled import MODEL
from mlx_rotor.errors import RotorError
from mlx_rotor.quant import policy, upload
from mlx_rotor.quant.check import check

COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("upload") / "out"
    quantize(MODEL, out, policy.load("uniform-4bit"), fit="fast", shard_bytes=2_000_000)
    (out / "README.md").write_text("---\nlibrary_name: mlx\n---\n# card\n")
    (out / "notes.txt").write_text("not of the checkpoint")
    (out / "model-00001-of-00009.safetensors.tmp").write_bytes(b"left over")
    (out / ".mlx_rotor-job").mkdir()
    (out / ".mlx_rotor-job" / "journal").write_text("work")
    return out


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_XET", True)
    hub = UploadHub()
    yield hub
    hub.close()


def api_of(hub, token="hf_secret"):
    return HfApi(endpoint=hub.url, token=token)


def test_the_output_is_complete_and_stock_mlx_lm_loads_it(made):
    for name in COMPANIONS:
        assert (made / name).read_bytes() == (MODEL / name).read_bytes(), name
    assert check(made) == []
    model, tokenizer = mlx_lm.load(str(made))
    source = mlx_lm.utils.load_tokenizer(MODEL)
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat) == source.apply_chat_template(chat)
    assert tokenizer.eos_token_ids == set(json.loads((MODEL / "generation_config.json").read_text())["eos_token_id"])
    assert {m.bits for _, m in model.named_modules() if hasattr(m, "bits")} == {4}


def test_what_is_of_the_checkpoint_arrives_and_nothing_else(made, hub):
    address = upload.upload(made, "org/name", api=api_of(hub))
    assert address == f"{hub.url}/org/name" and hub.tokens == {"Bearer hf_secret"}
    got = hub.files["org/name"]
    assert {"config.json", "model.safetensors.index.json", "mlx_rotor.json", "README.md", *COMPANIONS} <= got.keys()
    assert sum(name.endswith(".safetensors") for name in got) > 1
    assert not got.keys() & {"notes.txt", "model-00001-of-00009.safetensors.tmp"} and not any("job" in n for n in got)
    for name, data in got.items():
        assert data == (made / name).read_bytes(), name
    assert "MB, by mlx_rotor" in hub.commits[0]


def test_uploading_again_is_no_error(made, hub):
    for _ in range(2):
        upload.upload(made, "org/name", api=api_of(hub))
    assert len(hub.commits) == 2


def test_a_folder_with_errors_is_refused_before_anything_is_sent(made, hub, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(made, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"]["policy"] = "uniform-4bit"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RotorError, match=r"is not uploaded: error \[foreign-key.*--check"):
        upload.upload(folder, "org/name", api=api_of(hub))
    assert hub.files == {}


@pytest.mark.parametrize("name", ["name", "a/b/c", "org/na me", "org/--", ""])
def test_a_wrong_name_is_an_error(name):
    with pytest.raises(RotorError, match="--upload-repo"):
        upload.reserve(name, api=HfApi(endpoint="http://127.0.0.1:1", token="hf_x"))


def test_no_token_is_an_error(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(RotorError, match="hf auth login"):
        upload.reserve("org/name", api=api_of(hub, token=None))
    assert hub.files == {} and hub.tokens == set()


@pytest.mark.parametrize(("status", "says"), [(401, "may not write"), (403, "may not write"), (404, "no such owner")])
def test_what_the_hub_refuses_is_said(status, says, hub):
    hub.refuse = status
    with pytest.raises(RotorError, match=f"org/name: .*{says}"):
        upload.reserve("org/name", api=api_of(hub))


def test_no_connection_is_an_error(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RotorError, match="can't be reached"):
        upload.reserve("org/name", api=HfApi(endpoint=f"http://127.0.0.1:{port}", token="hf_x"))


class Recording:
    """An HfApi of a version that has `upload_large_folder`; what it is called with must fit the library's own."""

    token = "hf_x"

    def __init__(self):
        self.calls = []

    def create_repo(self, **given):
        inspect.signature(HfApi.create_repo).bind(None, **given)
        return f"https://huggingface.co/{given['repo_id']}"

    def upload_folder(self, **given):
        inspect.signature(HfApi.upload_folder).bind(None, **given)
        self.calls.append(("upload_folder", given))

    def upload_large_folder(self, repo_id, folder_path, *, repo_type, allow_patterns=None):
        self.calls.append(("upload_large_folder", allow_patterns))


def test_large_folders_go_the_way_that_commits_in_parts(made, monkeypatch):
    api = Recording()
    upload.upload(made, "org/name", api=api)
    monkeypatch.setattr(upload, "LARGE", 1000)
    upload.upload(made, "org/name", api=api)
    assert [name for name, _ in api.calls] == ["upload_folder", "upload_large_folder"]
    assert api.calls[1][1] == api.calls[0][1]["allow_patterns"]
