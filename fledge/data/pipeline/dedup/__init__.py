"""Detection of exact and near duplicates."""
