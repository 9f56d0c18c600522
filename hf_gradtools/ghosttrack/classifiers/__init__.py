"""Classifiers of label 1 against 0: recipes that scikit-learn fits, and arrays that predict without it."""
