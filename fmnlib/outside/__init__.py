"""Networks that were trained elsewhere: recorded, fused, shipped."""
