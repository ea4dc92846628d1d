"""``python -m cnm``: the command line, for torchrun and where scripts are not on the path."""

from cnm.cli import main

if __name__ == "__main__":
    main()
