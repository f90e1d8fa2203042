"""Import this package as deepseed.passes: under two names its modules would be loaded twice."""

if not __name__.startswith("deepseed."):
    raise ImportError("import deepseed.passes, not passes")
