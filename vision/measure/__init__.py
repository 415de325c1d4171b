"""What a trained network is worth: figures over data sets."""
