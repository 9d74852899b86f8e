# SPDX-License-Identifier: Apache-2.0
"""Imports run down the LAYERS below. Read off the sources, so nothing is imported here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {"madtp_kernels": ROOT / "madtp_kernels", "madtp": ROOT / "python" / "madtp"}

# From the lowest layer to the highest. What stands in one line may not import each other, but for files of one package.
LAYERS = {
    "madtp_kernels": (
        ("_version", "atomic_file", "bounded_file"),
        ("checks", "flops", "nm_patterns", "ragged", "renamed"),
        ("table_file", "nm_masks", "dispatch", "layouts", "selection", "weight_files"),
        ("reference", "measured"),
        ("native", "triton"),
        ("dense",),
        ("sparse24",),
        ("quantized",),
        ("decompositions", "ops"),
        ("",),  # madtp_kernels itself
        ("env", "tune"),
    ),
    "madtp": (
        (
            "building",
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
        ("width",),
        ("patching", "data"),
        ("exporting", "tasks"),
        ("embedding", "profiling"),
        ("training",),
        ("budgets",),
        ("compression",),
        ("reporting",),
        ("demo", "vlm_demo"),
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


def imported(source: str, known: dict[str, Path]) -> set[str]:
    """The modules of `known` that a source imports, wherever in it; those for type checkers alone do not count.

    `import_module("a.b")` counts. A name that is computed, or that a table holds, belongs to those who ask for it:
    `dispatch.triton_launcher`, `lazy.attach`.
    """
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"imports are absolute: {ast.unparse(node)}"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found.update(str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found & known.keys()


def room(name: str) -> str:
    """The top module or package inside its root: "" for the root itself."""
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import madtp.cli.app", {"madtp.cli.app"}),
        ("from madtp.cli import app", {"madtp.cli.app"}),
        ("from madtp.cli.app import main", {"madtp.cli.app"}),
        ("def late():\n    import madtp.cli.app", {"madtp.cli.app"}),
        ('importlib.import_module("madtp.cli.app").main()', {"madtp.cli.app"}),
        ('import_module("madtp.cli.app")', {"madtp.cli.app"}),
        ('__import__("madtp.cli.app")', {"madtp.cli.app"}),
        ("if TYPE_CHECKING:\n    import madtp.demo\nelse:\n    import madtp.cli.app", {"madtp.cli.app"}),
        ("if typing.TYPE_CHECKING:\n    import madtp.demo\nelif late:\n    import madtp.cli.app", {"madtp.cli.app"}),
        ('import_module(name), import_module(f"madtp.cli.{name}")', set()),
    ],
)
def test_every_form_of_import_is_seen(source, expected):
    assert imported(source, {"madtp.cli.app": ROOT, "madtp.demo": ROOT}) == expected


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
        for target in imported(path.read_text(), known)
        if room(name) != room(target) and height[room(name)] <= height[room(target)]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("root", SOURCES)
def test_no_circles_inside_a_room(root):
    known = modules(root)
    arrows = {name: imported(path.read_text(), known) - {name} for name, path in known.items()}
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
        assert not any(target.split(".")[0] == "madtp" for target in imported(path.read_text(), every)), name
