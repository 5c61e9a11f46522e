"""Models behind an HTTP endpoint, on Ray Serve."""
