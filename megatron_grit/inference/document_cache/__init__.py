"""Keys and values of documents and queries, computed once and read by many answers."""
