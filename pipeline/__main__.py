"""`python -m pipeline` is `gigasr`."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
