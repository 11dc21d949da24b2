"""From a snapshot to batches: epoch plan, shard cache, dataset, loaders."""
