# SPDX-License-Identifier: Apache-2.0
"""`madtp.patch` refuses a transformers that pyproject.toml does not ask for."""

import re
from importlib import metadata
from pathlib import Path

import pytest
import transformers
from families import CASES, CONFIG

import madtp
from madtp.models import versions

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
OLDEST = re.search(r'"transformers>=([\d.]+)"', PYPROJECT.read_text()).group(1)


@pytest.fixture
def required(monkeypatch):
    """Sets what the installed package says it requires."""

    def require(*requirements):
        def requires(package):
            assert package == versions.PACKAGE and package in PYPROJECT.read_text()
            if not requirements:
                raise metadata.PackageNotFoundError(package)
            return list(requirements)

        monkeypatch.setattr(metadata, "requires", requires)
        versions._required.cache_clear()

    yield require
    versions._required.cache_clear()


@pytest.mark.parametrize("version", ["4.57.1", "5.16.1"])
def test_an_old_transformers_is_refused(version, required, monkeypatch, tmp_path):
    required("torch>=2.11", f"transformers>={OLDEST}")
    monkeypatch.setattr(transformers, "__version__", version)
    model = CASES["ViTModel"].build()
    message = f'transformers must be >={OLDEST}, got {version}: pip install "transformers>={OLDEST}"'
    with pytest.raises(RuntimeError, match=re.escape(message)):
        madtp.patch(model, CONFIG)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        madtp.from_pretrained(tmp_path)
    assert type(model) is transformers.ViTModel and not hasattr(model, "madtp_handle")


@pytest.mark.parametrize("version", [OLDEST, "99.0.dev0"])
def test_others_are_not(version, required, monkeypatch):
    required("torch>=2.11", f"transformers>={OLDEST}")
    monkeypatch.setattr(transformers, "__version__", version)
    versions.check_transformers()


def test_a_source_tree_asks_for_none(required, monkeypatch):
    required()
    monkeypatch.setattr(transformers, "__version__", "1.0")
    versions.check_transformers()
