"""Thresholds and offsets from cached tables: budgets met or refused, expectations from held-out folds, whole curves."""
