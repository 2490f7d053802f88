"""Tasks of a database build."""
