"""What KV schemes cost on the bundled model, on a sample small enough for half a minute.

python examples/compare_schemes.py exact turbo4 turbo4v2 turbo2
"""

import sys

import mlx_rotor
from mlx_rotor.quality.sample import Size


def main(schemes: list[str]) -> None:
    size = Size(windows=2, window=320, needles=1, lengths=(320,), depths=(0.5,), chats=0)
    report = mlx_rotor.evaluate(kv=schemes, size=size, progress=True)
    for row in report.rows:
        kl = "reference" if row.divergence is None else f"{row.divergence.mean.value:.5f}"
        found = sum(t.right for t in row.needles.values())
        print(f"{row.kv:12} perplexity {row.perplexity.value:6.2f}   KL {kl:>9}   needles {found}/{size.needles}")
    print("\nThe same in tables:\n")
    print(report.markdown())


if __name__ == "__main__":
    main(sys.argv[1:] or ["exact", "turbo4", "turbo4v2"])
