"""The flags of `quantize`, and the recipe they make. `demo` and `benchmark` make recipes of their own."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .. import bundled
from ..cache import scheme
from ..errors import RotorError
from ..fit import FITS
from ..memory.sizes import parse_size, ram_size, token_count
from ..quant import policy as policies
from ..quant.spec import BUNDLED, FOLDINGS
from .arguments import Parser, parsed, positive

if TYPE_CHECKING:
    from ..memory.room import Room
    from ..quant.recipe import Recipe

BASELINES = ("config-i", "jang-k")


def parser() -> Parser:
    """All flags. Defaults stand in parentheses."""
    p = Parser(
        prog="mlx_rotor quantize",
        description="A checkpoint to MLX safetensors that stock mlx_lm loads: a policy or a size decides the bits, a"
        " fit chooses scales and codes, and a job that can be stopped at any time writes the files.",
    )
    p.add_argument(
        "--model", default=str(bundled.MODEL), help="checkpoint folder or Hugging Face repository (bundled model)"
    )
    p.add_argument("--out", type=Path, help="folder to make; needed unless --dry-run or --check")
    p.add_argument("--json", action="store_true", help='JSON lines, each with an "event"; the last is "result"')

    bits = p.add_argument_group("bits")
    bits.add_argument(
        "--policy", help=f"{', '.join(policies.shipped())}, or a TOML file (config-i; rotor where a size is given)"
    )
    bits.add_argument(
        "--target-size",
        type=parsed(parse_size),
        metavar="SIZE",
        help="solve for weight files of this size, e.g. 86GB",
    )
    bits.add_argument("--target-bpw", type=float, metavar="BITS", help="solve for this many bits a weight, e.g. 3.25")
    bits.add_argument(
        "--memory",
        type=parsed(ram_size),
        metavar="SIZE",
        help="a Mac's RAM, e.g. 128GB: solve for the bits that leave room for --context",
    )
    bits.add_argument(
        "--context",
        type=parsed(token_count),
        metavar="TOKENS",
        help="with --memory: tokens to have room for (32K)",
    )
    bits.add_argument("--kv", metavar="SCHEME", help=f"with --memory: KV scheme of that room ({scheme.DEFAULT})")
    bits.add_argument(
        "--wired-limit",
        type=parsed(parse_size),
        metavar="SIZE",
        help="with --memory: what sysctl iogpu.wired_limit_mb gives the GPU (macOS's default)",
    )
    bits.add_argument(
        "--sensitivities",
        type=Path,
        metavar="FILE",
        help="what bits are worth where, for a target: read from FILE, or measured with --calibration and written there"
        " (without: a prior)",
    )

    fit = p.add_argument_group("fit")
    fit.add_argument(
        "--fit",
        type=_fit,
        default="search",
        metavar="METHOD",
        help="fast (mx.quantize), search (least squares) or best (slower still) (search)",
    )
    fit.add_argument(
        "--calibration",
        nargs="?",
        const=BUNDLED,
        default="",
        metavar="FILE",
        help="fit to the inputs that weights meet on a text: .txt, or .jsonl of texts (without FILE: bundled)",
    )
    fit.add_argument(
        "--calibration-sequences", type=positive, metavar="N", help="pieces of the text (by the model's size)"
    )
    fit.add_argument(
        "--calibration-length", type=positive, metavar="TOKENS", help="length of each (by the model's size)"
    )
    fit.add_argument(
        "--imatrix", type=Path, metavar="FILE", help="llama.cpp's importance matrix (GGUF), for --calibration"
    )
    fit.add_argument(
        "--fold",
        type=_folds,
        default=(),
        metavar="WHAT",
        help=f"even out inputs, exactly: {', '.join(FOLDINGS)} (none)",
    )
    fit.add_argument(
        "--rescale-overflows", action="store_true", help="rescale, exactly, experts whose inputs overflow float16"
    )

    job = p.add_argument_group("job")
    job.add_argument("--resume", action="store_true", help="go on with a job that was stopped, given the same flags")
    job.add_argument("--workers", type=positive, metavar="N", help="threads (by the machine)")
    job.add_argument(
        "--stream-source", action="store_true", help="fetch a repository file by file, delete each after use"
    )
    job.add_argument(
        "--shard-size",
        type=parsed(parse_size),
        help="largest weight file, e.g. 4GB, 500MB (4GB)",
    )

    more = p.add_argument_group("before and after")
    more.add_argument("--dry-run", action="store_true", help="print the sizes; needs only config.json")
    more.add_argument(
        "--report", action="store_true", help="with --dry-run: other policies' sizes and errors beside it"
    )
    more.add_argument(
        "--check", type=Path, metavar="DIR", help="check any MLX checkpoint against its config.json, nothing else"
    )
    more.add_argument(
        "--card",
        action="store_true",
        help="measure the result against its source and write README.md; takes about as long as 16,384 tokens of prompt"
        " through every model in it, in float32",
    )
    more.add_argument(
        "--baseline",
        action="append",
        metavar="POLICY",
        help=f"in the card beside it, made the same way, or none ({', '.join(BASELINES)})",
    )
    more.add_argument("--text", action="append", metavar="NAME=FILE", help="texts of the card (bundled code and prose)")
    more.add_argument("--upload-repo", metavar="ORG/NAME", help="upload the result to the Hugging Face hub")
    return p


# What --dry-run has no use for; the rest it honours: --out and --resume by looking at the folder.
DOING = ("workers", "stream_source", "card", "baseline", "text", "upload_repo")


def check_mode(args: argparse.Namespace) -> None:
    """RotorError where a flag would do nothing in what is asked for, or contradicts it."""
    usual = vars(parser().parse_args([]))
    given = [name for name, value in vars(args).items() if value != usual[name]]

    def refuse(names: Iterable[str], why: str) -> None:
        if wrong := ", ".join(f"--{name.replace('_', '-')}" for name in given if name in names):
            raise RotorError(f"{why}: leave out {wrong}")

    if args.check is not None:
        refuse([name for name in given if name not in ("check", "json")], "--check only reads a folder that is there")
        return
    if args.dry_run:
        refuse(DOING, "--dry-run prints sizes and makes nothing")
        if args.resume and not args.out:
            raise RotorError("--resume goes on with the job in a folder: add --out DIR")
        return
    if args.report:
        raise RotorError("--report is a table of sizes: add --dry-run")
    if not args.out:
        raise RotorError("--out DIR says where to write; --dry-run only prints the sizes")
    if (args.baseline or args.text) and not args.card:
        raise RotorError("--baseline and --text are of the card: add --card")
    if "none" in (args.baseline or ()) and len(args.baseline) > 1:
        raise RotorError("--baseline none compares with nothing: leave it out, or the other --baseline")
    if args.card and args.stream_source:
        raise RotorError(
            "--card measures against the source, which --stream-source deletes: fetch it whole, or no card"
        )
    if args.stream_source and args.sensitivities and not args.sensitivities.exists():
        raise RotorError(
            "--sensitivities are measured on the whole source, which --stream-source never has: measure them without it"
            " first"
        )


def recipe(args: argparse.Namespace) -> tuple[Recipe, Room | None]:
    """The recipe that the flags ask for; and the room that `--memory 128GB` found, whose bytes are the recipe's budget.

    Raises:
        RotorError: flags that contradict each other or would do nothing.
    """
    from ..quant import request

    return request.recipe(
        args.model,
        args.policy,
        target_size=args.target_size,
        target_bpw=args.target_bpw,
        memory=args.memory,
        context=args.context,
        kv=args.kv,
        wired_limit=args.wired_limit,
        fit=args.fit,
        sensitivities=args.sensitivities,
        calibration=args.calibration,
        sequences=args.calibration_sequences,
        length=args.calibration_length,
        imatrix=args.imatrix,
        scale_folding=() if args.fold == ("none",) else args.fold,
        rescale=args.rescale_overflows,
        **({} if args.shard_size is None else {"shard_bytes": args.shard_size}),
    )


def _fit(text: str) -> str:
    if text in FITS:
        return text
    memory = f"; a Mac's memory is --memory {text} now" if text[:1].isdigit() else ""
    raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(FITS)}{memory}")


def _folds(text: str) -> tuple[str, ...]:
    names = FOLDINGS if text == "all" else tuple(text.split(","))
    if unknown := sorted(set(names) - {*FOLDINGS, "none"}):
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(FOLDINGS)}, all, none")
    return names
