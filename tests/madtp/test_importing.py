# SPDX-License-Identifier: Apache-2.0
"""`import madtp` and `madtp --help` load next to nothing, and what they do not find they name."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import madtp
from madtp import choices
from madtp.import_hook import when_imported
from madtp.lazy import attach
from madtp.missing import package_needed

HEAVY = ("torch", "transformers", "madtp_kernels", "matplotlib", "yaml", "jinja2", "PIL", "numpy")
COMMANDS = ("demo", "compress", "allocate", "pareto", "evaluate", "profile", "visualize", "env")
BLOCKED = "import sys; sys.modules[{!r}] = None; "


def run(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False)


def printed(program):
    done = run(program)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(program):
    """Which of `HEAVY` a program loads."""
    found = printed(
        f"import sys; {program}; print(*(name for name in {HEAVY + ('rich', 'typer')} if name in sys.modules))"
    )
    return found.splitlines()[-1].split()


def test_import_madtp_loads_nothing():
    assert loaded("import madtp; dir(madtp)") == []


def test_help_loads_nothing_heavy():
    """That of all commands, one after another."""
    lines = [["madtp", *command.split(), "--help"] for command in ("", *COMMANDS)]
    show = "import madtp.cli\ndef show():\n try: madtp.cli.main()\n except SystemExit: pass\n"
    show += f"for sys.argv in {lines}: show()"
    assert not set(loaded(show)) & set(HEAVY)


def test_python_m_madtp():
    done = subprocess.run([sys.executable, "-m", "madtp", "--help"], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in COMMANDS)


def test_the_names_are_where_the_table_says():
    assert set(madtp.__all__) <= set(dir(madtp))
    for name in madtp.__all__:
        assert getattr(madtp, name).__name__ == name
    assert madtp.__version__.count(".") == 2 and madtp.hwp.pack
    with pytest.raises(AttributeError, match="module 'madtp' has no attribute 'prune'"):
        madtp.prune  # noqa: B018


def test_a_room_does_not_take_the_name_of_a_function():
    import madtp.profiling.macs

    assert madtp.measure is importlib.import_module("madtp.profiling.figures").measure


def test_choices_are_those_of_the_registry():
    from madtp.tasks.registry import TASKS

    assert tuple(TASKS) == choices.TASKS
    assert {name for entry in TASKS.values() for name in entry.data} == set(choices.DATA)


VIT = """
config = transformers.ViTConfig(
    hidden_size=8, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1, image_size=8, patch_size=4
)
model = transformers.AutoModel.from_config(config, attn_implementation="madtp")
from madtp.models.attention_interface import attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
print(ALL_ATTENTION_FUNCTIONS["madtp"] is attention_forward)
"""


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param("import madtp, transformers", marks=pytest.mark.slow),
        pytest.param("import transformers.modeling_utils, madtp", marks=pytest.mark.slow),
        "import madtp; from transformers import CLIPModel; import transformers; from madtp.models import FAMILIES",
    ],
)
def test_transformers_has_the_attention_whoever_comes_first(imports):
    assert printed(f"{imports}\n{VIT}") == "True\n"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that can be imported; returns its name."""
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)

    def write(text):
        Path(tmp_path, "waited_for.py").write_text(text)
        importlib.invalidate_caches()
        return "waited_for"

    yield write
    sys.modules.pop("waited_for", None)
    sys.meta_path[:] = finders


def test_an_action_waits_for_a_module(module):
    name, done = module("value = 3"), []
    finders = list(sys.meta_path)
    when_imported(name, lambda: done.append(sys.modules[name].value))
    assert done == []
    importlib.import_module(name)
    assert done == [3] and sys.meta_path == finders
    when_imported(name, lambda: done.append("at once"))
    assert done == [3, "at once"]
    importlib.reload(sys.modules[name])
    assert len(done) == 2


def test_an_action_waits_for_a_module_that_loads(module, tmp_path):
    name, done = module("raise OSError"), []
    when_imported(name, lambda: done.append(1))
    with pytest.raises(OSError):
        importlib.import_module(name)
    assert done == []
    (tmp_path / "waited_for.py").write_text("value = 12345")
    importlib.invalidate_caches()
    importlib.import_module(name)
    assert done == [1]


def test_what_is_missing_is_named():
    program = BLOCKED.format("torch") + "import madtp\ntry: madtp.patch\nexcept ImportError as error: print(error)"
    assert printed(program) == "torch is needed for madtp.patch: pip install -e .\n"


@pytest.mark.parametrize(
    ("package", "arguments", "what"),
    [
        ("transformers", ["evaluate", "nowhere"], "madtp evaluate"),
        pytest.param("rich", ["demo"], "madtp demo", marks=pytest.mark.slow),
        ("typer", ["--help"], "madtp"),
    ],
)
def test_a_command_names_what_is_missing(package, arguments, what):
    done = run(BLOCKED.format(package) + f"sys.argv = ['madtp', *{arguments}]; import madtp.cli; madtp.cli.main()")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {package} is needed for {what}: pip install -e .\n"


def test_a_module_of_ours_that_is_missing_is_a_bug():
    getter, _ = attach("madtp.models", {"nothing": "madtp.models.nothing"})
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'madtp\.models\.nothing'"):
        getter("nothing")
    error = ModuleNotFoundError("no name")
    assert package_needed(error, "madtp") is error


def test_an_import_draws_no_random_numbers():
    """It comes with the first name that is used, in the midst of what a user has seeded."""
    code = "import torch, transformers; torch.manual_seed(0); before = torch.get_rng_state(); import madtp\n"
    code += "from madtp import hwp, patch; assert torch.equal(torch.get_rng_state(), before)"
    subprocess.run([sys.executable, "-c", code], check=True)
