"""How fast the method runs, each part against a stated reference inside the same process."""
