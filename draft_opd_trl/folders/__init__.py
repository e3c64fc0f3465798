"""Folders of drafters and targets: read, written, converted, looked at, described, pushed."""
