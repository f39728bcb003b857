"""Who calls, told by tokens that expire."""
