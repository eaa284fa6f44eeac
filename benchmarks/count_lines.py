"""Lines of source by area, at any revision: the table of docs/extending.md.

python benchmarks/count_lines.py                   the files as they are, committed or not
python benchmarks/count_lines.py 769884f main      a column for each revision

A line counts if it holds code: neither blank, nor a comment, nor part of a docstring. YAML, C, HTML and CSS are not
counted, nor tests and benchmarks.
"""

import argparse
import ast
import io
import subprocess
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
AREAS = {
    "science": ("data", "tokens", "model", "objective", "probe", "metric", "encoder", "scaling_law"),
    "training": ("training", "task", "checkpoint"),
    "running": ("run", "settings", "distributed", "utils", "cli", "hub", "hydra_plugins", "__init__", "__main__"),
    "reporting": ("report", "app"),
}
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def count_code_lines(source: str) -> int:
    """Lines of a Python file without blank ones, comments and docstrings."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {n for token in tokens if token.type not in NO_CODE for n in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def find_area(path: str) -> str:
    """The area of a file below src/. Raises ValueError for one that none lists."""
    parts = Path(path).with_suffix("").parts  # src, igpt, package, …
    package = parts[2] if parts[1] == "igpt" else parts[1]
    area = next((area for area, packages in AREAS.items() if package in packages), None)
    if area is None:
        raise ValueError(f"{path} is in no area: add {package} to AREAS")
    return area


def read_sources(revision: str | None) -> dict[str, str]:
    """The Python files below src/ by path: of a revision, or as they lie there."""
    if revision is None:
        paths = sorted((ROOT / "src").rglob("*.py"))
        return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}
    listed = run_git("ls-tree", "-r", "--name-only", revision, "src/").splitlines()
    return {path: run_git("show", f"{revision}:{path}") for path in listed if path.endswith(".py")}


def run_git(*arguments: str) -> str:
    """The output of a git command in this repository. Raises SystemExit with git's message if it fails."""
    done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    return done.stdout


def count_by_area(revision: str | None) -> Counter[str]:
    """Lines of code and number of files of each area, and of all."""
    counts: Counter[str] = Counter()
    for path, source in read_sources(revision).items():
        lines = count_code_lines(source)
        for area in (find_area(path), "all"):
            counts[area] += lines
            counts[f"files of {area}"] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs="*", default=[None], help="of git; default: the files as they are")
    revisions = parser.parse_args().revisions
    counts = [count_by_area(revision) for revision in revisions]
    print("| area | folders |", *(f"{revision or 'now'}: lines (files) |" for revision in revisions))
    print("|---|---|" + "---|" * len(revisions))
    for area, packages in {**AREAS, "all": ()}.items():
        shown = ", ".join(name for name in packages if not name.startswith("_"))
        print(f"| {area} | {shown} |", *(f"{count[area]:,} ({count[f'files of {area}']}) |" for count in counts))


if __name__ == "__main__":
    main()
