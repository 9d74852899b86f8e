# SPDX-License-Identifier: Apache-2.0
"""Which transformers the package is for: as its installed metadata, and so pyproject.toml, say."""

import functools
from importlib import metadata

import transformers
from packaging.requirements import Requirement

PACKAGE = "madtp-kernels"


def check_transformers() -> None:
    """Raises RuntimeError where transformers is of a version that the package does not ask for.

    Used from a source tree without being installed, the package asks for none.
    """
    required = _required()
    if required is not None and not required.specifier.contains(transformers.__version__, prereleases=True):
        raise RuntimeError(
            f'transformers must be {required.specifier}, got {transformers.__version__}: pip install "{required}"'
        )


@functools.cache
def _required() -> Requirement | None:
    try:
        requirements = map(Requirement, metadata.requires(PACKAGE) or ())
    except metadata.PackageNotFoundError:
        return None
    return next((requirement for requirement in requirements if requirement.name == "transformers"), None)
