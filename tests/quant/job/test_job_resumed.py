"""What a job leaves when it fails, what it goes on with, and what it refuses to go on with."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import replace

import pytest
from quantizing import quantize

from mlx_rotor.errors import RotorError
from mlx_rotor.quant.job import journal, manifest, run, stream
from mlx_rotor.quant.job.workplace import WORK
from mlx_rotor.quant.plan import make_plan, read_config
from mlx_rotor.quant.policy import load
from mlx_rotor.quant.shards import cut

POLICY = load("config-i")
OPTIONS = {"fit": "fast", "shard_bytes": 60_000, "workers": 1}


def files(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def stop_after(units, failure=None, action=None):
    """A progress callback that fails when so many units are done (or does something once)."""
    done = []

    def watch(event):
        if event.kind == "unit_done":
            done.append(event.name)
            if len(done) == units and action:
                action()
            if len(done) == units and failure:
                raise failure

    return watch


@pytest.fixture
def source(checkpoint):
    return checkpoint()[0]


@pytest.fixture
def whole(source, tmp_path):
    """Every file of a job that nothing stopped."""
    quantize(source, tmp_path / "whole", POLICY, **OPTIONS)
    return files(tmp_path / "whole")


@pytest.fixture
def unfinished(source, tmp_path):
    """A folder in which a job stopped with eight units done."""
    out = tmp_path / "out"
    with pytest.raises(
        RotorError, match=r"--out .*: stopped; what is finished is kept: .* --resume to go on, or delete"
    ):
        quantize(source, out, POLICY, progress=stop_after(8, OSError(errno.EIO, "stopped")), **OPTIONS)
    assert (out / WORK).is_dir() and not (out / "config.json").exists()
    return out


def resume(source, out, policy=POLICY, **changes):
    return quantize(source, out, policy, resume=True, **OPTIONS | changes)


def test_what_was_done_is_not_done_again(source, unfinished, whole):
    events = []
    result = resume(source, unfinished, progress=events.append, workers=3)
    assert result.resumed >= 7 and files(unfinished) == whole
    begun = [e.name for e in events if e.kind == "unit"]
    assert len(begun) == len(result.plan.entries) - result.resumed
    resumed = [e for e in events if e.kind == "resumed"][-1]
    assert resumed.units_done == result.resumed and 0 < resumed.done < resumed.total
    assert events[0].kind == "start" and events[-1].kind == "done"
    assert events[-1].done == events[-1].total and events[-1].units_done == events[-1].units


def test_a_failed_job_says_how_to_go_on_and_asks_for_it(source, unfinished):
    with pytest.raises(RotorError, match="holds an unfinished job; add --resume"):
        quantize(source, unfinished, POLICY, **OPTIONS)


def test_a_finished_folder_is_neither_overwritten_nor_resumed(source, tmp_path):
    out = tmp_path / "out"
    quantize(source, out, POLICY, **OPTIONS)
    before = files(out)
    for again in (False, True):
        with pytest.raises(RotorError, match="holds a checkpoint already"):
            quantize(source, out, POLICY, resume=again, **OPTIONS)
    assert files(out) == before


def test_resume_where_there_is_nothing_starts(source, tmp_path, whole):
    assert resume(source, tmp_path / "new").resumed == 0
    assert files(tmp_path / "new") == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fit": "search"}, "--fit was fast, is search"),
        ({"shard_bytes": 70_000}, "--shard-size was 60000, is 70000"),
        ({"policy": load("uniform-4bit")}, "the policy was config-i, is uniform-4bit; the plan .* has changed"),
    ],
)
def test_another_job_does_not_go_on_with_it(source, unfinished, change, message):
    before = files(unfinished)
    with pytest.raises(RotorError, match=f"holds another job's unfinished work: {message}") as caught:
        resume(source, unfinished, **change)
    assert "what is finished is kept" not in str(caught.value)
    assert files(unfinished) == before


def test_a_plan_with_other_specs_is_another_job(source, unfinished):
    config = read_config(source)
    plan = make_plan(config, POLICY)
    entries = list(plan.entries)
    at = next(i for i, e in enumerate(entries) if e.role == "attn.k")
    entries[at] = replace(entries[at], fit="search")
    with pytest.raises(RotorError, match=r"unfinished work: the plan \(bits and shapes of the tensors\) has changed"):
        resume(source, unfinished, policy=replace(plan, entries=tuple(entries)))


def test_other_versions_are_another_job(source, unfinished, monkeypatch):
    versions = manifest.versions()
    monkeypatch.setattr(manifest, "versions", lambda: versions | {"mlx": "0.1"})
    with pytest.raises(RotorError, match=rf"MLX's version was {versions['mlx']}, is 0\.1"):
        resume(source, unfinished)


def test_a_source_that_changed_between_runs_is_another_source(source, unfinished):
    shard = source / "model-00002-of-00002.safetensors"
    os.utime(shard, ns=(1, 1))
    with pytest.raises(RotorError, match=rf"the source has changed \({shard.name}\)"):
        resume(source, unfinished)


def test_a_plan_for_another_model_is_an_error(source, checkpoint, tmp_path):
    other, _ = checkpoint(name="other", num_hidden_layers=3)
    plan = make_plan(read_config(other), POLICY)
    with pytest.raises(RotorError, match=r"missing tensors: model\.layers\.2\."):
        quantize(source, tmp_path / "out", plan, **OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("cut", "lost"), [(1, 1), (20, 1), (10**6, 10**6)])
def test_a_torn_journal_counts_as_far_as_it_goes(source, unfinished, whole, cut, lost):
    path = unfinished / WORK / journal.NAME
    path.write_bytes(b"".join(line for line in path.read_bytes().splitlines(True) if b'"file"' not in line)[:-cut])
    units = path.read_bytes().count(b'"unit"')
    result = resume(source, unfinished)
    assert result.resumed == max(0, units - lost) and files(unfinished) == whole


def test_units_whose_bytes_are_not_what_the_journal_says_are_done_again(source, unfinished, whole):
    published = sorted(unfinished.glob("*.safetensors"))
    assert len(published) > 1
    with open(published[0], "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"wrong")
    published[1].unlink()
    notes = []
    result = resume(source, unfinished, progress=lambda e: notes.append(e.text) if e.kind == "note" else None)
    assert len(notes) == 1 and "not on disk as the journal says; done again" in notes[0]
    assert result.resumed < 8 and files(unfinished) == whole


def test_a_journal_cut_anywhere_holds_the_lines_before(tmp_path):
    path, units = tmp_path / "w" / journal.NAME, [journal.Unit(f"m{i}", "ab", 1, 0.1, 1 / 3, 4, 0.5) for i in range(3)]
    path.parent.mkdir()
    with_all = journal.Journal(path)
    with_all.begin({"fit": "fast"})
    with_all.add_units(units[:2])
    with_all.add_file("x.safetensors", "cd")
    with_all.add_units(units[2:])
    with_all.close()
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for size in sorted({*range(0, len(data), 9), *ends, *(end - 1 for end in ends)}):
        path.write_bytes(data[:size])
        whole = sum(end <= size for end in ends)
        assert journal.described(path) == ({"fit": "fast"} if whole else None)
        found = journal.Journal(path)
        assert (
            list(found.units.values()) == units[: min(2, whole - 1) if whole < 5 else 3] if whole else not found.units
        )
        assert found.files == ({"x.safetensors": "cd"} if whole > 3 else {})
        found.begin({"fit": "fast"})
        found.add_file("y", "ef")
        found.close()
        again = journal.Journal(path)
        assert again.files == found.files and again.units == found.units
        again.close()


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="names of open files")
def test_bytes_are_durable_before_the_journal_says_so_and_files_complete_before_they_have_their_names(
    source, tmp_path, monkeypatch
):
    done = []  # what happened, in order: ("unit", module), ("fsync", file), ("write", file, text), ("replace", to)

    def path(fd):
        return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))

    def watch(name, note):
        real = getattr(os, name)

        def call(*args, **options):
            result = real(*args, **options)
            done.append((name, *note(*args)))
            return result

        monkeypatch.setattr(os, name, call)

    watch("fsync", lambda fd: (path(fd),))
    watch("write", lambda fd, data: (path(fd), bytes(data).decode()))
    watch("replace", lambda a, b: (os.path.basename(b),))
    progress = lambda event: done.append(("unit", event.name)) if event.kind == "unit_done" else None  # noqa: E731
    result = quantize(source, tmp_path / "out", POLICY, progress=progress, **OPTIONS)
    lines = [(i, line) for i, what in enumerate(done) if what[0] == "write" for line in what[2].splitlines()]
    rows = [(i, json.loads(line)) for i, line in lines]
    files_of = {e.module: name for name, entries in cut(result.plan, 60_000).items() for e in entries}
    units = [(i, row["unit"]["module"]) for i, row in rows if "unit" in row]
    assert sorted(module for _, module in units) == sorted(entry.module for entry in result.plan.entries)
    for at, module in units:
        finished = done.index(("unit", module))
        assert ("fsync", f"{files_of[module]}.tmp") in done[finished:at], module
        assert ("fsync", journal.NAME) in done[at : at + 2]
    for name in result.files:
        line = next(i for i, row in rows if row.get("file") == name)
        assert line > max(at for at, module in units if files_of[module] == name)
        assert line < done.index(("replace", name))
    assert done.index(("replace", "config.json")) == max(i for i, what in enumerate(done) if what[0] == "replace")


def test_two_processes_do_not_share_a_job(source, unfinished):
    held = journal.Journal(unfinished / WORK / journal.NAME)
    before = files(unfinished)
    with pytest.raises(RotorError, match="another process is working on this job"):
        resume(source, unfinished)
    held.close()
    assert files(unfinished) == before


def test_an_interrupt_keeps_what_is_done_and_says_so(source, tmp_path, whole):
    out, notes = tmp_path / "out", []
    stop = stop_after(5, KeyboardInterrupt())

    def watch(event):
        notes.append(event.text)
        stop(event)

    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, POLICY, progress=watch, **OPTIONS)
    assert "--resume to go on" in notes[-1]
    assert resume(source, out).resumed >= 4 and files(out) == whole


@pytest.mark.parametrize("call", ["pwrite", "write", "ftruncate", "fsync"])
def test_a_full_disk_loses_nothing_that_was_done(source, tmp_path, whole, monkeypatch, call):
    out, real = tmp_path / "out", getattr(os, call)
    left = [0]

    def fail(*args):
        if left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    def fill():
        left[0] = 1

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(RotorError, match=f"--out {out}: No space left on device; what is finished is kept"):
        quantize(source, out, POLICY, progress=stop_after(20, action=fill), **OPTIONS)
    monkeypatch.setattr(os, call, real)
    assert resume(source, out).resumed > 5
    assert files(out) == whole


def test_a_disk_that_is_really_full(source, tmp_path, whole, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(map(len, whole.values()))
    if (
        not shutil.which("mount")
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size // 2}", "tmpfs", disk], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting needs root")
    try:
        with pytest.raises(RotorError, match="not enough disk for --out"):
            quantize(source, disk / "out", POLICY, **OPTIONS)
        usage = shutil.disk_usage(disk)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**12))
        with pytest.raises(RotorError, match=r"No space left on device; what is finished is kept"):
            quantize(source, disk / "out", POLICY, **OPTIONS)
        subprocess.run(["mount", "-o", f"remount,size={size * 3}", disk], check=True)
        assert resume(source, disk / "out").resumed > 0
        assert files(disk / "out") == whole
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(RotorError, match=r"--out .*second: Read-only file system; nothing was left behind"):
            quantize(source, disk / "second", POLICY, **OPTIONS)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("existing", [True, False])
def test_a_folder_that_cannot_be_written_is_an_error(source, tmp_path, monkeypatch, existing):
    out, real = tmp_path / "out", os.open
    if existing:
        out.mkdir()

    def refuse(path, flags, *args, **options):
        if flags & os.O_CREAT and str(path).startswith(str(out)):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(RotorError, match=r"--out .*: Read-only file system; nothing was left behind"):
        quantize(source, out, POLICY, **OPTIONS)
    assert out.exists() == existing and not (existing and list(out.iterdir()))


@pytest.mark.parametrize("how", ["touch", "truncate", "replace", "delete"])
def test_a_source_that_changes_underneath_stops_the_job(source, tmp_path, whole, how):
    shard, out = source / "model-00002-of-00002.safetensors", tmp_path / "out"
    data, times = shard.read_bytes(), shard.stat()

    def change():
        match how:
            case "touch":
                os.utime(shard, ns=(1, 1))
            case "truncate":
                os.truncate(shard, len(data) // 2)
            case "replace":
                (source / "new").write_bytes(data)
                os.utime(source / "new", ns=(times.st_atime_ns, times.st_mtime_ns))
                (source / "new").replace(shard)
            case "delete":
                shard.unlink()

    with pytest.raises(RotorError, match=rf"{shard.name}.*the job needs the source as it was at the start"):
        quantize(source, out, POLICY, progress=stop_after(16, action=change), **OPTIONS)
    assert not (out / "config.json").exists()
    shard.write_bytes(data)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert resume(source, out).resumed > 0
    assert files(out) == whole


def test_a_source_that_cannot_be_read_is_an_error(source, tmp_path, monkeypatch):
    real = os.pread

    def fail(fd, *args):
        if "source" in os.readlink(f"/proc/self/fd/{fd}") if os.path.exists("/proc/self/fd") else True:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, *args)

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(RotorError, match=r"model-0000\d-of-00002\.safetensors: Input/output error"):
        quantize(source, tmp_path / "out", POLICY, **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_the_number_of_workers_and_pieces_changes_no_byte(source, tmp_path, whole, monkeypatch):
    monkeypatch.setattr(stream, "PIECE", 1 << 13)
    quantize(source, tmp_path / "out", POLICY, **OPTIONS | {"workers": 4})
    made = files(tmp_path / "out")
    assert {n: d for n, d in made.items() if n != manifest.PROVENANCE} == {
        n: d for n, d in whole.items() if n != manifest.PROVENANCE
    }


def test_provenance_has_what_it_takes_to_check_the_files(source, tmp_path, whole):
    facts = json.loads(whole[manifest.PROVENANCE])
    assert set(facts["files"]) == set(whole) - {manifest.PROVENANCE, "config.json"}
    for name, row in facts["files"].items():
        assert row == {"bytes": len(whole[name]), "sha256": hashlib.sha256(whole[name]).hexdigest()}
    assert facts["fit"] == "fast" and facts["calibration"] is None
    assert set(facts["source_files"]["files"]) == {p.name for p in source.glob("*.safetensors")}
    assert sum(row["bytes"] for row in facts["plan"]) == facts["total_size"]
    assert 0 < facts["relative_error_measured_on"] < 1


def test_units_that_took_long_are_kept_before_their_layer_is_done(source, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "COMMIT_SECONDS", 0.0)
    lines = []

    def watch(event):
        if event.kind == "unit_done":
            lines.append((tmp_path / "out" / WORK / journal.NAME).read_text().count('"unit"'))

    quantize(source, tmp_path / "out", POLICY, progress=watch, **OPTIONS)
    assert lines == list(range(len(lines))) and len(lines) > 10
