"""Charts as SVG in text: curves over steps, marks in a plane, heat maps."""

import html
import math
from dataclasses import dataclass

COLOURS = ("#3366aa", "#cc6633", "#339966", "#aa3377", "#888833", "#222222", "#66aadd", "#dd99aa")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 560, 260, 56, 30, 30, 110
MOST = 400  # points of a curve, and
COLUMNS = 80  # columns of a heat map: more cannot be told apart


@dataclass(frozen=True)
class Curve:
    name: str
    points: list[tuple[float, float]]
    """(step, value), finite."""


def chart(title: str, curves: list[Curve], logarithmic: bool) -> str:
    """Curves over steps, in one frame; the scale of values may be logarithmic."""
    values = [scaled(value, logarithmic) for curve in curves for _, value in curve.points]
    steps = [step for curve in curves for step, _ in curve.points]
    x_of = axis(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    y_of = axis(min(values), max(values), HEIGHT - BOTTOM, TOP)
    body = [text(LEFT, 16, title)]
    for value in ticks(min(values), max(values)):
        shown = 10**value if logarithmic else value
        y = y_of(value)
        body.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        body.append(text(LEFT - 6, y + 4, f"{shown:.3g}", "end"))
    for step in dict.fromkeys([min(steps), max(steps)]):
        body.append(text(x_of(step), HEIGHT - 10, f"step {step:g}", "middle"))
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(
            f"{x_of(step):.1f},{y_of(scaled(value, logarithmic)):.1f}"
            for step, value in thinned(curve.points)
        )
        label = html.escape(curve.name)
        body.append(
            f'<polyline fill="none" stroke="{colour}" points="{points}"><title>{label}</title></polyline>'
        )
        y = TOP + 10 + 16 * number
        body.append(f'<rect x="{WIDTH - RIGHT + 10}" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
        body.append(text(WIDTH - RIGHT + 25, y, curve.name))
    return frame(WIDTH, max(HEIGHT, TOP + 20 + 16 * len(curves)), body)


@dataclass(frozen=True)
class Mark:
    x: float
    y: float
    label: str
    x_spread: float = 0.0
    y_spread: float = 0.0


@dataclass(frozen=True)
class Marked:
    name: str
    marks: list[Mark]
    """In the order in which a line joins them."""


def plane(title: str, x_name: str, y_name: str, curves: list[Marked]) -> str:
    """A file of its own: marks in a plane, with their spreads, joined by lines. Empty without marks."""
    curves = [curve for curve in curves if curve.marks]
    marks = [mark for curve in curves for mark in curve.marks]
    xs = [end for mark in marks for end in (mark.x - mark.x_spread, mark.x + mark.x_spread)]
    ys = [end for mark in marks for end in (mark.y - mark.y_spread, mark.y + mark.y_spread)]
    right, bottom = WIDTH - LEFT, HEIGHT + 60
    if not marks:
        xs = ys = [0.0]
    x_of = axis(min(xs), max(xs), LEFT + 10, right - 10)
    y_of = axis(min(ys), max(ys), bottom - 10, TOP + 10)
    whole, high = WIDTH + 2 * RIGHT, bottom + 50  # with room for the legend
    body = [text(LEFT, 16, title), text(right, 16, y_name, "end")]
    body.append(text((LEFT + right) / 2, bottom + 34, x_name, "middle"))
    for value in ticks(min(ys), max(ys)):
        line = f'x1="{LEFT}" x2="{right}" y1="{y_of(value):.1f}" y2="{y_of(value):.1f}"'
        body += [f'<line {line} stroke="#ddd"/>', text(LEFT - 6, y_of(value) + 4, f"{value:.4g}", "end")]
    for value in ticks(min(xs), max(xs)):
        body.append(text(x_of(value), bottom + 14, f"{value:.4g}", "middle"))
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(f"{x_of(mark.x):.1f},{y_of(mark.y):.1f}" for mark in curve.marks)
        body.append(f'<polyline fill="none" stroke="{colour}" points="{points}"/>')
        for mark in curve.marks:
            body += marked(mark, colour, x_of, y_of)
        y = TOP + 20 + 18 * number
        body.append(f'<rect x="{right + 8}" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
        body.append(text(right + 22, y, curve.name))
    return document(whole, high, body)


def marked(mark: Mark, colour: str, x_of, y_of) -> list[str]:
    """A dot, its spreads as a cross, and its label."""
    x, y = x_of(mark.x), y_of(mark.y)
    left, right = x_of(mark.x - mark.x_spread), x_of(mark.x + mark.x_spread)
    low, high = y_of(mark.y - mark.y_spread), y_of(mark.y + mark.y_spread)
    across = f'x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"'
    upright = f'x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"'
    lines = [f'<line {line} stroke="{colour}" opacity="0.5"/>' for line in (across, upright)]
    dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
    return [*lines, dot, text(x + 7, y - 5, mark.label)]


def heat_map(title: str, columns: list[tuple[int, dict[str, float]]]) -> str:
    """`columns`: (step, {sigma: value}). Steps that share a column are averaged; colours are logarithmic,
    from light (small) to dark."""
    sigmas = sorted({sigma for _, values in columns for sigma in values}, key=float, reverse=True)
    bins = min(COLUMNS, len(columns))
    cells = {}
    for place, (_, values) in enumerate(columns):
        for sigma, value in values.items():
            cells.setdefault((place * bins // len(columns), sigma), []).append(value)
    means = {key: sum(values) / len(values) for key, values in cells.items()}
    logs = [math.log10(mean) for mean in means.values() if 0 < mean < math.inf]
    low, high = (min(logs), max(logs)) if logs else (0.0, 0.0)
    side, height = (WIDTH - LEFT - 20) / bins, 16
    bottom = TOP + height * len(sigmas)
    body = [text(LEFT, 16, title)]
    for line, sigma in enumerate(sigmas):
        y = TOP + height * line
        body.append(text(LEFT - 6, y + 12, sigma, "end"))
        for column in range(bins):
            fill, said = "#eee", "not measured"
            if (column, sigma) in means:
                mean = means[column, sigma]
                fill, said = shade(mean, low, high), f"{mean:.3g}"
            x = LEFT + side * column
            where = f'x="{x:.1f}" y="{y}" width="{side + 0.3:.1f}" height="{height}"'
            body.append(f'<rect {where} fill="{fill}"><title>sigma {sigma}: {said}</title></rect>')
    first, last = columns[0][0], columns[-1][0]
    body.append(text(LEFT, bottom + 16, f"step {first}"))
    body.append(text(WIDTH - 20, bottom + 16, f"step {last}", "end"))
    if logs:
        body.append(text(WIDTH / 2, bottom + 16, f"{10**low:.2g} to {10**high:.2g}", "middle"))
    return frame(WIDTH, bottom + 26, body)


def grid(title: str, columns: list[str], rows: dict[str, list[float]]) -> str:
    """A file of its own: shares from 0 to 1, written into cells and shaded, the rows by name."""
    side, height = 56, 28
    whole, high = LEFT + 24 + side * len(columns) + 10, TOP + height * (len(rows) + 1)
    body = [text(10, 18, title)]
    for number, column in enumerate(columns):
        body.append(text(LEFT + 24 + side * (number + 0.5), high - 8, column, "middle"))
    for line, (name, shares) in enumerate(rows.items()):
        y = TOP + height * line
        body.append(text(LEFT + 18, y + 18, name, "end"))
        for number, share in enumerate(shares):
            x = LEFT + 24 + side * number
            light = 95 - 45 * min(max(share, 0.0), 1.0)
            place = f'x="{x}" y="{y}" width="{side - 2}" height="{height - 2}"'
            body.append(f'<rect {place} fill="hsl(215 60% {light:.0f}%)"/>')
            body.append(text(x + side / 2, y + 18, f"{share:.2f}", "middle"))
    return document(whole, high, body)


def shade(mean: float, low: float, high: float) -> str:
    """Light blue to dark blue by logarithm; black where it is no number, white for zero."""
    if not math.isfinite(mean):
        return "#000"
    if mean <= 0:
        return "#fff"
    place = 0.5
    if high > low:
        place = (math.log10(mean) - low) / (high - low)
    return f"hsl(215 {40 + 30 * place:.0f}% {93 - 68 * place:.0f}%)"


def scaled(value: float, logarithmic: bool) -> float:
    return math.log10(value) if logarithmic and value > 0 else value


def axis(low: float, high: float, start: float, end: float):
    """The map of [low, high] onto [start, end]; the middle where both are the same."""
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def ticks(low: float, high: float) -> list[float]:
    return [low + (high - low) * i / 4 for i in range(5)] if high > low else [low]


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Every so many of them, and the last."""
    stride = math.ceil(len(points) / MOST)
    return [*points[:-1:stride], *points[-1:]]


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'


def frame(width: float, height: float, body: list[str]) -> str:
    inside = "\n".join(body)
    return f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}">{inside}</svg>'


def document(width: float, height: float, body: list[str]) -> str:
    """A file of its own, on white."""
    inside = "\n".join([f'<rect width="{width}" height="{height}" fill="#fff"/>', *body])
    size = f'width="{width}" height="{height}" font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{inside}\n</svg>\n'
