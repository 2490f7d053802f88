"""Options of a retrieval database."""
