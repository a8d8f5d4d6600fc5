"""Is PGT better than cross-entropy on small images? The study of README.md: what was run, and what it found."""
