"""Draw the figures of `docs/architecture.md` from the code: `python -m docs.make_figures`.

`architecture.svg` shows the sub-packages and the imports between them. `flow.svg` shows the way of a caption
and of a batch through the functions named below; a name that no longer exists is an error. A test checks
that both figures are up to date.
"""

import ast
from collections.abc import Callable, Iterable, Iterator
from html import escape
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

from benchmarks.house import PACKAGES, imports_between

ROOT = Path(__file__).resolve().parent.parent

BOX_WIDTH, BOX_HEIGHT = 204, 56
COLUMN, ROW = 218, 82
MARGIN = 16
TITLE = 36
MAX_NOTE = 34

COLORS = {"model": "#dbe9f6", "data_prep": "#e2f0d9", "pipeline": "#fbe5d6", "store": "#eeeeee"}
STYLE = """
  text { font-family: Helvetica, Arial, sans-serif; fill: #222 }
  .name { font-size: 14px; font-weight: bold }
  .code { font-family: Menlo, Consolas, monospace; font-size: 11.5px }
  .note { font-size: 11px; fill: #555 }
  .title { font-size: 17px; font-weight: bold }
  .box { stroke: #777; stroke-width: 1 }
  .lane { fill: #fafafa; stroke: #ddd }
  .arrow { fill: none; stroke: #555; stroke-width: 1.3; marker-end: url(#head) }
  .needs { font-size: 11px; fill: #7a3f98 }
"""

COLUMNS = {
    "pipeline.evaluation": 0,
    "pipeline.diffusion": 0,
    "pipeline.demonstration": 0,
    "pipeline.ablation": 1,
    "pipeline.inference": 1,
    "pipeline.checkpoint": 1,
    "pipeline.engine": 1,
    "pipeline.text": 1,
    "pipeline.stage": 1,
    "pipeline": 2,
    "pipeline.reporting": 2,
    "pipeline.training": 2,
    "pipeline.data": 2,
    "pipeline.runtime": 2,
    "pipeline.following": 3,
    "pipeline.operations": 4,
    "data_prep.engines": 0,
    "data_prep.workers": 0,
    "data_prep": 1,
    "data_prep.families": 1,
    "data_prep.pairs": 1,
    "data_prep.plan": 1,
    "data_prep.sources": 1,
    "data_prep.images": 1,
    "data_prep.dataset": 1,
    "data_prep.store": 1,
    "data_prep.config": 2,
    "data_prep.scenes": 2,
}
"""Layer -> its column in the panel of its package, so that arrows pass no box. Others: a free one."""

EVERYWHERE = "model.common"
"""Layer that all others need; the boxes do not mention it."""

Cell = tuple[int, int]
"""Row, counted from the bottom, and column of a box."""


class Step(NamedTuple):
    """A box of `flow.svg`."""

    title: str
    code: str
    """`package.module:name` of the code that does it; the name may be `Class.method`."""
    note: str


CAPTION = (
    Step("Source", "data_prep.sources.source:Source", "captions and images as they come"),
    Step("Plan", "data_prep.plan.plan:run_plan", "scan, filter, find duplicates, fix parts"),
    Step("Pairs", "data_prep.pairs.pairs:run_pairs", "captions in a part of 1,024 rows or so"),
    Step("LLM", "model.encoders.text_encoder:TextEncoder", "packed captions; instruction once"),
    Step("Quantize", "model.encoders.quantize:quantize", "standardized int8 per token"),
    Step("Snapshot", "data_prep.dataset.snapshot:take_snapshot", "families of equal rows, immutable"),
    Step("Text", "pipeline.text.texts:to_text", "hidden states again, with the prefix"),
    Step("Fusion", "model.fusion:TextFusion", "token refiners, collaborative refiner"),
    Step("DiT", "model.dit:LIDiT", "cross-attention in every block"),
)
"""The way of a caption, from the source to the network."""

BATCH = (
    Step("Epoch plan", "pipeline.data.epoch_plan:EpochPlan", "rows of each batch, from (seed, epoch)"),
    Step("Shard cache", "pipeline.data.shard_cache:ShardCache", "checked files of the snapshot"),
    Step("Dataset", "pipeline.data.dataset:SnapshotDataset", "bytes of a batch in one block"),
    Step("Loader", "pipeline.data.loader:TrainingData", "processes that read ahead"),
    Step("Inputs", "pipeline.training.inputs:NetworkInputs", "clean latents, condition"),
    Step("Objective", "pipeline.diffusion.objective:Objective", "timestep, noise, target"),
    Step("Engine", "pipeline.engine.engine:Engine.backward", "gradients under ZeRO"),
    Step("Optimizer step", "pipeline.engine.engine:Engine.step", "fp32 partitions, clipping, EMA"),
    Step("Checkpoint", "pipeline.checkpoint.checkpoints:Checkpoints", "a file per rank, then the manifest"),
)
"""The way of a batch, from the epoch plan to a checkpoint."""


def read_layers(root: Path) -> tuple[str, ...]:
    """Sub-packages, lowest first: the table `LAYERS` of `tests/test_layering.py`."""
    tree = ast.parse((root / "tests" / "test_layering.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS":
            return ast.literal_eval(node.value)
    raise ValueError("tests/test_layering.py has no table LAYERS")


def layer_of(module: str, layers: Iterable[str]) -> str:
    """Entry of the table that a module belongs to."""
    inner = ".".join(module.split(".")[:2])
    return inner if inner in layers else module.split(".")[0]


def purpose(root: Path, layer: str) -> str:
    """First sentence of a sub-package's docstring."""
    folder = root / layer.replace(".", "/")
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    return (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0]


def layer_imports(root: Path, layers: tuple[str, ...]) -> dict[str, set[str]]:
    """Layer -> the layers that it imports."""
    imports: dict[str, set[str]] = {layer: set() for layer in layers}
    for importer, imported in imports_between(root):
        source, target = layer_of(importer, layers), layer_of(imported, layers)
        if layers.index(target) < layers.index(source):
            imports[source].add(target)
    return imports


def without_shortcuts(imports: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Imports that follow from no others: A -> C is left out where A -> B -> C."""

    def reachable(start: str) -> set[str]:
        found = set(imports[start])
        for layer in imports[start]:
            found |= reachable(layer)
        return found

    arrows: list[tuple[str, str]] = []
    for source, targets in imports.items():
        indirect: set[str] = set()
        for target in targets:
            indirect |= reachable(target)
        arrows += [(source, target) for target in sorted(targets - indirect)]
    return arrows


def place_layers(package: str, layers: tuple[str, ...], arrows: list[tuple[str, str]]) -> dict[str, Cell]:
    """Place the layers of a package, each above those that it imports.

    A layer that imports nothing here and is imported once is placed right below its importer.
    """
    own = [layer for layer in layers if layer.split(".")[0] == package]
    imported = {
        layer: [target for source, target in arrows if source == layer and target in own] for layer in own
    }
    importers = {layer: [source for source in own if layer in imported[source]] for layer in own}

    rows: dict[str, int] = {}
    for layer in own:
        rows[layer] = 1 + max((rows[target] for target in imported[layer]), default=-1)
    for layer in own:
        if not imported[layer] and len(importers[layer]) == 1:
            rows[layer] = rows[importers[layer][0]] - 1

    cells: dict[str, Cell] = {}
    for layer in sorted(own, key=lambda layer: layer not in COLUMNS):
        column = COLUMNS.get(layer, 0)
        while (rows[layer], column) in cells.values():
            column += 1
        cells[layer] = (rows[layer], column)
    return cells


class Panel:
    """Boxes of one package and the arrows between them."""

    def __init__(
        self, root: Path, package: str, layers: tuple[str, ...], imports: dict[str, set[str]]
    ) -> None:
        self.root = root
        self.package = package
        self.arrows = without_shortcuts(imports)
        self.cells = place_layers(package, layers, self.arrows)
        self.rows = 1 + max(row for row, _ in self.cells.values())
        self.columns = 1 + max(column for _, column in self.cells.values())
        self.width = self.columns * COLUMN + MARGIN
        self.height = self.rows * ROW + TITLE

    def draw(self, left: float, top: float) -> list[str]:
        """SVG shapes of the panel with its corner at a point."""
        shapes = [_rectangle(left, top, self.width, self.height, "lane")]
        shapes.append(f'<text class="title" x="{left + 12}" y="{top + 24}">{self.package}/</text>')

        def corner(cell: Cell) -> tuple[float, float]:
            row, column = cell
            x = left + MARGIN / 2 + column * COLUMN + (COLUMN - BOX_WIDTH) / 2
            return x, top + TITLE + (self.rows - 1 - row) * ROW

        # Arrows come before the boxes, so that a box covers an arrow that passes behind it.
        for source, target in self.arrows:
            if source in self.cells and target in self.cells:
                shapes.append(self._arrow(self.cells[source], self.cells[target], corner))
        for layer, cell in self.cells.items():
            shapes.append(_box(corner(cell), COLORS[self.package], self._texts(layer)))
        return shapes

    def _texts(self, layer: str) -> list[tuple[str, str]]:
        name = layer if layer == self.package else layer.split(".")[1]
        targets = [target for source, target in self.arrows if source == layer]
        others = [target for target in targets if target not in self.cells and target != EVERYWHERE]
        texts = [("name", name), ("note", _short(purpose(self.root, layer)))]
        return [*texts, ("needs", "needs " + ", ".join(others))] if others else texts

    def _arrow(self, source: Cell, target: Cell, corner: Callable[[Cell], tuple[float, float]]) -> str:
        """Arrow between two boxes: a curve, or one right angle if the rows are far apart."""
        (source_x, source_y), (target_x, target_y) = corner(source), corner(target)
        middle, end = source_x + BOX_WIDTH / 2, target_x + BOX_WIDTH / 2
        right = target[1] > source[1]

        between = range(target[0] + 1, source[0])
        if source[1] != target[1] and source[0] - target[0] > 1:
            if not self._taken([(row, target[1]) for row in (*between, source[0])]):
                start = source_x + BOX_WIDTH if right else source_x
                return _path(f"M{start:g} {source_y + BOX_HEIGHT / 2:g} H{end:g} V{target_y - 6:g}")
            if not self._taken([(row, source[1]) for row in (target[0], *between)]):
                side = target_x - 6 if right else target_x + BOX_WIDTH + 6
                return _path(
                    f"M{middle:g} {source_y + BOX_HEIGHT:g} V{target_y + BOX_HEIGHT / 2:g} H{side:g}"
                )

        start_y, end_y = source_y + BOX_HEIGHT, target_y - 6
        bend = (end_y - start_y) * 0.6
        control = f"C{middle:g} {start_y + bend:g} {end:g} {end_y - bend:g}"
        return _path(f"M{middle:g} {start_y:g} {control} {end:g} {end_y:g}")

    def _taken(self, cells: list[Cell]) -> bool:
        return any(cell in self.cells.values() for cell in cells)


def draw_architecture(root: Path) -> str:
    """SVG of the sub-packages, a panel per package, and the imports between them."""
    layers = read_layers(root)
    imports = layer_imports(root, layers)
    pipeline, data_prep, model = (Panel(root, package, layers, imports) for package in reversed(PACKAGES))

    # The panel of `pipeline` is as wide as the two below it.
    width = max(pipeline.width, data_prep.width + MARGIN + model.width)
    pipeline.width = width
    model.width = width - data_prep.width - MARGIN

    below = 2 * MARGIN + pipeline.height
    shapes = pipeline.draw(MARGIN, MARGIN)
    shapes += data_prep.draw(MARGIN, below)
    shapes += model.draw(2 * MARGIN + data_prep.width, below)

    return _svg(width + 2 * MARGIN, below + max(data_prep.height, model.height) + MARGIN, shapes)


def _short(sentence: str) -> str:
    """Words of a sentence before the first punctuation mark, without code marks, if they fit into a box."""
    for mark in ":,;.":
        sentence = sentence.split(mark)[0]
    return shorten(sentence.replace("`", ""), MAX_NOTE, placeholder=" ...")


def _path(steps: str) -> str:
    return f'<path class="arrow" d="{steps}"/>'


def check_steps(root: Path, steps: Iterable[Step]) -> None:
    """Check that the code of each step exists.

    Raises:
        ValueError: if a module or a name in it does not exist.
    """
    for step in steps:
        module, _, name = step.code.partition(":")
        file = root / f"{module.replace('.', '/')}.py"
        if not file.exists():
            raise ValueError(f"{step.title}: there is no {file.relative_to(root)}")
        if name not in _defined(ast.parse(file.read_text())):
            raise ValueError(f"{step.title}: {module} has no {name}")


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (
                f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)
            )


def draw_flow(root: Path) -> str:
    """SVG of the way of a caption and of a batch, three boxes in a row."""
    check_steps(root, [*CAPTION, *BATCH])
    width, height, per_row = 300, 66, 3
    shapes: list[str] = []
    y = MARGIN
    for title, steps in (("The way of a caption", CAPTION), ("The way of a batch", BATCH)):
        shapes.append(f'<text class="title" x="{MARGIN}" y="{y + 16}">{title}</text>')
        y += 32
        for start in range(0, len(steps), per_row):
            for column, step in enumerate(steps[start : start + per_row]):
                x = MARGIN + column * (width + 36)
                module, _, name = step.code.partition(":")
                texts = [
                    ("name", step.title),
                    ("code", f"{module.partition('.')[2]}: {name}"),
                    ("note", step.note),
                ]
                shapes.append(_box((x, y), COLORS[module.split(".")[0]], texts, width, height))
                if column + 1 < per_row:
                    shapes.append(f'<path class="arrow" d="M{x + width} {y + height / 2} h30"/>')
                elif start + per_row < len(steps):
                    shapes.append(_next_row(x + width / 2, MARGIN + width / 2, y + height))
            y += height + 40
        y += 8
    return _svg(MARGIN * 2 + 3 * width + 72, y, shapes)


def _next_row(x1: float, x2: float, y: float) -> str:
    return f'<path class="arrow" d="M{x1} {y} v18 H{x2} v16"/>'


def _rectangle(x: float, y: float, width: float, height: float, kind: str, extra: str = "") -> str:
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"{extra}/>'


def _box(
    place: tuple[float, float],
    color: str,
    texts: list[tuple[str, str]],
    width: float = BOX_WIDTH,
    height: float = BOX_HEIGHT,
) -> str:
    """Rectangle with lines of text: (CSS class, text) each."""
    x, y = place
    shapes = [_rectangle(x, y, width, height, "box", f' fill="{color}"')]
    for line, (kind, text) in enumerate(texts):
        shapes.append(f'<text class="{kind}" x="{x + 10}" y="{y + 18 + 16 * line}">{escape(text)}</text>')
    return "\n".join(shapes)


def _svg(width: float, height: float, shapes: list[str]) -> str:
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#555"/></marker>'
    )
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    background = f'<rect width="{width:g}" height="{height:g}" fill="white"/>'
    body = "\n".join([f"<style>{STYLE}</style>", f"<defs>{head}</defs>", background, *shapes])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{body}\n</svg>\n'


def figures(root: Path) -> dict[str, str]:
    """File name in `docs/` -> SVG."""
    return {"architecture.svg": draw_architecture(root), "flow.svg": draw_flow(root)}


def main() -> None:
    """Write the figures."""
    for name, svg in figures(ROOT).items():
        (ROOT / "docs" / name).write_text(svg)
        print(f"docs/{name}")


if __name__ == "__main__":
    main()
