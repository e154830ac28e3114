"""Cut a method's block out of a script, as somebody would who copies it into a project of their own.

A script's docstring says what to take, in one paragraph:

    Copy: `erdos_renyi_counts`, `rigl_fraction`, `rigl_topology` and `Topology` (80 lines; ...).

`lift("mst_rigl")` runs these names, with the imports that they need and nothing else, in an empty namespace.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[2]
ALLOWED = {"collections", "copy", "itertools", "math", "numpy", "sklearn", "torch", "warnings"}  # to import in a block


@dataclass
class Claim:
    """What a script's docstring says of its block: the names, their lines, the files that use them."""

    names: list[str]
    lines: int
    files: list[str]


def claims(script: str) -> list[Claim]:
    """The "Copy:" paragraphs of a script's docstring, in order."""
    docstring = ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text()))
    found = []
    for paragraph in re.findall(r"Copy[^:]*:.*?(?=\n\n|\Z)", docstring, flags=re.DOTALL):
        before, lines, after = re.split(r"\((\d+) lines", paragraph)
        files = re.findall(r"tests/transplants/\w+\.py", after)
        found.append(Claim(re.findall(r"`(\w+)`", before), int(lines), files))
    return found


def block(script: str, names: list[str]) -> tuple[str, str]:
    """Imports that the named functions, classes and constants of a script need, and their source."""
    source = (ROOT / f"{script}.py").read_text()
    tree, pieces = ast.parse(source), {}
    for node in tree.body:
        targets = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
        targets += [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        pieces |= {target: node for target in targets}
    nodes = sorted({pieces[name] for name in names}, key=lambda node: node.lineno)
    used = {word.id for node in nodes for word in ast.walk(node) if isinstance(word, ast.Name)}
    imports = []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            kept = [alias for alias in node.names if (alias.asname or alias.name).split(".")[0] in used]
            if kept:
                node.names = kept
                imports.append(ast.unparse(node))
    lines = source.splitlines()
    starts = [min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1 for node in nodes]
    body = ["\n".join(lines[start : node.end_lineno]) for start, node in zip(starts, nodes, strict=True)]
    return "\n".join(imports), "\n\n\n".join(body)


def line_count(body: str) -> int:
    """Lines of a block, docstrings and comments included, blank lines and imports not."""
    imports = re.compile(r"\s*(import \w+|from [\w.]+ import )")
    return sum(bool(line.strip()) and not imports.match(line) for line in body.splitlines())


def lift(script: str, claim: int = 0) -> SimpleNamespace:
    """The names of a script's "Copy:" paragraph, executed in an empty namespace."""
    imports, body = block(script, claims(script)[claim].names)
    modules = {re.split(r"[ .]", line)[1] for line in imports.splitlines()}
    assert modules <= ALLOWED, f"{script}: the block imports {modules - ALLOWED}"
    namespace = {"__name__": f"lifted_{script}"}
    exec(compile(f"{imports}\n\n\n{body}", f"<lifted from {script}.py>", "exec"), namespace)
    return SimpleNamespace(**namespace)
