"""What the model card says about the model, measured."""
