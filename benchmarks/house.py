"""The house in figures: files and lines a folder, circles of imports, imports inside functions, the longest things.

    python benchmarks/house.py [ROOT]        ROOT: a checkout, by default this one

A circle is a set of the package's files each of which imports all the others, directly or not; imports inside functions
and those for types alone count as much as the others. Nothing is imported: the sources are parsed.
"""

from __future__ import annotations

import ast
import sys
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
    lines = {path: len((root / path).read_text(encoding="utf-8").splitlines()) for path in trees}
    files, total = Counter[str](), Counter[str]()
    for path in trees:
        folder = str(path.parent)
        files[folder] += 1
        total[folder] += lines[path]
    for folder in sorted(files):
        print(f"{folder:<32} {files[folder]:>4} files {total[folder]:>7,} lines")
    package = {path: tree for path, tree in trees.items() if path.parts[0] == PACKAGE}
    print(f"{PACKAGE + ', with its folders':<32} {len(package):>4} files {sum(lines[p] for p in package):>7,} lines")
    print(f"{'all':<32} {len(trees):>4} files {sum(lines.values()):>7,} lines")
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
