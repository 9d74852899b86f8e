"""python -m madtp: the command madtp."""

from madtp.cli import main

if __name__ == "__main__":
    main()
