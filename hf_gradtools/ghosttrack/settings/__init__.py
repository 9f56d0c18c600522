"""The YAML configuration of a run: read strictly, checked against the model."""
