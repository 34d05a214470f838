"""One experiment: its configuration, what is built from it, its stages, and its folder."""
