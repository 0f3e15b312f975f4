"""What training, recording, searching and distilling cost, beside the usual script."""
