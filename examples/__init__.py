"""What one can build with druvarpc."""
