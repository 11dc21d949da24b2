"""The plan: scan, filters, duplicates, budget, and the manifest that fixes every part."""
