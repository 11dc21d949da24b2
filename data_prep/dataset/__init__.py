"""What a store contains: schema, parts and their commits, MDS shards, snapshots."""
