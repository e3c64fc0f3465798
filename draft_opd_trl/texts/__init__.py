"""Prompts and the texts that the target writes for them, whoever writes them down."""
