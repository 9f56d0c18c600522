"""Executes the python blocks of README.md and docs/*.md.

Those of a file run in order, in one namespace and one folder, empty at first. A block right after
`<!-- skip-test: reason -->` is skipped with that reason.
"""

import re
import sys
import textwrap
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest


ROOT = Path(__file__).parents[1]
BLOCK = re.compile(
    r"^(?:[ ]*<!--\s*skip-test:(?P<reason>.*?)-->\s*\n)?"
    r"(?P<fence>[ ]*```)python\b[^\n]*\n(?P<code>.*?)^(?P=fence)[ ]*$",
    re.DOTALL | re.MULTILINE,
)


@dataclass
class Block:
    line: int
    code: str
    skip_reason: str | None


@dataclass
class Page:
    """One Markdown file: its blocks, and the namespace in which they run."""

    path: Path
    blocks: list[Block]
    namespace: ModuleType
    finished: set[int] = field(default_factory=set)

    def run(self, last: Block) -> None:
        """Runs `last` after the blocks before it that have not run yet, as a reader would."""
        sys.modules[self.namespace.__name__] = self.namespace
        for block in self.blocks:
            if block.line <= last.line and block.line not in self.finished and block.skip_reason is None:
                self.finished.add(block.line)
                # Blank lines in front, so that a traceback shows the line of the Markdown file.
                exec(compile("\n" * block.line + block.code, self.path, "exec"), vars(self.namespace))  # noqa: S102


def read_blocks(markdown: str) -> list[Block]:
    blocks = []
    for match in BLOCK.finditer(markdown):
        reason = match["reason"]
        line = markdown.count("\n", 0, match.start("fence")) + 1
        blocks.append(Block(line, textwrap.dedent(match["code"]), reason.strip() if reason else None))
    return blocks


@cache
def read_page(path: Path) -> Page:
    return Page(path, read_blocks(path.read_text()), ModuleType(f"snippets_of_{path.stem}"))


def parameters() -> list:
    pages = [read_page(path) for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))) if path.exists()]
    return [
        pytest.param(page, block, id=f"{page.path.relative_to(ROOT)}:{block.line}")
        for page in pages
        for block in page.blocks
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Page -> the folder that its blocks run in."""
    return cache(lambda path: tmp_path_factory.mktemp(path.stem))


@pytest.fixture(autouse=True, scope="module")
def variants():
    """Takes back what pages register: tests of the same process count the variants that there are."""
    from hf_gradtools.nanogpt.registry import VARIANTS

    before = {kind: dict(names) for kind, names in VARIANTS.items()}
    yield
    for kind, names in VARIANTS.items():
        names.clear()
        names.update(before.get(kind, {}))


@pytest.mark.parametrize(("page", "block"), parameters())
def test_snippet_runs(page, block, monkeypatch, folders):
    if block.skip_reason:
        pytest.skip(block.skip_reason)
    monkeypatch.chdir(folders(page.path))
    page.run(block)


def test_blocks_are_found_with_their_line_indent_and_reason():
    markdown = "```python\na = 1\n```\n```bash\nls\n```\n\n<!-- skip-test: GPU -->\n  ```python\n  b = 2\n  ```\n"
    assert read_blocks(markdown) == [Block(1, "a = 1\n", None), Block(9, "b = 2\n", "GPU")]


def test_blocks_of_a_page_share_a_namespace_and_run_once(tmp_path):
    page = Page(tmp_path / "page.md", [Block(1, "a = [1]", None), Block(5, "a.append(2)", None)], ModuleType("page"))
    page.run(page.blocks[1])
    page.run(page.blocks[1])
    assert page.namespace.a == [1, 2]
