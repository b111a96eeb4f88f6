"""A scheme: the codec of K, the codec of V, and the tokens that stay exact."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .. import codec
from ..errors import RotorError
from . import scheme_file

DEFAULT = "trellis3"
EXACT = "exact"
_NAME = re.compile(r"(?P<family>[a-z]+)(?P<k>\d)(?:v(?P<v>\d))?")
_CODEC = re.compile(r"(?P<family>[a-z]+)(?P<bits>\d+)(?::.*)?")


def _check(name: str) -> str:
    if name.partition(":")[0] not in codec.names():
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
        sinks: first tokens kept exact, the sink tokens.
        ring: most recent tokens kept exact.
        protect_layers: layers at either end that get codecs one step up.
        centre: subtract the mean of K (256 tokens at a time) and of V before packing.
        layers: codecs (K, V) of every compressed layer, as calibrated; None: k, v and protect_layers say them.
        label: a calibrated scheme's name.
        model: fingerprint of the model it was calibrated for, "" for any.
    """

    k: str
    v: str
    sinks: int = 4
    ring: int = 128
    protect_layers: int = 2
    centre: bool = True
    layers: tuple[tuple[str, str], ...] | None = None
    label: str = ""
    model: str = ""

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
        if self.label:
            return self.label
        if self.k == self.v:
            return self.k
        if k and v and k["family"] == v["family"] and ":" not in self.k + self.v:
            return f"{self.k}v{v['bits']}"
        return f"k={self.k},v={self.v}"

    @property
    def block(self) -> int:
        """Tokens packed at a time in decoding: the ring runs between `ring` and `ring + block` tokens."""
        return max(1, min(32, self.ring // 4))

    def keeping(
        self,
        *,
        sinks: int | None = None,
        ring: int | None = None,
        protect_layers: int | None = None,
        centre: bool | None = None,
    ) -> Scheme:
        """This scheme with other exact parts; None leaves one as it is."""
        return replace(
            self,
            sinks=self.sinks if sinks is None else sinks,
            ring=self.ring if ring is None else ring,
            protect_layers=self.protect_layers if protect_layers is None else protect_layers,
            centre=self.centre if centre is None else centre,
        )

    def codecs(self, layer: int, layers: int) -> tuple[str, str]:
        """Names of (K, V) codecs of attention layer `layer` of `layers`, both counted among compressed layers.

        Raises:
            RotorError: the scheme was calibrated for another number of layers.
        """
        if self.layers is not None:
            if len(self.layers) != layers:
                raise RotorError(
                    f"{self.name} was calibrated for {len(self.layers)} layers, and this model has {layers} to compress"
                )
            return self.layers[layer]
        if min(layer, layers - 1 - layer) < self.protect_layers:
            return one_step_up(self.k), one_step_up(self.v)
        return self.k, self.v


def parse(
    text: str,
    *,
    sinks: int | None = None,
    ring: int | None = None,
    protect_layers: int | None = None,
    centre: bool | None = None,
) -> Scheme | None:
    """The scheme of a text: `turbo4`, `turbo4v2`, `k=turbo4,v=turbo2` or a calibration's `….json`; None for `exact`.

        parse("trellis4v3", sinks=0, ring=64)

    None keeps a part's default; `Scheme` says what the parts are.

    Raises:
        RotorError: a name no codec has, a scheme that gives K fewer bits than V, or a file that is no scheme.
    """
    text = text.strip()
    if text == EXACT:
        return None
    pairs = dict(re.findall(r"(?:^|,)\s*([kv])\s*=\s*([^,\s]+)", text))
    if text.endswith(".json"):
        if protect_layers:
            raise RotorError(f"{text} says every layer's codecs; leave out protected layers")
        scheme = _calibrated(text)
    elif pairs:
        if set(pairs) != {"k", "v"} or len(text.split(",")) != 2:
            raise RotorError(f"scheme {text!r} must name both sides once, as in k=turbo4,v=turbo2")
        scheme = Scheme(_check(pairs["k"]), _check(pairs["v"]))
    else:
        found = _NAME.fullmatch(text)
        known = codec.names()
        k = f"{found['family']}{found['k']}" if found else text
        v = f"{found['family']}{found['v']}" if found and found["v"] else k
        if k.partition(":")[0] not in known or v.partition(":")[0] not in known:
            raise RotorError(
                f"unknown KV scheme {text!r}; try {EXACT}, one of {', '.join(known)}, "
                "a mix such as turbo4v2, k=turbo4,v=iso3, or a calibration's .json file"
            )
        scheme = Scheme(k, v)
    return scheme.keeping(sinks=sinks, ring=ring, protect_layers=protect_layers, centre=centre)


def _calibrated(path: str) -> Scheme:
    found = scheme_file.read(path)
    scheme = Scheme(*found.layers[0], protect_layers=0, layers=found.layers, label=found.name, model=found.model)
    return scheme.keeping(sinks=found.sinks, ring=found.ring)
