"""Jobs whose source is fetched a shard at a time, from a hub on localhost."""

import shutil

import fake_hub
import huggingface_hub
import numpy as np
import pytest
from quantizing import quantize

from mlx_rotor.errors import RotorError
from mlx_rotor.quant import Recipe, dry_run
from mlx_rotor.quant.calibrate import Calibration
from mlx_rotor.quant.job import manifest
from mlx_rotor.quant.job.workplace import WORK
from mlx_rotor.quant.plan import read_config
from mlx_rotor.quant.policy import load
from mlx_rotor.quant.source import download

POLICY = load("config-i")
SHARDS = 6
OPTIONS = {"fit": "fast", "shard_bytes": 60_000, "workers": 2}


def files(out):
    found = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    found.pop(manifest.PROVENANCE, None)  # names the source
    return found


@pytest.fixture
def source(checkpoint):
    return checkpoint(shards=SHARDS)[0]


@pytest.fixture
def whole(source, tmp_path):
    quantize(source, tmp_path / "whole", POLICY, **OPTIONS)
    return files(tmp_path / "whole")


@pytest.fixture
def server(source, tmp_path, monkeypatch):
    found = fake_hub.FakeHub(source)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.url)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.file_download, "HF_HUB_CACHE", str(tmp_path / "cache"), raising=False)
    monkeypatch.setattr(download, "PAUSE", 0.01)
    yield found
    found.close()


def run(out, **options):
    return quantize("org/model", out, POLICY, stream_source=True, **OPTIONS | options)


def test_shards_come_one_at_a_time_and_go_after_use(server, source, tmp_path, whole):
    out, most, events = tmp_path / "out", [], []

    def watch(event):
        events.append(event)
        folder = out / WORK / "fetched"
        here = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        most.append(len(here))

    result = run(out, progress=watch)
    assert files(out) == whole and result.source_bytes == sum(i.nbytes for i in hub_tensors(source))
    assert 1 <= max(most) <= 4 < SHARDS
    for shard in source.glob("*.safetensors"):
        assert len(server.fetched(shard.name)) <= 3, "header, then the file once"
    assert sum(e.kind == "fetched" for e in events) == SHARDS
    assert (source / "model-00001-of-00006.safetensors").exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_calibrated_job_finds_all_it_needs(server, source, tmp_path):
    tokens = (np.arange(4 * 16).reshape(4, 16) * 7919 % 191).astype(np.int32)

    def guide(checkpoint, plan, work):
        return Calibration(read_config(checkpoint.folder), checkpoint, plan, tokens, work / "calibration")

    quantize(source, tmp_path / "local", POLICY, guide=guide, **OPTIONS | {"fit": "search"})
    run(tmp_path / "out", guide=guide, fit="search")
    assert files(tmp_path / "out") == files(tmp_path / "local")


def hub_tensors(source):
    from mlx_rotor.quant.safetensors_io import read_header

    return [info for path in source.glob("*.safetensors") for info in read_header(path).values()]


def test_the_plan_is_checked_before_a_shard_is_fetched(server, source, tmp_path):
    (source / "model-00003-of-00006.safetensors").write_bytes(b"no safetensors file at all")
    with pytest.raises(RotorError, match=r"model-00003-of-00006\.safetensors is not a safetensors file"):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("failure", [500, 503, ("drop", 700), ("short", 900), ("corrupt", 0)])
def test_a_failure_that_passes_is_not_noticed(server, tmp_path, whole, failure):
    name, left = "model-00004-of-00006.safetensors", [2]

    def fail(path, start):
        if path == name and len(server.fetched(name)) > 1 and left[0]:
            left[0] -= 1
            return failure
        return None

    server.fail = fail
    run(tmp_path / "out")
    assert files(tmp_path / "out") == whole and left[0] == 0
    if failure in (("drop", 700), ("short", 900)):
        assert any(start > 0 for start in server.fetched(name)), "went on where it stopped"


@pytest.mark.parametrize("failure", [500, ("drop", 0), ("short", 10)])
def test_a_failure_that_stays_is_an_error_and_the_job_goes_on_later(server, tmp_path, whole, failure):
    name, out = "model-00004-of-00006.safetensors", tmp_path / "out"
    server.fail = lambda path, start: failure if path == name and len(server.fetched(name)) > 1 else None
    with pytest.raises(RotorError, match=rf"org/model: {name} can't be fetched after 5 attempts: .*--resume"):
        run(out)
    server.fail = lambda path, start: None
    events = []
    result = run(out, resume=True, progress=events.append)
    assert result.resumed > 0 and files(out) == whole
    assert "model-00001-of-00006.safetensors" not in [e.name for e in events if e.kind == "fetched"], "that is done"


def test_a_download_that_was_cut_goes_on_where_it_stopped(server, source, tmp_path, whole):
    name, out = "model-00001-of-00006.safetensors", tmp_path / "out"
    server.fail = lambda path, start: (
        ("drop", 5000)
        if path == name and len(server.fetched(name)) == 2
        else (500 if path == name and len(server.fetched(name)) > 2 else None)
    )
    with pytest.raises(RotorError, match="can't be fetched"):
        run(out)
    part = out / WORK / "fetched" / f"{name}.part"
    assert 0 < part.stat().st_size <= 5000
    server.fail = lambda path, start: None
    size = part.stat().st_size
    run(out, resume=True)
    assert server.fetched(name)[-1] == size and files(out) == whole


def test_a_resumed_job_stays_at_its_commit(server, tmp_path, whole):
    name, out = "model-00005-of-00006.safetensors", tmp_path / "out"
    server.fail = lambda path, start: 500 if path == name and len(server.fetched(name)) > 1 else None
    with pytest.raises(RotorError, match="can't be fetched"):
        run(out)
    server.fail = lambda path, start: None
    server.commit = "f" * 40  # somebody pushed
    server.revisions.clear()
    run(out, resume=True)
    assert files(out) == whole and server.revisions == {fake_hub.COMMIT, "main"}  # main: the early look at config.json
    with pytest.raises(RotorError, match="checkpoint already"):
        run(out, resume=True)


def test_what_the_hub_refuses_is_not_asked_for_again(server, tmp_path):
    name = "model-00004-of-00006.safetensors"
    server.fail = lambda path, start: 403 if path == name else None
    with pytest.raises(RotorError, match=rf"org/model: {name} can't be fetched: .*403"):
        run(tmp_path / "out")
    assert len(server.fetched(name)) == 1 and not (tmp_path / "out").exists()


def test_a_connection_that_gets_on_may_break_as_often_as_it_likes(server, source, tmp_path, whole, monkeypatch):
    monkeypatch.setattr(download, "STEP", 4000)
    name = "model-00002-of-00006.safetensors"
    server.fail = lambda path, start: ("short", 5000) if path == name and len(server.fetched(name)) > 1 else None
    run(tmp_path / "out")
    size = (source / name).stat().st_size
    assert server.fetched(name)[1:] == list(range(0, size, 5000)) and len(server.fetched(name)) > download.ATTEMPTS + 2
    assert files(tmp_path / "out") == whole


def test_a_file_that_is_never_what_the_hub_says_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "STEP", 4000)
    name = "model-00002-of-00006.safetensors"
    server.fail = lambda path, start: ("corrupt", 0) if path == name and len(server.fetched(name)) > 1 else None
    with pytest.raises(RotorError, match="can't be fetched after 5 attempts: what came is not what the hub says"):
        run(tmp_path / "out")


def test_no_such_repository_and_no_server_are_errors(server, tmp_path):
    with pytest.raises(RotorError, match=r"org/other"):
        quantize("org/other", tmp_path / "out", POLICY, stream_source=True, **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_room_for_the_fetched_shards_is_checked(server, source, tmp_path, monkeypatch):
    plan, _ = dry_run(source, Recipe(POLICY))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=plan.nbytes + 60_000))
    with pytest.raises(RotorError, match="not enough disk"):
        run(tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=plan.nbytes * 3))
    run(tmp_path / "out")


def test_a_local_source_is_never_deleted(source, tmp_path):
    with pytest.raises(RotorError, match="--stream-source deletes what it has fetched"):
        quantize(source, tmp_path / "out", POLICY, stream_source=True, **OPTIONS)
