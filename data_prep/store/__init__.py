"""The store: one interface over local folders and S3, with retries and checked downloads."""
