"""What a model lost and gained: measurements, the report and its plots."""
