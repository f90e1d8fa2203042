"""``python -m deepseed`` is the ``deepseed`` command."""

from deepseed.cli import main

if __name__ == "__main__":
    main()
