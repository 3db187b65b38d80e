"""`python -m pqmim` is `pqmim`."""

from pqmim.cli import main

if __name__ == "__main__":
    main()
