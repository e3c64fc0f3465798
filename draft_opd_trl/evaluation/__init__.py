"""Drafters measured by real speculation, and how that is shown."""
