"""Text to token shards on disk, and back to rows in an order that depends on nothing but a seed and a row's number."""
