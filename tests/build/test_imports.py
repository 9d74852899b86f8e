# SPDX-License-Identifier: Apache-2.0
"""Imports run one way: models -> method -> ops -> backends. Read off the sources, so nothing is imported here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {"madtp_kernels": ROOT / "madtp_kernels", "madtp": ROOT / "python" / "madtp"}

# From the lowest layer to the highest. What stands in one line may not import each other, but for files of one package.
LAYERS = {
    "madtp_kernels": (
        ("_version", "atomic_file", "checks", "selection", "flops", "nm_patterns", "ragged", "renamed"),
        ("nm_masks", "dispatch"),
        ("reference",),
        ("native", "triton"),
        ("sparse24",),
        ("quantized",),
        ("ops",),
        ("",),  # madtp_kernels itself
        ("env", "tune"),
    ),
    "madtp": (
        (
            "choices",
            "files",
            "handles",
            "hooks",
            "import_hook",
            "inference",
            "migration",
            "missing",
            "progress",
            "search",
        ),
        ("lazy",),
        ("mag",),
        ("dtp",),
        ("config", "hwp"),
        ("models",),
        ("patching", "data"),
        ("tasks",),
        ("profiling",),
        ("training",),
        ("budgets",),
        ("compression",),
        ("reporting",),
        ("demo",),
        ("cli",),
        ("", "__main__"),  # madtp itself
    ),
}


def modules(root: str) -> dict[str, Path]:
    """Dotted name -> file, of every module of a root."""
    found = {}
    for path in sorted(SOURCES[root].rglob("*.py")):
        parts = [root, *path.relative_to(SOURCES[root]).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of `known` that a file imports, wherever in it; those for type checkers alone do not count."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found & known.keys()


def room(name: str) -> str:
    """The top module or package inside its root: "" for the root itself."""
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("root", SOURCES)
def test_every_room_has_a_layer(root):
    placed = [name for layer in LAYERS[root] for name in layer]
    assert len(placed) == len(set(placed))
    assert {room(name) for name in modules(root)} <= set(placed)


@pytest.mark.parametrize("root", SOURCES)
def test_imports_run_down_the_layers(root):
    known = modules(root)
    height = {name: i for i, layer in enumerate(LAYERS[root]) for name in layer}
    wrong = [
        f"{name} imports {target}"
        for name, path in known.items()
        for target in imported(path, known)
        if room(name) != room(target) and height[room(name)] <= height[room(target)]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("root", SOURCES)
def test_no_circles_inside_a_room(root):
    known = modules(root)
    arrows = {name: imported(path, known) - {name} for name, path in known.items()}
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in arrows[name]:
                if room(target) == room(name):
                    walk(target, (*trail, name))
            done.add(name)

    for name in known:
        walk(name, ())


def test_the_kernels_do_not_import_madtp():
    every = modules("madtp_kernels") | modules("madtp")
    for name, path in modules("madtp_kernels").items():
        assert not any(target.split(".")[0] == "madtp" for target in imported(path, every)), name
