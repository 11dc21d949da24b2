"""Raw image-caption pairs: WebDataset, parquet, folders, MDS, OpenMoji, scenes."""
