"""`python -m speciesmap`, where the program itself is not on the path."""

from speciesmap.cli import main

if __name__ == "__main__":
    main()
