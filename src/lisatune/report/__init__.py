"""One page with charts."""
