# SPDX-License-Identifier: Apache-2.0
"""python -m madtp: the command madtp."""

from madtp.cli import main

if __name__ == "__main__":
    main()
