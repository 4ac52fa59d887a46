"""Judges of answers, what they are asked, and what can be believed of them."""
