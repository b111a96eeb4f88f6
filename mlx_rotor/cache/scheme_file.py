"""A calibrated scheme as a JSON file: the codecs of K and V for every compressed layer.

`scheme` makes one of fp8 from the largest K and V of each layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import codec
from ..codec.fp8 import LARGEST
from ..errors import RotorError
from ..files import write_text

FORMAT, VERSION = "mlx_rotor kv scheme", 1
MAX_LAYERS = 4096
_KEYS = {"format", "version", "name", "layers", "sinks", "ring", "model", "made"}


@dataclass(frozen=True)
class Sidecar:
    """Codecs layer by layer, as measured for one model.

    Attributes:
        name: what tables and reports call the scheme.
        layers: (codec of K, codec of V) of each compressed layer, in order; names may carry a parameter (`fp8:0.03`).
        sinks, ring: exact first and recent tokens; None leaves a scheme's defaults.
        model: fingerprint of the model it was measured on, "" if it has none.
        made: the measurement, for people: text, sizes, results. The program does not read it back.
    """

    name: str
    layers: tuple[tuple[str, str], ...]
    sinks: int | None = None
    ring: int | None = None
    model: str = ""
    made: Mapping[str, Any] | None = None


def whole_bits(name: str) -> int:
    """Bits an element without scales. Raises RotorError for a name, or a parameter in it, that no codec has."""
    if name.partition(":")[0] not in codec.names():
        raise RotorError(f"unknown codec {name!r}; codecs: {', '.join(codec.names())}")
    return int(codec.get(name, 128).bits)


def check(sidecar: Sidecar, where: str) -> Sidecar:
    """The sidecar, if its parts are possible. Raises RotorError with `where`, the layer and what is wrong."""
    if not sidecar.name or any(c in sidecar.name for c in "\n\r"):
        raise RotorError(f"{where}: its name is {sidecar.name!r}; a scheme needs one, on one line")
    if not 1 <= len(sidecar.layers) <= MAX_LAYERS:
        raise RotorError(f"{where}: {len(sidecar.layers)} layers; there must be 1 to {MAX_LAYERS}")
    for i, (k, v) in enumerate(sidecar.layers):
        try:
            narrower = whole_bits(k) < whole_bits(v)
        except RotorError as e:
            raise RotorError(f"{where}, layer {i}: {e}") from e
        if narrower:
            raise RotorError(f"{where}, layer {i}: k={k},v={v} gives K fewer bits than V; K never has fewer")
    for part in ("sinks", "ring"):
        value = getattr(sidecar, part)
        if value is not None and (type(value) is not int or value < 0):
            raise RotorError(f"{where}: its {part} is {value!r}; it must be a whole number from 0")
    return sidecar


def read(path: str | Path) -> Sidecar:
    """The sidecar in the file `path`.

    Raises:
        RotorError: no such file, no JSON, another format or version, unknown fields, impossible codecs, K below V.
    """
    try:
        data = json.loads(Path(path).read_text("utf-8"))
    except OSError as e:
        raise RotorError(f"{path}: {e.strerror}") from e
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise RotorError(f"{path}: not a JSON file ({e})") from e
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise RotorError(f"{path}: no KV scheme (its format is not {FORMAT!r}); make one with mlx_rotor evaluate")
    if data.get("version") != VERSION:
        raise RotorError(f"{path}: version {data.get('version')!r}, this mlx_rotor reads {VERSION}; make it again")
    if unknown := sorted(set(data) - _KEYS):
        raise RotorError(f"{path}: unknown fields {', '.join(unknown)}; make it again with this version")
    name, model, made = data.get("name"), data.get("model", ""), data.get("made")
    if not isinstance(name, str) or not isinstance(model, str) or not isinstance(made, dict | None):
        raise RotorError(f"{path}: its name and model must be strings, made an object")
    layers = _layers(data.get("layers"), str(path))
    return check(Sidecar(name, layers, data.get("sinks"), data.get("ring"), model, made), str(path))


def _layers(given: Any, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(given, list):
        raise RotorError(f"{where}: its layers must be a list")
    for i, layer in enumerate(given):
        if not (
            isinstance(layer, dict) and set(layer) == {"k", "v"} and all(isinstance(c, str) for c in layer.values())
        ):
            raise RotorError(f'{where}, layer {i}: must be {{"k": codec, "v": codec}}, not {json.dumps(layer)[:80]}')
    return tuple((layer["k"], layer["v"]) for layer in given)


def text(sidecar: Sidecar, where: str = "") -> str:
    """The text of its file. Raises RotorError for an impossible sidecar, as `check`."""
    check(sidecar, where or sidecar.name)
    data: dict[str, Any] = {"format": FORMAT, "version": VERSION, "name": sidecar.name}
    data |= {part: value for part in ("sinks", "ring") if (value := getattr(sidecar, part)) is not None}
    data |= {"model": sidecar.model} if sidecar.model else {}
    data |= {"layers": [{"k": k, "v": v} for k, v in sidecar.layers]}
    data |= {"made": dict(sidecar.made)} if sidecar.made else {}
    return json.dumps(data, indent=1) + "\n"


def write(path: str | Path, sidecar: Sidecar) -> None:
    """Writes the file whole or not at all: what was there before stays until the new one is complete.

    Raises:
        RotorError: an impossible sidecar, or a place that can't be written.
    """
    write_text(Path(path), text(sidecar, str(path)))


# Other texts may have larger values than this one. fp8's error is relative: room costs nothing, and too little clips.
HEADROOM = 1.25


def scale(largest: float) -> float:
    """The layer scale for values up to `largest`, rounded to four figures; 1 where all values are 0."""
    return float(f"{largest * HEADROOM / LARGEST:.4g}") if largest else 1.0


def scheme(largest: Sequence[tuple[float, float]], made: Mapping[str, Any], model: str = "") -> Sidecar:
    """An fp8 scheme. `largest`: of |K| and |V| in each compressed layer, in order. `made`, `model`: as `Sidecar`."""
    layers = tuple((codec.with_parameter("fp8", scale(k)), codec.with_parameter("fp8", scale(v))) for k, v in largest)
    told = {**made, "headroom": HEADROOM, "largest": [list(pair) for pair in largest]}
    return Sidecar("fp8", layers, model=model, made=told)
