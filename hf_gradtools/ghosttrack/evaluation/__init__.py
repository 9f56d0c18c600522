"""A fair test: folds that keep questions whole, baselines, intervals, paired differences."""
