"""JSON whose parts agree: totals are sums, references exist, every record of a document has the same keys."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

from .words import ADJECTIVES, COLOURS, GOODS, PARTS, PLACES, QUANTITIES, SHIPS, STATES, code

# What follows from the rest stands last: a reader then has before them what it follows from.
DERIVED = "mass total_mass total_crates free alarm links count range length_sum final names".split()


def write(rng: Random) -> str:
    """Write one document; its indentation, naming and key order are its own and hold throughout."""
    record = rng.choice(SCHEMAS)(rng)
    styled = _restyle(record, rng.choice((str, _camel, _kebab)), f"{rng.random()}")
    layout = rng.choice((None, 1, 2, 2, 4))
    return json.dumps(styled, indent=layout) + "\n"


def _camel(key: str) -> str:
    first, *rest = key.split("_")
    return first + "".join(word.capitalize() for word in rest)


def _kebab(key: str) -> str:
    return key.replace("_", "-")


def _restyle(value: Any, rename: Callable[[str], str], salt: str) -> Any:
    """Rename keys, and order them by a rule that is the same in every record of the document."""
    if isinstance(value, list):
        return [_restyle(item, rename, salt) for item in value]
    if isinstance(value, dict):
        nested = (dict, list)
        keys = sorted(
            value, key=lambda key: (key in DERIVED, isinstance(value[key], nested), Random(salt + key).random())
        )
        return {rename(key): _restyle(value[key], rename, salt) for key in keys}
    return value


def shipment(rng: Random) -> dict[str, Any]:
    """A ship's manifest: lines with a mass each, and their total."""
    manifest, unit = code(rng), rng.choice(("kg", "t"))
    items = []
    for line, good in enumerate(rng.sample(GOODS, rng.randint(2, 6)), start=1):
        crates, each = rng.randint(1, 20), rng.randint(1, 12) * 5
        item = {"line": line, "manifest": manifest, "goods": good, "unit": unit}
        items.append(item | {"crates": crates, "crate_mass": each, "mass": crates * each})
    start, end = rng.sample(PLACES, 2)
    return {
        "manifest": manifest,
        "ship": rng.choice(SHIPS),
        "from": start,
        "to": end,
        "items": items,
        "total_crates": sum(item["crates"] for item in items),
        "total_mass": sum(item["mass"] for item in items),
    }


def readings(rng: Random) -> dict[str, Any]:
    """A sensor's log: equal steps in time, small steps in value, and the extremes."""
    sensor, step, minute = code(rng, 1, 3), rng.choice((1, 2, 5, 10, 15)), rng.randint(0, 30)
    value, values, rows, quantity = rng.randint(100, 900), [], [], rng.choice(QUANTITIES)
    for _ in range(rng.randint(4, 12)):
        rows.append({"sensor": sensor, "minute": minute, quantity: value, "ok": True})
        values.append(value)
        minute, value = minute + step, value + rng.randint(-3, 3)
    return {
        "sensor": sensor,
        "place": rng.choice(PLACES),
        "interval": step,
        "readings": rows,
        "count": len(rows),
        "range": {"lowest": min(values), "highest": max(values)},
    }


def stock(rng: Random) -> list[dict[str, Any]]:
    """A store's shelves, one record per part; what is free is what is there less what is reserved."""
    store, place, rows = code(rng, 1, 2), rng.choice(PLACES), []
    colour = rng.random() < 0.5
    for part in rng.sample(PARTS, rng.randint(3, 7)):
        count = rng.randint(5, 99)
        reserved = rng.randint(0, 5)
        row = {"store": store, "place": place, "part": f"{rng.choice(ADJECTIVES)} {part}", "in_stock": count}
        row |= {"reserved": reserved, "free": count - reserved}
        rows.append(row | ({"colour": rng.choice(COLOURS)} if colour else {}))
    return rows


def network(rng: Random) -> dict[str, Any]:
    """A line of stations: each pipe starts where the one before it ended."""
    stops, prefix = rng.sample(PLACES, rng.randint(3, 7)), rng.choice("PQRST")
    nodes = [{"id": f"{prefix}{i}", "name": stop, "state": rng.choice(STATES)} for i, stop in enumerate(stops)]
    lengths = [rng.randint(2, 60) for _ in stops[1:]]
    links = [
        {"start": f"{prefix}{i}", "end": f"{prefix}{i + 1}", "title": f"{stops[i]} to {stops[i + 1]}", "length": length}
        for i, length in enumerate(lengths)
    ]
    return {"nodes": nodes, "links": links, "count": len(nodes), "length_sum": sum(lengths)}


def events(rng: Random) -> dict[str, Any]:
    """A machine's history: each event starts from the state in which the one before it ended."""
    machine, request, state, second, rows = rng.choice(PARTS), code(rng), rng.choice(STATES), rng.randint(0, 20), []
    for index in range(rng.randint(3, 8)):
        following = rng.choice([other for other in STATES if other != state])
        rows.append({"event": index, "request": request, "machine": machine, "second": second})
        rows[-1] |= {"before": state, "after": following}
        state, second = following, second + rng.randint(1, 9)
    return {"request": request, "machine": machine, "events": rows, "count": len(rows), "final": state}


def settings(rng: Random) -> dict[str, Any]:
    """Limits per quantity; every alarm lies a tenth above its limit, and the list of names repeats the keys."""
    names = rng.sample(QUANTITIES, rng.randint(3, 6))
    owner, version = rng.choice(PARTS), f"{rng.randint(0, 3)}.{rng.randint(0, 9)}"
    limits = {}
    for name in names:
        limit = rng.randint(1, 90) * 10
        limits[name] = {"enabled": rng.random() < 0.7, "limit": limit, "alarm": limit + limit // 10, "of": owner}
    return {"device": owner, "version": version, "limits": limits, "names": sorted(names)}


SCHEMAS: tuple[Callable[[Random], Any], ...] = (shipment, readings, stock, network, events, settings)
