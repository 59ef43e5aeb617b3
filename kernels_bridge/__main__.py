"""`python -m kernels_bridge`: what each backend needs, and whether it is here."""

import torch

from .backends import table

if __name__ == "__main__":
    print(table("cuda" if torch.cuda.is_available() else "cpu"))
