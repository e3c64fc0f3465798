"""Draft-OPD for the Hugging Face ecosystem: make a speculative-decoding drafter better on its own proposals."""

import logging

import lazy_loader


# peft imports bitsandbytes, which warns, unasked, of a CPU kernel that only a 4-bit target on a CPU would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0.dev0"

# The names are in `__init__.pyi`, each loaded on first use: importing the package must not pull TRL's trainers.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
