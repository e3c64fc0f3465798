"""The parts of `gpu.py`: each is a generator of names and figures, run in a process of its own."""
