"""The layout of docs/architecture.md: every room is there, imports from those above it, and runs anywhere."""

import ast
import re
from pathlib import Path

import larosa

PACKAGE = Path(larosa.__file__).parent
ROOT = Path(__file__).parents[1]
#: Of the standard library, but not on every system.
SOME_SYSTEMS = {"crypt", "fcntl", "grp", "msvcrt", "posix", "pty", "pwd", "resource", "termios", "tty", "winreg"}


def rooms() -> dict[str, int]:
    """Each room's row in the table."""
    table = (ROOT / "docs" / "architecture.md").read_text("utf-8").partition("## Rooms")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {
        name.strip("/").removesuffix(".py"): at for at, row in enumerate(rows) for name in re.findall("`(.*?)`", row)
    }


def imports(tree: ast.AST):
    """The modules that are imported anywhere in a tree, absolutely."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "larosa")


def sources():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, path.relative_to(PACKAGE).with_suffix("").parts[0], ast.parse(path.read_text("utf-8"))


def test_every_room_imports_from_those_above_it():
    row = rooms()
    for path, room, tree in sources():
        if room in ("__init__", "assets"):
            continue
        assert room in row, f"{path}: the table in docs/architecture.md has no row for {room}"
        below = {
            name.split(".")[1]
            for name in imports(_without_types(tree))
            if name.startswith("larosa.") and row.get(name.split(".")[1], -1) > row[room]
        }
        assert not below, f"{path} imports {below}, which stand below {room} in docs/architecture.md"


def _without_types(tree: ast.AST) -> ast.AST:
    """What runs, without what is imported for types alone."""
    for node in ast.walk(tree):
        for body in (getattr(node, field, None) for field in ("body", "orelse")):
            if isinstance(body, list):
                body[:] = [each for each in body if not _is_for_types(each)]
    return tree


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def headings(path: Path) -> set[str]:
    """The anchors of a page's headings."""
    lines = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S).splitlines()
    titles = (line.lstrip("# ").lower() for line in lines if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def test_links_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/*.md")]
    assert len(pages) > 15
    for page in pages:
        for name, anchor in re.findall(r"\]\(([^):#]*)(?:#([^)]*))?\)", page.read_text("utf-8")):
            target = page.parent / name if name else page
            assert target.exists(), f"{page}: {name}"
            assert not anchor or anchor in headings(target), f"{page}: {name}#{anchor}"


def test_what_some_systems_lack_is_imported_where_it_is_used():
    """`resource`, at the top of a module, ended `import larosa` on Windows."""
    for path, _, tree in sources():
        at_once = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        found = {name.partition(".")[0] for node in at_once for name in imports(node)} & SOME_SYSTEMS
        assert not found, f"{path} imports {found} at once"
