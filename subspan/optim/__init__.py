"""The library: a projector, a rule and their optimizer. Needs torch alone."""
