"""What all rooms stand on: records, the law of tokens, verification, the target, its cache, files, checks."""
