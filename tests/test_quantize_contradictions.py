"""`mlx_rotor quantize`: flags that contradict each other or would do nothing are one line, before any work."""

import importlib

import pytest

from mlx_rotor.cli import command

quantize = importlib.import_module("mlx_rotor.quantize")  # the command; the package has a function of that name

RUN, DRY = ("--out", "{tmp}/out"), ("--dry-run",)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "--out DIR says where to write; --dry-run only prints the sizes"),
        ((*RUN, "--report"), "--report is a table of sizes: add --dry-run"),
        (
            ("--check", "x", "--out", "y", "--fit", "fast"),
            "--check only reads a folder that is there: leave out --out, --fit",
        ),
        ((*DRY, "--workers", "2"), "--dry-run prints sizes and makes nothing: leave out --workers"),
        ((*DRY, "--card", "--baseline", "none"), "leave out --card, --baseline"),
        ((*DRY, "--stream-source"), "leave out --stream-source"),
        ((*DRY, "--upload-repo", "a/b"), "leave out --upload-repo"),
        ((*DRY, "--resume"), "--resume goes on with the job in a folder: add --out DIR"),
        ((*DRY, "--target-size", "6MB", "--target-bpw", "4"), "each set the size: give one of them"),
        ((*DRY, "--target-size", "6MB", "--memory", "16GB"), "each set the size: give one of them"),
        ((*DRY, "--kv", "turbo3"), "go with a Mac's memory: add --memory 128GB"),
        ((*DRY, "--context", "64K", "--target-bpw", "4"), "go with a Mac's memory: add --memory 128GB"),
        ((*DRY, "--wired-limit", "8GB", "--fit", "fast"), "go with a Mac's memory: add --memory 128GB"),
        ((*DRY, "--wired-limit", "20GB", "--memory", "16GB"), "is more than the 17.18 GB of RAM"),
        ((*DRY, "--memory", "16GB", "--kv", "turbo99"), "turbo99"),
        ((*DRY, "--target-bpw", "0.5"), "0.5 bits a weight is not between 1 and 16"),
        ((*DRY, "--target-size", "1MB"), "1.000 MB is too small: policy rotor needs 4.307 MB"),
        ((*RUN, "--policy", "rotor-86"), "policy rotor-86 needs 4.307 MB"),
        ((*DRY, "--sensitivities", "x.json"), "--sensitivities choose bits for a size: give --target-size"),
        (
            (*DRY, "--target-bpw", "4", "--sensitivities", "{tmp}/x.json"),
            "no such file; with --calibration it is measured",
        ),
        (
            (*DRY, "--target-bpw", "4", "--sensitivities", "{tmp}/x.json", "--calibration"),
            "no such file yet, and --dry-run doesn't measure; leave it out",
        ),
        (
            (*RUN, "--target-bpw", "4", "--sensitivities", "{tmp}/no/x.json", "--calibration"),
            "no/x.json: can't be written; give a file where one can be",
        ),
        ((*RUN, "--fit", "fast", "--calibration"), "calibrate with --fit search or best"),
        ((*RUN, "--fit", "fast", "--imatrix", "x.gguf"), "calibrate with --fit search or best"),
        ((*RUN, "--fit", "fast", "--fold", "all"), "use --fit search or best"),
        ((*RUN, "--fold", "all"), "--fold goes by the inputs' sizes: give --calibration or --imatrix"),
        ((*RUN, "--rescale-overflows", "--imatrix", "x.gguf"), "goes by the largest inputs: give --calibration"),
        ((*RUN, "--calibration", "--imatrix", "x.gguf"), "give one of them"),
        ((*RUN, "--calibration-length", "64"), "say how much a fit is calibrated on: give --calibration"),
        ((*RUN, "--baseline", "jang-k"), "are of the card: add --card"),
        ((*RUN, "--text", "a=b"), "are of the card: add --card"),
        ((*RUN, "--card", "--baseline", "none", "--baseline", "jang-k"), "--baseline none compares with nothing"),
        ((*RUN, "--card", "--baseline", "nope"), "unknown policy 'nope'"),
        ((*RUN, "--card", "--baseline", "config-i"), "--baseline config-i: that is what is made"),
        ((*RUN, "--card", "--text", "a={tmp}/none.txt"), "none.txt: No such file or directory"),
        ((*RUN, "--card", "--text", "short={tmp}/short.txt"), "tokens, not enough for one of 512"),
        ((*RUN, "--card", "--stream-source"), "which --stream-source deletes"),
        ((*RUN, "--stream-source"), "is a local folder, which is kept"),
        (
            (*RUN, "--model", "{tmp}/nothing/here/at/all"),
            "--model takes a checkpoint folder or a Hugging Face repository",
        ),
        ((*RUN, "--model", "{tmp}/short.txt"), "is a file; --model takes a checkpoint folder"),
        ((*RUN, "--upload-repo", "no-owner"), "give owner and name, as ORG/NAME"),
        ((*RUN, "--upload-repo", "a/b c"), "no repository's name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_one_line_and_nothing_done(flags, says, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("Too short a text.")
    assert command.run(quantize.main, [flag.format(tmp=tmp_path) for flag in flags]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and says in printed.err and printed.err.count("\n") == 1
    assert printed.out == "" and [p.name for p in tmp_path.iterdir()] == ["short.txt"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--memory", "128"), "'128' has no unit: write 128GB"),
        (("--target-size", "86"), "'86' has no unit: write 86GB"),
        (("--shard-size", "10"), "'10' has no unit: write 10GB"),
        (("--wired-limit", "1.5"), "'1.5' has no unit"),
        (("--memory", "much"), "'much' is no amount of RAM such as 128GB"),
        (("--fit", "quick"), "'quick' is none of fast, search, best"),
        (("--fit", "128GB"), "a Mac's memory is --memory 128GB now"),
        (("--fold", "router"), "'router' is none of norms, downs, all, none"),
        (("--context", "long"), "'long' is no number of tokens such as 65536 or 64K"),
        (("--calibration-sequences", "0"), "'0' is no whole number from 1"),
        (("--calibration-length", "-1"), "'-1' is no whole number from 1"),
        (("--workers", "0"), "'0' is no whole number from 1"),
        (("--target-size", "big"), "'big' is not a size such as 86.2GB"),
    ],
)
def test_values_that_are_none(flags, says, capsys):
    with pytest.raises(SystemExit):
        quantize.parser().parse_args(flags)
    assert says in capsys.readouterr().err
