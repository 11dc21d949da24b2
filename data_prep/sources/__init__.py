"""Sources of raw image-caption pairs: WebDataset, parquet, folders, MDS, OpenMoji, scenes."""
