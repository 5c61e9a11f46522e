"""The science: arrays, models and files in, arrays, models and files out. No Ray, no HTTP, no argv."""
