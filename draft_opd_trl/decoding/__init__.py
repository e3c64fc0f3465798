"""Speculation and its replay: what is proposed, what verification says of it, and the counts of both."""
