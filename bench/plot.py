"""Draw the figures of `bench/README.md` as SVG, this server beside its peers: `python -m bench.plot`.

What is drawn is read from that page's tables, and a test holds the drawings in `bench/figures` to them. An SVG follows
the reader's light or dark colours by itself, and needs no library to be made.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

PAGE = Path(__file__).parent / "README.md"
FOLDER = Path(__file__).parent / "figures"
OURS = "radixloop"
WIDTH, BAR_LEFT, BAR_WIDTH = 720, 150, 470
TOP, BAR_HEIGHT, BAR_STEP, GROUP_HEAD = 64, 14, 18, 26
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-size: 17px; font-weight: 600 } .note { fill: #59636e } .name { font-weight: 600 }
.peer { fill: #afb8c1 } .ours { fill: #0969da }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .note { fill: #9198a1 } .peer { fill: #57606a } .ours { fill: #4493f8 }
}
"""


@dataclass(frozen=True, slots=True)
class Row:
    """Name one figure: a row of a table by how its label begins, and which of its cells' numbers it is."""

    label: str
    name: str
    index: int = 0
    is_time: bool = False
    """Less is better."""


@dataclass(frozen=True, slots=True)
class Figure:
    file: str
    title: str
    section: str
    """How the section's heading begins."""
    table: str
    """First cell of the table's head."""
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Hold the bars of one row: (engine, value, as the page writes it)."""

    row: Row
    bars: tuple[tuple[str, float, str], ...]


LLAMA = (
    Row("`decode1`", "1 stream: ms a token", is_time=True),
    Row("TTFT of 128", "first token of a prompt of 128 tokens: ms", is_time=True),
    Row("TTFT of 128", "first token of a prompt of 2,048 tokens: ms", 1, is_time=True),
    Row("`offline`", "512 requests at once: requests/s"),
    Row("`prefix`", "512 requests behind 8 shared prefixes: requests/s"),
    Row("`decode256`", "256 streams: tokens/s", 1),
    Row("8 prompts of 24,000", "8 prompts of 24,000 tokens: s", is_time=True),
)
FIGURES = (
    Figure("llama-3-8b.svg", "Llama-3-8B, bf16, one H200", "One H200", "Llama-3-8B", LLAMA),
    Figure(
        "qwen3-0.6b.svg", "Qwen3-0.6B, bf16, one H200", "One H200", "Qwen3-0.6B",
        (
            Row("`decode1`", "1 stream: tokens/s"),
            Row("`decode256`", "256 streams: tokens/s", 1),
            Row("`offline`", "512 requests at once: requests/s"),
            Row("`offline`", "512 requests behind 8 shared prefixes: requests/s", 1),
        ),
    ),
    Figure(
        "qwen3-30b-a3b.svg", "Qwen3-30B-A3B, bf16, one H200", "Experts, one H200", "Qwen3-30B-A3B",
        (
            Row("`decode1`", "1 stream: ms a token", is_time=True),
            Row("TTFT of 128", "first token of a prompt of 128 tokens: ms", is_time=True),
            Row("`decode256`", "256 whole answers: tokens/s"),
        ),
    ),
    Figure(
        "cpu.svg", "SmolLM2-135M, two cores of a Xeon with AMX", "CPU", "",
        (
            Row("1 stream", "1 stream: tokens/s"),
            Row("8 streams", "8 streams: tokens/s"),
        ),
    ),
)  # fmt: skip


def tables(page: str, section: str) -> Iterator[list[list[str]]]:
    """Yield the tables of a section as rows of cells, the head first."""
    text = next(part for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:] if part.startswith(section))
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        yield [rows[0], *rows[2:]]


def groups_of(figure: Figure, page: str) -> list[Group]:
    """Read a figure's numbers from the page; engines whose cell has none are left out."""
    head, *rows = next(table for table in tables(page, figure.section) if table[0][0] == figure.table)
    groups = []
    for row in figure.rows:
        cells = next(cells for cells in rows if cells[0].startswith(row.label))
        bars = []
        for engine, cell in zip(head[1:], cells[1:], strict=True):
            numbers = NUMBER.findall(cell)
            if len(numbers) > row.index:
                bars.append((engine, float(numbers[row.index].replace(",", "")), numbers[row.index]))
        groups.append(Group(row, tuple(bars)))
    return groups


def draw(title: str, groups: Sequence[Group]) -> str:
    """Return the SVG of a figure: a group of bars a row, each as long as its share of the group's longest."""
    height = TOP - GROUP_HEAD + sum(2 * GROUP_HEAD + BAR_STEP * (len(group.bars) - 1) for group in groups)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<text class="title" x="16" y="30">{escape(title)}</text>',
    ]
    y = TOP
    for group in groups:
        better = "less is better" if group.row.is_time else "more is better"
        lines.append(
            f'<text x="16" y="{y}"><tspan class="name">{escape(group.row.name)}</tspan>'
            f'<tspan class="note" dx="8">{better}</tspan></text>'
        )
        most = max(value for _, value, _ in group.bars)
        y += GROUP_HEAD - BAR_STEP
        for engine, value, shown in group.bars:
            y += BAR_STEP
            width = round(BAR_WIDTH * value / most, 1)
            size = f'width="{width}" height="{BAR_HEIGHT}" rx="2"'
            kind = "ours" if engine == OURS else "peer"
            middle = y - BAR_HEIGHT + 11
            lines += [
                f'<text class="note" x="{BAR_LEFT - 8}" y="{middle}" text-anchor="end">{escape(engine)}</text>',
                f'<rect class="{kind}" x="{BAR_LEFT}" y="{y - BAR_HEIGHT}" {size}/>',
                f'<text x="{BAR_LEFT + width + 6}" y="{middle}">{shown}</text>',
            ]
        y += GROUP_HEAD
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    page = PAGE.read_text()
    FOLDER.mkdir(exist_ok=True)
    for figure in FIGURES:
        (FOLDER / figure.file).write_text(draw(figure.title, groups_of(figure, page)))
        print(FOLDER / figure.file)


if __name__ == "__main__":
    main()
