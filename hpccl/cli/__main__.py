"""`python -m hpccl.cli`."""

from hpccl.cli import main

if __name__ == "__main__":
    main()
