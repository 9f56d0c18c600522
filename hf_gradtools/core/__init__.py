"""Ground floor of the package: what the areas share, in torch and numpy alone."""
