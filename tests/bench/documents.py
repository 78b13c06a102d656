"""A document's schema, probes that measure nothing, and a figure-free fresh process: what tests of whole runs share."""

SUMMARY = {
    "type": "object",
    "required": ["median", "low", "high"],
    "properties": {name: {"type": "number", "minimum": 0} for name in ("median", "low", "high")},
    "additionalProperties": False,
}
ABOUT = {
    "backend": {"enum": ["numpy", "numba", "cuda"]},
    "dtype": {"enum": ["float32", "float64", "bfloat16", "int8"]},
    "batch": {"type": "integer", "minimum": 1},
    "context": {"type": "integer", "minimum": 1},
    "layers": {"type": "integer", "minimum": 1},
    "experts": {"type": "integer", "minimum": 1},
    "parameters": {"type": "integer", "minimum": 1},
}
CHECK = {
    "against": {"type": "string"},
    "distance": {"type": "number"},
    "allowed": {"type": "number"},
    "right": {"type": "boolean"},
}
PEER = CHECK | {
    "experts": {"type": "string"},
    "seconds": SUMMARY,
    "spread": {"type": "number"},
    "peak_bytes": {"type": "integer", "minimum": 1},
    "ratio": SUMMARY,
}
RESULT = ABOUT | {
    "what": {"enum": ["prefill", "decode", "first-token", "train"]},
    "device": {"type": "string"},
    "tokens": {"type": "integer"},
    "tokens_per_second": {"type": "number"},
    "seconds": SUMMARY,
    "spread": {"type": "number"},
    "flops": {"type": "number"},
    "weight_bytes": {"type": "number"},
    "cache_bytes": {"type": "number"},
    "bandwidth": SUMMARY,
    "rate": SUMMARY,
    "roof": {"enum": ["memory", "arithmetic"]},
    "of_roof": SUMMARY,
    "check": {"oneOf": [{"type": "null"}, {"type": "object", "properties": CHECK, "required": list(CHECK)}]},
}
OP = ABOUT | {
    "what": {"enum": ["prefill", "decode"]},
    "bandwidth": {"type": "number"},
    "rate": {"type": "number"},
    "name": {"type": "string"},
    "calls": {"type": "integer"},
    "flops": {"type": "integer"},
    "bytes": {"type": "integer"},
    "seconds": {"type": "number"},
}
PROCESS = ABOUT | {
    "import_seconds": {"type": "number"},
    "model_seconds": {"type": "number"},
    "first_token_seconds": {"type": "number"},
    "peak_bytes": {"type": "integer", "minimum": 1},
}


def _list_of(properties, **optional):
    item = {
        "type": "object", "properties": properties | optional, "required": list(properties),
        "additionalProperties": False,
    }  # fmt: skip
    return {"type": "array", "items": item}


SCHEMA = {
    "type": "object",
    "required": ["format", "model", "rounds", "threads", "machine", "results", "processes", "ops", "warnings"],
    "properties": {
        "format": {"const": "minimoe bench 1"},
        "model": {"type": "string"},
        "rounds": {"type": "integer"},
        "layers": {"type": "integer"},
        "threads": {"type": "integer"},
        "command": {"type": "string"},
        "date": {"type": "string"},
        "peer_versions": {"type": "object"},
        "peer_rates": {"type": "object"},
        "peer_device": {"enum": ["cpu", "gpu"]},
        "machine": {
            "type": "object",
            "required": ["processor", "cores", "memory_bytes", "system", "python", "packages", "blas"],
        },
        "results": _list_of(
            RESULT, peer={"type": "object", "properties": PEER, "required": list(PEER), "additionalProperties": False}
        ),
        "processes": _list_of(PROCESS),
        "ops": _list_of(OP),
        "warnings": {"type": "array", "items": {"type": "string"}},
    },
    "additionalProperties": False,
}


class FixedProbe:
    """A machine that reads 10 GB/s and computes 200 GFLOP/s."""

    def bandwidth(self):
        return 10e9

    def rate(self, dtype):
        return 200e9


def fresh_process(source, backend, batch, context):
    return {"import_seconds": 0.1, "model_seconds": 0.2, "first_token_seconds": 0.3, "peak_bytes": 123_000_000}
