"""What needs all documents: exact and near duplicates, and lines that stand in many documents."""
