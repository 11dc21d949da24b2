"""Contents of a store: schema, parts and their commits, MDS shards, snapshots."""
