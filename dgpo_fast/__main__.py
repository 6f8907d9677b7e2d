"""`python -m dgpo_fast`: the command line, for torchrun and DeepSpeed's launcher."""

from dgpo_fast.cli import main

if __name__ == "__main__":
    main()
