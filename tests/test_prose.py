"""The prose of the project is plain American English: constructions that readers stumble over are banned.

The test reads what people read: Markdown, docstrings, comments, messages and help texts. Code in backticks or
in fenced blocks is not prose. `python -m tests.test_prose [PATH ...]` prints all findings, by folder.
"""

import ast
import io
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = ("model", "data_prep", "pipeline", "benchmarks")
MARKDOWN = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]

DATA = {
    "benchmarks/captions.py",
    "data_prep/scenes/captions.py",
    "data_prep/scenes/grammar.py",
    "data_prep/scenes/rendering.py",
    "pipeline/following/natural_prompts.py",
}
"""Files whose string literals are captions and not prose of ours."""

UNITS = (
    "rank|sample|caption|shard|process|step|epoch|batch|part|row|folder|node|line|token|channel|run|bucket|file|"
    "dataset|family|prompt|image|picture|task|job|worker|thread|group|scene|object|block|layer|parameter|GPU|value|"
    "question|category|side|pixel|patch|key|attempt|stage|source|client|phase|seed|point"
)
COUNTED = (
    "bytes?|rows?|samples?|steps?|tokens?|images?|lines?|files?|values?|seconds?|captions?|MB|GB|kB|ms|us|s|MiB|GiB|"
    "FLOPs?|processes|threads|times|pixels|patches|objects|questions|parts|costs|copies|calls"
)
NUMBER = r"(?:an?|one|two|three|four|five|ten|half|some|\d[\d,.]*)"
NO_NOUN = (
    "in|of|with|for|is|as|to|than|from|on|by|at|per|like|or|and|into|over|has|are|was|"
    "not|but|that|when|if|makes|without|within|after|before|instead"
)
PROCESS = "process(?:es)?|(?:rank|thread|writer|reader|worker|job|task|trainer|server|node|peer|client)s?"
SUFFIX = "(?:e|ed|es|er|ers|ing|ation|ations|able)"


class Rule(NamedTuple):
    """A banned construction. A space in the pattern is any white space, so that it is found across lines."""

    pattern: str
    plain: str
    docstring_only: bool = False

    def find(self, text: str) -> Iterator[re.Match[str]]:
        return re.finditer(self.pattern.replace(" ", r"\s+"), text)


RULES = (
    Rule(
        r"\A(What|Whether|Where|How|Of|Who|Whose|Which|Why|When)\b[^.:]*",
        "an imperative or a noun: Return ..., True if ..., Path of ..., Number of ...",
        docstring_only=True,
    ),
    Rule(
        r"(?m)^\s*[A-Z]\w*(?:Error|Exception): (?!if\b|when\b|from\b|as\b|with\b|always\b)[^\n]*",
        "`XError: if the run does not exist`: say of what it speaks",
        docstring_only=True,
    ),
    Rule(
        rf"\b(?:(?i:{NUMBER}) (?!(?:{NO_NOUN})\b)[\w-]+|(?i:one|two|three|once|twice|half|each|all)|"
        rf"{COUNTED}) an? (?:{UNITS})\b",
        "one per rank, 4 bytes per token",
    ),
    Rule(r"\b(?<!points\s)(?<!values\s)(lie|lies|lay|lying)\b", "is stored in, is in"),
    Rule(r"(?i)\b(stand|stands|stood|standing)\b(?!-)", "is, is listed in, is next to, comes before, means"),
    Rule(r"(?i)\b(tell|tells|told|telling)\b", "report, publish, say, distinguish"),
    Rule(r"(?i)\bgone\b(?! since the plan)", "has exited, does not exist, was removed, is over"),
    Rule(r"(?i)\b(anew|afresh)\b", "again"),
    Rule(r"\b(hangs?|hung|hanging) (?:up)?on\b", "depends on"),
    Rule(r"\b(be|been|is|are|was) had\b", "cannot be fetched, is available"),
    Rule(r"(?i)\bfor ever\b", "forever"),
    Rule(
        rf"\b(?:{PROCESS}) (who|whom)\b|(?:\A|[.;:] )Who\b(?! [^.]*\?)|\b[Ww]hoever\b",
        "a process that ...",
    ),
    Rule(r"\b(held|holds?) (?:[\w']+ ){0,3}against\b", "is compared with, is tested against"),
    Rule(r"\b[Pp]ictures?\b", "image"),
    Rule(
        r"\b(draws?|drew|drawn|drawing) (?:\w+ )?(noise|pictures?|images?|prompts?|random|captions?|samples?|"
        r"timesteps?|numbers?)\b|\b(pictures?|images?|noise) (?:\w+ ){0,2}drawn\b",
        "generate or sample an image, sample noise, pick a row, render a scene",
    ),
    Rule(r"\bspreads?\b(?! (?:over|across|out|among|evenly|to)\b)", "std"),
    Rule(r"\b(?:gives|give) (?:False|True|None)\b", "returns None, or None if ..."),
    Rule(
        r"(?i)\b(?:de|re|un|non-)?(?:normal|quant|standard|token|initial|optim|summar|serial|synchron|recogn|organ|general|"
        r"parallel|orthogonal|minim|maxim|character|priorit|special|util|visual|material|raster|random|categor|"
        rf"discret|memo|penal|local|final|real|author|emphas|critic|custom|equal|stabil|central)is{SUFFIX}\b",
        "American spelling: -ize",
    ),
    Rule(
        r"(?i)\b\w*(?:colour|behaviour|neighbour|favour|honour|labour)\w*|\b(?:centre[ds]?|grey(?:s|ish)?|licence[ds]?|"
        r"artefacts?|metres?|kilometres?|analyse[ds]?|catalogue[ds]?|labelled|modelling|cancelled|travelled|"
        r"towards|afterwards|whilst|amongst)\b",
        "American spelling: color, behavior, center, gray, license, toward",
    ),
)


class Text(NamedTuple):
    """A piece of prose and the line of the file where it starts."""

    line: int
    text: str
    is_docstring: bool = False


class Finding(NamedTuple):
    """A banned construction in a file."""

    path: str
    line: int
    found: str
    plain: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.found!r}; plainly: {self.plain}"


def docstring_nodes(tree):
    """Docstrings, and strings below an attribute or a constant, which document it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in node.body:
                value = statement.value if isinstance(statement, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value


def python_texts(source, messages=True):
    """All prose of a Python file: docstrings, comments and, with `messages`, string literals with a space."""
    tree = ast.parse(source)
    docstrings = list(docstring_nodes(tree))
    for node in docstrings:
        # Line breaks inside a docstring are kept, so that a finding can name its line.
        yield Text(node.lineno, re.sub(r"[ \t]+", " ", node.value), is_docstring=True)

    comment, last = None, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        words = token.string.lstrip("#! ")
        if comment and token.start[0] == last + 1 and not token.line[: token.start[1]].strip():
            comment = comment._replace(text=f"{comment.text}\n{words}")
        else:
            if comment:
                yield comment
            comment = Text(token.start[0], words)
        last = token.start[0]
    if comment:
        yield comment

    if messages:
        skipped = {id(node) for node in docstrings}
        yield from (text for text in literals(tree, skipped) if " " in text.text.strip())


def literals(tree, skipped):
    """String literals, those with placeholders as one text with `{}` for each."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.JoinedStr):
            pieces = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield Text(node.lineno, "".join(pieces))
            for part in node.values:
                yield from literals(part, skipped)
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, str) and id(node) not in skipped:
                yield Text(node.lineno, node.value)
        else:
            yield from literals(node, skipped)


def markdown_texts(source):
    """Paragraphs of a Markdown file without fenced blocks."""
    fenced, start, paragraph = False, 0, []
    for number, line in enumerate([*source.splitlines(), ""], 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            line = ""
        if fenced or not line.strip():
            if paragraph:
                yield Text(start, "\n".join(paragraph))
            paragraph = []
        else:
            start = start if paragraph else number
            paragraph.append(line)


def comment_texts(source):
    """Comments of a YAML file or Makefile."""
    for number, line in enumerate(source.splitlines(), 1):
        comment = re.search(r"(?:^|\s)#(.*)", line)
        if comment:
            yield Text(number, comment.group(1))


def line_texts(source):
    """All lines, of files that mix prose and code: shell scripts, and HTML templates without their tags."""
    plain = re.sub(r"<[^>]*>|\{\{.*?\}\}|\{%.*?%\}", lambda match: re.sub(r"\S", "`", match.group()), source)
    for number, line in enumerate(plain.splitlines(), 1):
        yield Text(number, line)


def texts(path):
    """All prose of a file, by its kind."""
    source = path.read_text()
    if path.suffix == ".py":
        yield from python_texts(source, messages=name(path) not in DATA)
    elif path.suffix == ".md":
        yield from markdown_texts(source)
    elif path.suffix == ".yaml":
        yield from comment_texts(source)
    else:
        yield from line_texts(source)


def without_code(text):
    """The text with code in backticks, links, options and paths blanked out, at the same length."""
    return re.sub(
        r"`[^`\n]*`|https?://\S+|--[\w-]+|\]\([^)]*\)|\S*[\w-]/\w\S*",
        lambda match: "`" * len(match.group()),
        text,
    )


def findings(path):
    """All banned constructions of a file."""
    for text in texts(path):
        prose = without_code(text.text)
        for rule in RULES:
            if rule.docstring_only and not text.is_docstring:
                continue
            for match in rule.find(prose):
                start = match.start() + len(match.group()) - len(match.group().lstrip())
                line = text.line + prose.count("\n", 0, start)
                yield Finding(name(path), line, " ".join(text.text[start : match.end()].split()), rule.plain)


def name(path):
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def prose_files():
    """Files that people read, in the order of their paths."""
    code = [
        path
        for folder in CODE
        for suffix in ("py", "yaml", "html")
        for path in (ROOT / folder).rglob(f"*.{suffix}")
    ]
    docs = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.py")]
    return sorted([*MARKDOWN, *docs, *code, *(ROOT / "cluster").glob("*.sh")])


@pytest.mark.parametrize("folder", [*CODE, "others"])
def test_prose_is_plain(folder):
    found = []
    for path in prose_files():
        top = name(path).split("/")[0]
        if folder == top or (folder == "others" and top not in CODE):
            found += findings(path)
    assert not found, "\n" + "\n".join(map(str, found))


@pytest.mark.parametrize(
    "text",
    [
        '"""What a run says."""',
        'def f():\n    """Whether it is there."""',
        'def f():\n    """Open a store.\n\n    Raises:\n        UserError: it does not exist.\n    """',
        "# one file a rank",
        "# Written as a byte a batch.",
        "x = 1  # 4 bytes a token",
        'raise ValueError("the part lies in no bucket")',
        'raise ValueError(f"rank {rank} was told to end")',
        'raise ValueError(f"{name}: the picture\'s size differs")',
        "# The row is read\n# anew.",
        '"""Sets of rows. A process who waits fails."""',
        "# mean and spread per channel",
        "# normalised states",
        "COLOUR = 1\n# the colour of a thing",
    ],
)
def test_rules_find(tmp_path, text):
    path = tmp_path / "sample.py"
    path.write_text(text + "\n")
    assert list(findings(path))


@pytest.mark.parametrize(
    "text",
    [
        '"""Where clauses are no noun."""' * 0
        + '"""Return one row per sample, with a standard deviation."""',
        "# `--pictures` is understood as a batch of images; whose store it is does not matter",
        '"""A shape.\n\nRaises:\n    UserError: if a rank is missing.\n"""',
        "# a sample is a row of a part, once in a batch, and at most one of a shard",
        'x = "picture"',
        "# points lie within the shape; rows are spread over the ranks",
        "# see pipeline/inference/pictures.py",
    ],
)
def test_rules_leave_plain_prose_alone(tmp_path, text):
    path = tmp_path / "sample.py"
    path.write_text(text + "\n")
    assert not list(findings(path))


def test_findings_name_the_line(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("# Title\n\n```\na picture\n```\n\nA run\nof pictures, one\na rank.\n")
    assert [(finding.line, finding.found) for finding in findings(path)] == [
        (8, "one a rank"),
        (8, "pictures"),
    ]


def main():
    """Print all findings by folder."""
    paths = [Path(argument).resolve() for argument in sys.argv[1:]]
    groups = defaultdict(list)
    for path in prose_files():
        if not paths or any(path == chosen or chosen in path.parents for chosen in paths):
            groups[name(path.parent)] += findings(path)

    for folder, found in groups.items():
        if found:
            print(f"\n== {folder}: {len(found)}")
            print("\n".join(map(str, found)))
    print(f"\n{sum(map(len, groups.values()))} findings")


if __name__ == "__main__":
    main()
