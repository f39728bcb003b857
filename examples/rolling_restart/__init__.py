"""A server that is restarted again and again under load, without a call that fails."""
