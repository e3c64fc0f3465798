"""One module a command: its options, and the call into the package that does the work."""
