"""Commands: parse, then call one function of the package."""
