"""A scheme: the codec of K, the codec of V, and what stays exact."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .. import codec
from ..errors import RotorError

DEFAULT = "turbo4v2"
EXACT = "exact"
_NAME = re.compile(r"(?P<family>[a-z]+)(?P<k>\d)(?:v(?P<v>\d))?")
_CODEC = re.compile(r"(?P<family>[a-z]+)(?P<bits>\d+)")


def _check(name: str) -> str:
    if name not in codec.names():
        raise RotorError(f"unknown codec {name!r}; codecs: {', '.join(codec.names())}")
    return name


def _bits(name: str) -> int:
    found = _CODEC.fullmatch(name)
    return int(found["bits"]) if found else 16


def one_step_up(name: str) -> str:
    """The same family's next wider codec, or `name` where there is none."""
    found = _CODEC.fullmatch(name)
    if not found:
        return name
    family = [c for c in codec.names() if (f := _CODEC.fullmatch(c)) and f["family"] == found["family"]]
    wider = [c for c in family if _bits(c) > _bits(name)]
    return min(wider, key=_bits) if wider else name


@dataclass(frozen=True)
class Scheme:
    """Codecs by name and the exact parts. `parse` builds one from what a user types.

    Attributes:
        k, v: codec names.
        sinks: first tokens kept exact.
        ring: most recent tokens kept exact.
        protect_layers: layers at either end that get codecs one step up.
    """

    k: str
    v: str
    sinks: int = 4
    ring: int = 128
    protect_layers: int = 2

    def __post_init__(self) -> None:
        _check(self.k)
        _check(self.v)
        for what in ("sinks", "ring", "protect_layers"):
            if getattr(self, what) < 0:
                raise RotorError(f"{what.replace('_', ' ')} must be 0 or more, not {getattr(self, what)}")
        if _bits(self.k) < _bits(self.v):
            raise RotorError(
                f"k={self.k},v={self.v} gives K fewer bits than V; the softmax magnifies errors of K, "
                f"so K never has fewer: try k={self.v},v={self.v}"
            )

    @property
    def name(self) -> str:
        """The short name where there is one (`turbo4v2`), else `k=…,v=…`."""
        k, v = _CODEC.fullmatch(self.k), _CODEC.fullmatch(self.v)
        if self.k == self.v:
            return self.k
        if k and v and k["family"] == v["family"]:
            return f"{self.k}v{v['bits']}"
        return f"k={self.k},v={self.v}"

    @property
    def block(self) -> int:
        """Tokens packed at a time in decoding: the ring runs between `ring` and `ring + block` tokens."""
        return max(1, min(32, self.ring // 4))

    def keeping(
        self, *, sinks: int | None = None, ring: int | None = None, protect_layers: int | None = None
    ) -> Scheme:
        """This scheme with other exact parts; None leaves one as it is."""
        return replace(
            self,
            sinks=self.sinks if sinks is None else sinks,
            ring=self.ring if ring is None else ring,
            protect_layers=self.protect_layers if protect_layers is None else protect_layers,
        )

    def codecs(self, layer: int, layers: int) -> tuple[str, str]:
        """Names of (K, V) codecs of attention layer `layer` of `layers`, both counted among compressed layers."""
        if min(layer, layers - 1 - layer) < self.protect_layers:
            return one_step_up(self.k), one_step_up(self.v)
        return self.k, self.v


def parse(
    text: str, *, sinks: int | None = None, ring: int | None = None, protect_layers: int | None = None
) -> Scheme | None:
    """`turbo4`, `turbo4v2` or `k=turbo4,v=turbo2` to a scheme; `exact` to None. None keeps a part's default.

    Raises:
        RotorError: a name no codec has, or a scheme that gives K fewer bits than V.
    """
    text = text.strip()
    if text == EXACT:
        return None
    pairs = dict(re.findall(r"(?:^|,)\s*([kv])\s*=\s*([^,\s]+)", text))
    if pairs:
        if set(pairs) != {"k", "v"} or len(text.split(",")) != 2:
            raise RotorError(f"scheme {text!r} must name both sides once, as in k=turbo4,v=turbo2")
        scheme = Scheme(_check(pairs["k"]), _check(pairs["v"]))
    else:
        found = _NAME.fullmatch(text)
        known = codec.names()
        k = f"{found['family']}{found['k']}" if found else text
        v = f"{found['family']}{found['v']}" if found and found["v"] else k
        if k not in known or v not in known:
            raise RotorError(
                f"unknown KV scheme {text!r}; try {EXACT}, one of {', '.join(known)}, "
                f"a mix such as {DEFAULT}, or k=turbo4,v=iso3"
            )
        scheme = Scheme(k, v)
    return scheme.keeping(sinks=sinks, ring=ring, protect_layers=protect_layers)
