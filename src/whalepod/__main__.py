"""`python -m whalepod` is the `whalepod` command."""

from whalepod.cli import main

if __name__ == "__main__":
    main()
