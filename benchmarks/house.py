"""The house in figures: files and lines a folder, circles of imports, imports inside functions, the longest things.

Of lines both counts are given: all, and those of code, without blank ones, comments and docstrings.

    python benchmarks/house.py [ROOT]        ROOT: a checkout, by default this one

A circle is a set of the package's files each of which imports all the others, directly or not; imports inside functions
and those for types alone count as much as the others. Nothing is imported: the sources are parsed.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = "compressor"


def sources(root: Path, folder: str = "") -> dict[Path, ast.Module]:
    """The parsed files of a checkout, or of a folder in it, by their path; hidden folders and outputs are left out."""
    found = {}
    for path in sorted((root / folder).rglob("*.py")):
        inside = path.relative_to(root)
        if not any(part.startswith(".") or part in ("outputs", "build") for part in inside.parts):
            found[inside] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def code_lines(source: str, tree: ast.Module) -> int:
    """Lines of a file that hold code: neither blank, nor a comment's alone, nor a docstring's."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            held.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        # A docstring, of whatever: a string that stands alone.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            held.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(held)


def module_of(path: Path) -> str:
    """Dotted name of a file of the package."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, module: str, modules: set[str]) -> set[str]:
    """Modules of the package that a file imports anywhere."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name.name}" for name in node.names]
        else:
            continue
        # `from a import b` imports the module a.b if there is one, else a.
        found |= {name if name in modules else name.rpartition(".")[0] for name in names}
    return (found & modules) - {module}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of two and more modules, the largest first."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for following in graph[todo.pop()] - seen:
                seen.add(following)
                todo.append(following)
        reach[start] = seen
    found = {frozenset({one, *(other for other in reach[one] if one in reach[other])}) for one in graph}
    return sorted((sorted(circle) for circle in found if len(circle) > 1), key=lambda circle: -len(circle))


def local_imports(tree: ast.AST) -> int:
    """Import statements inside functions."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return len({id(n) for f in functions for n in ast.walk(f) if isinstance(n, ast.Import | ast.ImportFrom)})


def main() -> int:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()
    trees = sources(root)
    texts = {path: (root / path).read_text(encoding="utf-8") for path in trees}
    lines = {path: len(text.splitlines()) for path, text in texts.items()}
    code = {path: code_lines(text, trees[path]) for path, text in texts.items()}
    files, total, held = Counter[str](), Counter[str](), Counter[str]()
    for path in trees:
        folder = str(path.parent)
        files[folder] += 1
        total[folder] += lines[path]
        held[folder] += code[path]

    def row(name: str, count: int, all_lines: int, of_code: int) -> None:
        print(f"{name:<32} {count:>4} files {all_lines:>7,} lines {of_code:>7,} of code")

    for folder in sorted(files):
        row(folder, files[folder], total[folder], held[folder])
    package = {path: tree for path, tree in trees.items() if path.parts[0] == PACKAGE}
    row(f"{PACKAGE}, with its folders", len(package), sum(lines[p] for p in package), sum(code[p] for p in package))
    row("all", len(trees), sum(lines.values()), sum(code.values()))
    modules = {module_of(path) for path in package}
    graph = {module_of(path): imported(tree, module_of(path), modules) for path, tree in package.items()}
    found = circles(graph)
    print(f"circles of imports, files in each: {', '.join(str(len(circle)) for circle in found) or 'none'}")
    for circle in found:
        print(f"  {', '.join(module.removeprefix(PACKAGE + '.') for module in circle)}")
    print(f"imports inside functions: {sum(map(local_imports, package.values()))}")
    longest = max(package, key=lambda path: lines[path])
    print(f"longest file: {longest}, {lines[longest]} lines")
    functions = [
        ((node.end_lineno or node.lineno) - node.lineno + 1, f"{path}:{node.lineno} {node.name}")
        for path, tree in package.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    print("longest function: {1}, {0} lines".format(*max(functions)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
