"""What data sets are made of: clients in pools, and ways to divide samples among them."""
