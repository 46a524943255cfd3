"""Many images at once: compiled programs, buckets of lanes, and threads."""
