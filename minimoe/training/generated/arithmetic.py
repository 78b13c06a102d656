"""Arithmetic with every step written out; each document is a few tasks, each true."""

from collections.abc import Callable
from random import Random


def write(rng: Random) -> str:
    """Write one document: three to six tasks, most often of one kind."""
    kind = rng.choice(TASKS)
    tasks = [(kind if rng.random() < 0.7 else rng.choice(TASKS))(rng) for _ in range(rng.randint(3, 6))]
    return "\n\n".join(tasks) + "\n"


def number(rng: Random, max_digits: int) -> int:
    """Draw a positive number whose count of digits is uniform."""
    digits = rng.randint(1, max_digits)
    return rng.randint(10 ** (digits - 1), 10**digits - 1)


def addition(rng: Random) -> str:
    """Long addition, from the last digit to the first."""
    a, b = number(rng, 6), number(rng, 6)
    lines, carry, top, bottom = [f"add {a} + {b}"], 0, str(a)[::-1], str(b)[::-1]
    for i in range(max(len(top), len(bottom))):
        x, y = int(top[i : i + 1] or 0), int(bottom[i : i + 1] or 0)
        total = x + y + carry
        lines.append(f"{x} + {y} + {carry} = {total}: write {total % 10}, carry {total // 10}")
        carry = total // 10
    return "\n".join([*lines, f"{a} + {b} = {a + b}"])


def subtraction(rng: Random) -> str:
    """Long subtraction with borrowing."""
    a, b = sorted((number(rng, 6), number(rng, 6)), reverse=True)
    lines, borrow, bottom = [f"subtract {a} - {b}"], 0, str(b)[::-1]
    for i, digit in enumerate(str(a)[::-1]):
        x, y = int(digit), int(bottom[i : i + 1] or 0)
        difference = x - y - borrow
        shown = f"{x} - {y} - {borrow} = {difference}"
        borrow = int(difference < 0)
        lines.append(f"{shown}: write {difference % 10}, borrow {borrow}")
    return "\n".join([*lines, f"{a} - {b} = {a - b}"])


def multiplication(rng: Random) -> str:
    """Multiplication digit by digit: partial products, then their sum."""
    a, b = number(rng, 4), number(rng, 3)
    lines, total = [f"multiply {a} * {b}"], 0
    for power, digit in enumerate(str(b)[::-1]):
        product = a * int(digit) * 10**power
        lines.append(f"{a} * {int(digit) * 10**power} = {product}")
        if power:
            lines.append(f"{total} + {product} = {total + product}")
        total += product
    return "\n".join([*lines, f"{a} * {b} = {total}"])


def division(rng: Random) -> str:
    """Long division by a one-digit number, bringing digits down."""
    a, b = number(rng, 6), rng.randint(2, 9)
    lines, rest = [f"divide {a} / {b}"], 0
    for digit in str(a):
        rest = rest * 10 + int(digit)
        lines.append(f"{rest} / {b} = {rest // b} rest {rest % b}")
        rest %= b
    return "\n".join([*lines, f"{a} = {b} * {a // b} + {rest}"])


def equation(rng: Random) -> str:
    """A linear equation with a whole solution."""
    x, a, b, c = rng.randint(-20, 40), rng.randint(2, 12), rng.randint(1, 60), rng.randint(0, 1)
    name = rng.choice("xyzntk")
    left, right = a + c, b
    lines = [f"solve {left}{name} + {right} = {f'{name} + ' if c else ''}{a * x + b}"]
    if c:
        lines.append(f"take {name} from both sides: {a}{name} + {right} = {a * x + b}")
    lines.append(f"take {right} from both sides: {a}{name} = {a * x}")
    lines.append(f"divide by {a}: {name} = {x}")
    return "\n".join([*lines, f"check: {a} * {x} + {b} = {a * x} + {b} = {a * x + b}"])


def common_divisor(rng: Random) -> str:
    """Euclid's algorithm."""
    common = rng.randint(1, 30)
    a, b = sorted((common * rng.randint(2, 99), common * rng.randint(2, 99)), reverse=True)
    lines, x, y = [f"gcd of {a} and {b}"], a, b
    while y:
        lines.append(f"{x} = {x // y} * {y} + {x % y}")
        x, y = y, x % y
    return "\n".join([*lines, f"gcd({a}, {b}) = {x}"])


def running_total(rng: Random) -> str:
    """A sum of several terms, one at a time."""
    terms = [number(rng, 3) for _ in range(rng.randint(3, 7))]
    lines, total = [f"sum {' + '.join(map(str, terms))}"], terms[0]
    for term in terms[1:]:
        lines.append(f"{total} + {term} = {total + term}")
        total += term
    return "\n".join([*lines, f"{' + '.join(map(str, terms))} = {total}"])


def expression(rng: Random) -> str:
    """An expression in parentheses, worked from the inside out."""
    a, b, c, d = (rng.randint(1, 20) for _ in range(4))
    first, second = a + b, c + d
    return "\n".join(
        (
            f"evaluate ({a} + {b}) * ({c} + {d})",
            f"({a} + {b}) * ({c} + {d}) = {first} * ({c} + {d})",
            f"{first} * ({c} + {d}) = {first} * {second}",
            f"{first} * {second} = {first * second}",
        )
    )


def ordering(rng: Random) -> str:
    """Sorting by repeatedly taking the smallest number."""
    numbers = [number(rng, 3) for _ in range(rng.randint(4, 7))]
    lines, rest = [f"sort {' '.join(map(str, numbers))}"], list(numbers)
    while len(rest) > 1:
        smallest = min(rest)
        rest.remove(smallest)
        lines.append(f"smallest {smallest}, left {' '.join(map(str, rest))}")
    return "\n".join([*lines, f"sorted {' '.join(map(str, sorted(numbers)))}"])


TASKS: tuple[Callable[[Random], str], ...] = (
    addition,
    subtraction,
    multiplication,
    division,
    equation,
    common_divisor,
    running_total,
    expression,
    ordering,
)
