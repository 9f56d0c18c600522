"""What texts look like to a model and its sparse autoencoders, and the scalars of a model's own doubt."""
