"""Many runs: compared, drawn, and made into the book."""
