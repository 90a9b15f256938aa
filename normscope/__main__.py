"""`python -m normscope` is `normscope`."""

from normscope.cli import main

if __name__ == "__main__":
    main(prog_name="normscope")
