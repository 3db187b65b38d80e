"""Measuring: rates, quality and time of this codec and of others, and the pages that show them."""
