"""`python -m mlx_rotor.demo`: quantize the bundled model, run it through a compressed KV cache, show the cost."""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bundled import MODEL, held_out_text
from .cache import DEFAULT, EXACT, parse
from .cli.arguments import Parser, seed
from .cli.command import run
from .errors import RotorError
from .tables import size
from .tables import text as aligned

Say = Callable[..., None]
DEPTH = 0.3
MIN_PROMPT, MAX_PROMPT = 200, 6000


def _parser() -> Parser:
    p = Parser(
        prog="mlx_rotor demo",
        description="The main job on the bundled model: quantize it, generate through a compressed KV cache,"
        " and show what was saved and what it cost.",
    )
    p.add_argument("--policy", default="config-i", help="weight policy (config-i)")
    p.add_argument("--kv", default=DEFAULT, metavar="SCHEME", help=f"KV scheme ({DEFAULT})")
    p.add_argument("--prompt-tokens", type=int, default=1500, help="length of the prompt (1500)")
    p.add_argument("--max-tokens", "-m", type=int, default=60, help="tokens to generate (60)")
    p.add_argument("--out", type=Path, help="keep the quantized model in this new folder")
    p.add_argument("--seed", type=seed, default=0, help="of the code and the text around it (0)")
    p.add_argument("--skip-evaluate", action="store_true", help="leave out the third part, a minute of measuring")
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return p


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="mlx_rotor-") as temporary:
        yield Path(temporary) / "model"


@dataclass(frozen=True)
class _Story:
    """Python source with a code hidden in it, and a question about the code to ask after the text has gone on."""

    tokens: list[int]
    question: list[int]
    code: str


def _story(tokenizer: Any, length: int, seed: int) -> _Story:
    from .quality import needle

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    source = tokenizer.encode(held_out_text(), add_special_tokens=False, verbose=False)
    rng = random.Random(f"demo {seed}")
    name, code = rng.choice(needle.NAMES), needle.random_code(rng)
    hidden = encode(f"\n# {needle.fact(name, code)}\n")
    start, room = rng.randrange(len(source) - length), length - len(hidden)
    cut = start + round(DEPTH * room)
    asked = encode(f"\n\n# {needle.question(name)} The secret code for {name} is")
    return _Story(source[start:cut] + hidden + source[cut : start + room], asked, code)


def _tell(model: Any, tokenizer: Any, kv: str, story: _Story, max_tokens: int, show: bool) -> dict[str, Any]:
    """Continues the story through one KV scheme, asks the question through the same cache, returns the figures."""
    from .host import make_prompt_cache, verify
    from .host.generation import Stats, stream
    from .host.prompting import Prompt
    from .host.report import describe

    if kv != EXACT:
        verify(model, kv)
    caches = make_prompt_cache(model, kv)
    told, asked = Stats(kv, caches), Stats(kv, caches)
    say = print if show else (lambda *_, **__: None)
    say(f"\n--- KV {kv}: {describe(caches)}")
    say("..." + tokenizer.decode(story.tokens[-40:]), end="", flush=True)
    for text in stream(
        model, tokenizer, Prompt(story.tokens), told, progress=show, max_tokens=max_tokens, prompt_cache=caches
    ):
        say(text, end="", flush=True)
    figures = told.to_dict()
    for _ in stream(model, tokenizer, Prompt(story.question), asked, max_tokens=8, prompt_cache=caches):
        pass
    answer = asked.text.strip().split("\n")[0]
    say(f"{tokenizer.decode(story.question)} {answer}")
    return {**figures, "answer": answer, "code_found": answer == f"{story.code}."}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if not MIN_PROMPT <= args.prompt_tokens <= MAX_PROMPT:
        raise RotorError(f"--prompt-tokens must be between {MIN_PROMPT} and {MAX_PROMPT}")
    if args.max_tokens < 1:
        raise RotorError("--max-tokens must be 1 or more")
    if parse(args.kv) is None:
        raise RotorError(f"--kv {EXACT} compresses nothing: there is nothing to show")
    say: Say = (lambda *_: None) if args.json else print
    began = time.monotonic()
    with _folder(args.out) as out:
        found = _quantized(args, out, say) | _generated(args, out, say)
        found["evaluate"] = None if args.skip_evaluate else _evaluated(args, out, say)
        if args.out is not None:
            say(f"The quantized model is in {out}; stock mlx_lm runs it: mlx_lm.generate --model {out}")
        say(f"{time.monotonic() - began:.0f} s in all")
    if args.json:
        print(json.dumps(found))
    return 0


def _quantized(args: argparse.Namespace, out: Path, say: Say) -> dict[str, Any]:
    """The first part: the bundled model by the policy, into `out`. Returns its sizes in bytes."""
    from .cli.quantize_output import Bars
    from .quant import policy, quantize

    stored = sum(f.stat().st_size for f in MODEL.glob("*.safetensors"))
    say(f"1. Quantize the bundled MiniMax-M2 (FP8, {size(stored)}) with policy {args.policy}")
    with Bars() as bars:
        result = quantize(MODEL, out, policy.load(args.policy), progress=None if args.json else bars.event)
    plan = result.plan
    say(
        f"   {result.source_bytes / 1e6:.2f} MB -> {plan.nbytes / 1e6:.2f} MB, "
        f"{plan.bits_per_weight:.4f} bits a weight, {result.seconds:.1f} s"
    )
    sizes = {"source_bytes": result.source_bytes, "bytes": plan.nbytes, "bits_per_weight": plan.bits_per_weight}
    return {"policy": args.policy, **sizes}


def _generated(args: argparse.Namespace, out: Path, say: Say) -> dict[str, Any]:
    """The second part: one story through exact and through compressed KV. Returns the figures of both runs."""
    from .host import load

    say(f"\n2. Generate: {args.prompt_tokens} tokens of Python with a code hidden in them, then a question about it")
    model, tokenizer = load(out)
    story = _story(tokenizer, args.prompt_tokens, args.seed)
    runs = [_tell(model, tokenizer, kv, story, args.max_tokens, not args.json) for kv in (EXACT, args.kv)]
    rows = [
        [
            r["kv_scheme"],
            size(r["kv_bytes"]),
            size(r["kv_bytes_fp16"]),
            f"{r['prompt_tps']:.0f} tok/s",
            f"{r['generation_tps']:.0f} tok/s",
            "found" if r["code_found"] else "missed",
        ]
        for r in runs
    ]
    titles = ["KV", "held", "as fp16", "prompt", "generation", f"code {story.code}"]
    say(f"\n{aligned(titles, rows, left=(0, 5))}")
    if runs[0]["kv_bytes"] > 1.8 * runs[0]["kv_bytes_fp16"]:
        say("The CPU backend computes in float32: exact tokens take twice a Mac's bytes; a Mac's speed is another.")
    return {"runs": runs}


def _evaluated(args: argparse.Namespace, out: Path, say: Say) -> dict[str, Any]:
    """The third part: both models and both caches compared. Returns the report as data."""
    from .quality.compare import compare
    from .quality.sample import Size

    say("\n3. What it cost, on a small sample (`mlx_rotor evaluate` measures more)")
    sample = Size(4, 512, needles=3, lengths=(512,), depths=(0.1, 0.5, 0.9), chats=0)
    models = [f"FP8 source={MODEL}", f"{args.policy}={out}"]
    report = compare(models, [EXACT, args.kv], size=sample, progress=not args.json)
    say(report.markdown())
    return report.to_dict()


if __name__ == "__main__":
    sys.exit(run(main))
