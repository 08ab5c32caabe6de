"""One HTML page with charts, of runs or of a comparison."""
