"""The README's figure, accuracy against size, drawn from methods.csv as a small SVG.

python tests/benchmarks/figure.py        # writes accuracy.svg beside this file
"""

import csv
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent
COLOURS = {
    "kfac": ("#d1495b", "kfac (this package)"),
    "drone": ("#00798c", "DRONE"),
    "fwsvd": ("#b07d12", "FWSVD"),
    "svd": ("#66717e", "SVD"),
}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 340, 60, 170, 40, 50
KEEPS = (0.5, 0.3, 0.2, 0.1)
LOWEST, HIGHEST = 0.45, 0.95


def main() -> None:
    (FOLDER / "accuracy.svg").write_text(drawn(), encoding="utf-8")


def drawn(task: str = "sst2") -> str:
    """Return the figure of a task."""
    with (FOLDER / "methods.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == task]
    found = {(r["method"], r["keep"], r["training"]): float(r["accuracy"]) for r in rows[::-1]}
    parts = [*frame(), *dense(found["dense", "1.0", "before"])]
    for method, (colour, label) in COLOURS.items():
        before = [(keep, found[method, str(keep), "before"]) for keep in KEEPS]
        after = [(keep, found[method, str(keep), "after"]) for keep in (0.3, 0.1)]
        parts += curve(before, colour)
        parts += curve(after, colour, hollow=True)
        parts.append(
            text(WIDTH - RIGHT + 18, 110 + 22 * list(COLOURS).index(method), label, colour)
        )
    x = WIDTH - RIGHT + 18
    parts += [text(x, 220, "● right after factoring"), text(x, 242, "○ one epoch later")]
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def at(keep: float, accuracy: float) -> tuple[float, float]:
    x = LEFT + (WIDTH - LEFT - RIGHT) * (0.55 - keep) / 0.5
    y = TOP + (HEIGHT - TOP - BOTTOM) * (HIGHEST - accuracy) / (HIGHEST - LOWEST)
    return round(x, 1), round(y, 1)


def frame() -> Iterable[str]:
    yield text(LEFT, 22, "MiniLM on SST-2: accuracy on the development set")
    for tenths in range(5, 10):
        y = at(0.5, tenths / 10)[1]
        yield f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#dde1e6"/>'
        yield text(LEFT - 30, y + 4, f".{tenths}")
    for keep in KEEPS:
        yield text(at(keep, 0)[0] - 6, HEIGHT - BOTTOM + 20, f"{keep:.1f}"[1:])
    yield text(LEFT + 50, HEIGHT - 10, "keep: parameters that remain of the encoder's layers")


def dense(accuracy: float) -> Iterable[str]:
    y = at(0.5, accuracy)[1]
    yield f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="black" stroke-dasharray="5 4"/>'
    yield text(WIDTH - RIGHT + 18, y + 4, "dense " + f"{accuracy:.3f}"[1:])


def curve(values: list[tuple[float, float]], colour: str, *, hollow: bool = False) -> Iterable[str]:
    points = [at(*value) for value in values]
    line = "L".join(f"{x} {y}" for x, y in points)
    dashes = ' stroke-dasharray="2 4"' if hollow else ""
    yield f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'
    fill = "white" if hollow else colour
    for x, y in points:
        yield f'<circle cx="{x}" cy="{y}" r="4" fill="{fill}" stroke="{colour}" stroke-width="2"/>'


def text(x: float, y: float, words: str, colour: str = "black") -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}">{words}</text>'


if __name__ == "__main__":
    main()
