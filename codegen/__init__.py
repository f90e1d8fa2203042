"""Import this package as deepseed.codegen: under two names its modules would be loaded twice."""

if not __name__.startswith("deepseed."):
    raise ImportError("import deepseed.codegen, not codegen")
