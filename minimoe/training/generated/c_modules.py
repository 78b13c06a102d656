"""Small C modules: a struct and the functions on it, each field and name returning where C demands it."""

from random import Random

from .words import ADJECTIVES, PARTS, QUANTITIES, STATES

TYPES = ("int", "long", "double", "float", "size_t", "unsigned", "uint32_t", "int64_t")
ZERO = {"double": "0.0", "float": "0.0f"}
FORMATS = {
    "int": "%d",
    "long": "%ld",
    "double": "%g",
    "float": "%g",
    "size_t": "%zu",
    "unsigned": "%u",
    "uint32_t": "%u",
    "int64_t": "%lld",
}


class Module:
    """The names of one module and its style."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.name = rng.choice(PARTS) if rng.random() < 0.5 else f"{rng.choice(ADJECTIVES)}_{rng.choice(PARTS)}"
        self.tab = rng.choice(("    ", "    ", "  ", "\t"))
        self.brace = rng.choice((" {", "\n{"))
        self.self = rng.choice(("self", "s", "it", self.name[:2], "this_" + self.name.split("_")[-1]))
        self.struct = rng.choice((f"struct {self.name}", f"{self.name}_t"))
        self.fields = [(name, rng.choice(TYPES)) for name in rng.sample(QUANTITIES, rng.randint(2, 5))]
        self.states = rng.sample(STATES, rng.randint(2, 5))

    def function(self, result: str, verb: str, parameters: str, body: list[str]) -> str:
        """Format a definition; a body line carries one tab per level below the first."""
        inner = "".join(self.tab + line.replace("\t", self.tab) + "\n" for line in body)
        space = "" if result.endswith("*") else " "
        return f"{result}{space}{self.name}_{verb}({parameters}){self.brace}\n{inner}}}\n"


def write(rng: Random) -> str:
    """Write one module: includes, an enumeration perhaps, the struct, and some of its functions."""
    module = Module(rng)
    parts = [_includes(module)]
    if rng.random() < 0.6:
        parts += [_enumeration(module), _state_name(module)]
    parts.append(_struct(module))
    functions = (_initialise, _print, _equal, _accessors, _sum, _find, _clamp)
    parts += [function(module) for function in rng.sample(functions, rng.randint(2, 5))]
    return "\n".join(parts)


def _includes(module: Module) -> str:
    headers = ["stddef.h", "stdint.h", "stdio.h"]
    if module.rng.random() < 0.5:
        headers.insert(0, module.rng.choice(("assert.h", "errno.h", "limits.h", "math.h")))
    comment = f"/* {module.name}.c: {module.name.replace('_', ' ')}, with {', '.join(n for n, _ in module.fields)}. */"
    return "\n".join([comment, *(f"#include <{header}>" for header in headers), f'#include "{module.name}.h"', ""])


def _enumeration(module: Module) -> str:
    values = "".join(f"{module.tab}{_constant(module, state)},\n" for state in module.states)
    return f"enum {module.name}_state{module.brace}\n{values}}};\n"


def _constant(module: Module, state: str) -> str:
    return f"{module.name}_{state}".upper()


def _state_name(module: Module) -> str:
    cases = [f'case {_constant(module, state)}: return "{state}";' for state in module.states]
    body = ["switch (state) {", *cases, 'default: return "unknown";', "}"]
    return module.function("const char *", "state_name", f"enum {module.name}_state state", body)


def _struct(module: Module) -> str:
    fields = "".join(f"{module.tab}{kind} {name};\n" for name, kind in module.fields)
    if module.struct.startswith("struct"):
        return f"{module.struct}{module.brace}\n{fields}}};\n"
    return f"typedef struct{module.brace}\n{fields}}} {module.struct};\n"


def _initialise(module: Module) -> str:
    body = [f"{module.self}->{name} = {ZERO.get(kind, '0')};" for name, kind in module.fields]
    return module.function("void", "init", f"{module.struct} *{module.self}", body)


def _print(module: Module) -> str:
    cast = {"int64_t": "(long long)"}
    body = [
        f'fprintf(out, "{name} = {FORMATS[kind]}\\n", {cast.get(kind, "")}{module.self}->{name});'
        for name, kind in module.fields
    ]
    return module.function("void", "print", f"const {module.struct} *{module.self}, FILE *out", body)


def _equal(module: Module) -> str:
    tests = [f"a->{name} == b->{name}" for name, _ in module.fields]
    lines = [f"return {tests[0]}", *(f"\t&& {test}" for test in tests[1:])]
    lines[-1] += ";"
    return module.function("int", "equal", f"const {module.struct} *a, const {module.struct} *b", lines)


def _accessors(module: Module) -> str:
    name, kind = module.rng.choice(module.fields)
    body = [f"return {module.self}->{name};"]
    get = module.function(kind, f"get_{name}", f"const {module.struct} *{module.self}", body)
    body = [f"{kind} before = {module.self}->{name};", f"{module.self}->{name} = {name};", "return before;"]
    put = module.function(kind, f"set_{name}", f"{module.struct} *{module.self}, {kind} {name}", body)
    return get + "\n" + put


def _sum(module: Module) -> str:
    name, kind = module.rng.choice(module.fields)
    body = [
        f"{kind} total = {ZERO.get(kind, '0')};",
        "for (size_t i = 0; i < count; i++) {",
        f"\ttotal += {module.self}[i].{name};",
        "}",
        "return total;",
    ]
    return module.function(kind, f"sum_{name}", f"const {module.struct} *{module.self}, size_t count", body)


def _find(module: Module) -> str:
    name, kind = module.rng.choice(module.fields)
    body = [
        "for (size_t i = 0; i < count; i++) {",
        f"\tif ({module.self}[i].{name} == {name}) {{",
        f"\t\treturn &{module.self}[i];",
        "\t}",
        "}",
        "return NULL;",
    ]
    parameters = f"{module.struct} *{module.self}, size_t count, {kind} {name}"
    return module.function(f"{module.struct} *", f"find_{name}", parameters, body)


def _clamp(module: Module) -> str:
    name, kind = module.rng.choice(module.fields)
    limit = module.rng.randint(1, 99) * 10
    body = [
        f"if ({module.self}->{name} > {limit}) {{",
        f"\t{module.self}->{name} = {limit};",
        f"\treturn {limit};",
        "}",
        f"return {module.self}->{name};",
    ]
    return module.function(kind, f"clamp_{name}", f"{module.struct} *{module.self}", body)
