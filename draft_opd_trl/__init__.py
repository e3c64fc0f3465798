"""Draft-OPD for the Hugging Face ecosystem: make a speculative-decoding drafter better on its own proposals."""
