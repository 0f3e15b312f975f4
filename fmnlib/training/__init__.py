"""Networks, data, and the loop that trains, records and distils them."""
